#pragma once
/// The weights of a checkpoint folder, widened to float.

#include <Eigen/Core>
#include <cstddef>
#include <filesystem>
#include <initializer_list>
#include <kvcull/base/safetensors.hpp>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "mapped_file.hpp"

namespace tiny_llama {

using RowMajorMatrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using RowVector = Eigen::Matrix<float, 1, Eigen::Dynamic, Eigen::RowMajor>;

/// `model.safetensors`, or the shards that `model.safetensors.index.json` lists, memory-mapped.
class Checkpoint {
  public:
    /// @throws kvcull::error::format_error, std::system_error
    explicit Checkpoint(const std::filesystem::path& folder);

    /// Tensors [rows, cols] of f32, f16 or bf16, one below the other: products with the same input become
    /// one.
    /// @throws kvcull::error::format_error that names tensor, file, got and want
    struct Part {
        std::string name;
        std::size_t rows;
    };
    [[nodiscard]] RowMajorMatrix stack(std::initializer_list<Part> parts, std::size_t cols);
    [[nodiscard]] RowMajorMatrix matrix(const std::string& name, std::size_t rows, std::size_t cols) {
        return stack({{name, rows}}, cols);
    }
    [[nodiscard]] RowVector vector(const std::string& name, std::size_t size);

    /// Names nobody has asked for: a model that leaves weights unread is not the model of the file.
    [[nodiscard]] std::vector<std::string> unread() const;

  private:
    struct Shard {
        MappedFile file;
        std::string path;
        kvcull::SafeTensors tensors;
        explicit Shard(const std::filesystem::path& path_)
            : file(path_), path(path_.string()), tensors(file.bytes(), path) {}
    };
    /// @throws kvcull::error::format_error if there is no such tensor of this shape
    [[nodiscard]] const kvcull::Tensor& find(const std::string& name,
                                             const std::vector<std::size_t>& shape) const;
    void widen(const std::string& name, const std::vector<std::size_t>& shape, float* out);

    std::string folder_;
    std::map<std::string, Shard> shards_;
    std::map<std::string, const Shard*> shard_of_;
    std::set<std::string> read_;
};

}  // namespace tiny_llama
