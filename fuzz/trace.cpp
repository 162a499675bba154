/// Recorded attention, as kvcull-replay reads it.

#include "replay/trace.hpp"

#include "safetensors_mutator.hpp"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    static const fuzz::TemporaryFile file("trace.safetensors");
    file.write(fuzz::as_bytes(data, size));
    return fuzz::offer([&] { (void)replay::describe(replay::read_trace(file.path())); });
}
