/// Gates of TRIM-KV: what is taken can be run.

#include "kvcull/score/gates.hpp"

#include "safetensors_mutator.hpp"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    return fuzz::offer([&] { (void)kvcull::Gates::load(kvcull::SafeTensors(fuzz::as_bytes(data, size))); });
}
