/// The parser under all files of numbers: what it takes, it also writes back the same.

#include "kvcull/base/safetensors.hpp"

#include <cstdlib>

#include "safetensors_mutator.hpp"

using kvcull::SafeTensors;

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    return fuzz::offer([&] {
        const SafeTensors file(fuzz::as_bytes(data, size));
        const std::vector<std::byte> bytes = SafeTensors::serialize(file.metadata(), file.tensors());
        const SafeTensors again{std::span<const std::byte>(bytes)};
        if (again.metadata() != file.metadata() || again.tensors().size() != file.tensors().size())
            std::abort();
        for (const kvcull::Tensor& tensor : file.tensors()) {
            const kvcull::Tensor& other = again.tensor(tensor.name);
            const bool same = other.dtype == tensor.dtype && other.shape == tensor.shape &&
                              other.bytes.size() == tensor.bytes.size() &&
                              std::equal(other.bytes.begin(), other.bytes.end(), tensor.bytes.begin());
            if (!same) std::abort();
        }
    });
}
