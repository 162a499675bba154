/// A checkpoint folder: config.json up to the first zero byte, then model.safetensors.

#include <algorithm>

#include "fuzz.hpp"
#include "tiny_llama/llama.hpp"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    static const fuzz::TemporaryFile config("config.json"), weights("model.safetensors");
    const auto end = static_cast<std::size_t>(std::find(data, data + size, 0) - data);
    config.write(fuzz::as_bytes(data, end));
    weights.write(end < size ? fuzz::as_bytes(data + end + 1, size - end - 1) : std::span<const std::byte>{});
    return fuzz::offer([&] { (void)tiny_llama::Llama(config.folder()); });
}
std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t most, unsigned seed) {
    const auto end = static_cast<std::size_t>(std::find(data, data + size, 0) - data);
    if (end == size || seed % 3 == 0) return LLVMFuzzerMutate(data, size, most);
    return end + 1 + fuzz::mutate_safetensors(data + end + 1, size - end - 1, most - end - 1, seed / 3);
}
