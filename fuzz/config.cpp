/// A model's config.json.

#include "tiny_llama/config.hpp"

#include "fuzz.hpp"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    static const fuzz::TemporaryFile file("config.json");
    file.write(fuzz::as_bytes(data, size));
    return fuzz::offer([&] { (void)tiny_llama::read_config(file.path()); });
}
