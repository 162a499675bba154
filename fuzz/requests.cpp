/// Traces of page requests: the first byte chooses between text and numbers.

#include "fuzz.hpp"
#include "page/trace.hpp"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    static const fuzz::TemporaryFile text("requests.txt"), numbers("requests.safetensors");
    if (size == 0) return 0;
    const fuzz::TemporaryFile& file = data[0] == 't' ? text : numbers;
    file.write(fuzz::as_bytes(data + 1, size - 1));
    return fuzz::offer([&] { (void)page::count_distinct(page::read_trace(file.path())); });
}
std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t most, unsigned seed) {
    if (size == 0 || data[0] == 't') return LLVMFuzzerMutate(data, size, most);
    return 1 + fuzz::mutate_safetensors(data + 1, size - 1, most - 1, seed);
}
