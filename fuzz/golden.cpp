/// Golden files of the tests: parameters and arrays of any name and number of axes.

#include "support/golden.hpp"

#include "safetensors_mutator.hpp"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    static const fuzz::TemporaryFile file("golden.safetensors");
    file.write(fuzz::as_bytes(data, size));
    return fuzz::offer([&] {
        const kvcull::test::GoldenFile golden(file.path());
        for (const auto& entry : golden.file().metadata()) {
            fuzz::offer([&] { (void)golden.count(entry.first); });
            fuzz::offer([&] { (void)golden.real(entry.first); });
        }
        for (const kvcull::Tensor& tensor : golden.file().tensors())
            for (std::size_t axes = 0; axes < 4; ++axes) {
                fuzz::offer([&] { (void)golden.array<float>(tensor.name, axes); });
                fuzz::offer([&] { (void)golden.array<std::int64_t>(tensor.name, axes); });
            }
    });
}
