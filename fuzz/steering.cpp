/// Steering vectors, as kvcull-steer writes them: what is taken can steer.

#include "tiny_llama/steering.hpp"

#include "safetensors_mutator.hpp"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    static const fuzz::TemporaryFile file("steering.safetensors");
    file.write(fuzz::as_bytes(data, size));
    return fuzz::offer([&] {
        const kvcull::Steering by = tiny_llama::read_steering(file.path());
        kvcull::Steering::State state = by.start();
        std::vector<float> hidden(by.vector.size());
        for (const std::int32_t token : {4, 2})
            (void)by.step(state, std::span(&token, 1), {hidden.data(), 1, hidden.size()});
    });
}
