/// Recorded attention, as kvcull-replay reads it.

#include "replay/trace.hpp"

#include "fuzz.hpp"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    static const fuzz::TemporaryFile file("trace.safetensors");
    file.write(fuzz::as_bytes(data, size));
    return fuzz::offer([&] { (void)replay::describe(replay::read_trace(file.path())); });
}
std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t most, unsigned seed) {
    return fuzz::mutate_safetensors(data, size, most, seed);
}
