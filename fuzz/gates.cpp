/// Gates of TRIM-KV: what is taken can be run.

#include "kvcull/score/gates.hpp"

#include "fuzz.hpp"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    return fuzz::offer([&] { (void)kvcull::Gates::load(kvcull::SafeTensors(fuzz::as_bytes(data, size))); });
}
std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t most, unsigned seed) {
    return fuzz::mutate_safetensors(data, size, most, seed);
}
