#include "checkpoint.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "json.hpp"

namespace tiny_llama {
namespace {

std::string text(const std::vector<std::size_t>& shape) {
    std::string out = "[";
    for (std::size_t i = 0; i < shape.size(); ++i) out += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
    return out + "]";
}

/// The file need not align its numbers, so each is copied out.
template <class T>
void widen_all(std::span<const std::byte> bytes, float* out) {
    for (std::size_t i = 0; i < bytes.size() / sizeof(T); ++i) {
        T number;
        std::memcpy(&number, bytes.data() + i * sizeof(T), sizeof(T));
        out[i] = kvcull::to_float(number);
    }
}

}  // namespace

Checkpoint::Checkpoint(const std::filesystem::path& folder) : folder_(folder.string()) {
    const std::filesystem::path single = folder / "model.safetensors",
                                index = folder / "model.safetensors.index.json";
    if (std::filesystem::exists(single)) {
        const Shard& shard = shards_.emplace(single.filename(), single).first->second;
        for (const auto& tensor : shard.tensors.tensors()) shard_of_[tensor.name] = &shard;
        return;
    }
    if (!std::filesystem::exists(index))
        fail(folder_, "has neither model.safetensors nor model.safetensors.index.json");
    const nlohmann::json json = read_json(index);
    const Object map = Object(json, index.string()).object("weight_map");
    for (const auto& [name, _] : json.at("weight_map").items()) {
        const auto file = map.get<std::string>(name);
        if (file != std::filesystem::path(file).filename()) map.wrong(name, "a file name without folders");
        const Shard& shard = shards_.try_emplace(file, folder / file).first->second;
        if (!shard.tensors.contains(name))
            fail(shard.path, "has no tensor '" + name + "', which the index promises");
        shard_of_[name] = &shard;
    }
}

RowMajorMatrix Checkpoint::stack(std::initializer_list<Part> parts, std::size_t cols) {
    const auto rows = std::accumulate(parts.begin(), parts.end(), std::size_t{0},
                                      [](std::size_t sum, const Part& part) { return sum + part.rows; });
    for (const Part& part : parts)
        (void)find(part.name, {part.rows, cols});  // before memory is taken for them
    RowMajorMatrix all(rows, cols);
    float* out = all.data();
    for (const Part& part : parts) {
        widen(part.name, {part.rows, cols}, out);
        out += part.rows * cols;
    }
    return all;
}

RowVector Checkpoint::vector(const std::string& name, std::size_t size) {
    (void)find(name, {size});
    RowVector all(size);
    widen(name, {size}, all.data());
    return all;
}

std::vector<std::string> Checkpoint::unread() const {
    std::vector<std::string> names;
    for (const auto& [name, _] : shard_of_)
        if (!read_.contains(name)) names.push_back(name);
    return names;
}

const kvcull::Tensor& Checkpoint::find(const std::string& name, const std::vector<std::size_t>& shape) const {
    const auto found = shard_of_.find(name);
    if (found == shard_of_.end()) fail(folder_, "no tensor '" + name + "', want one of shape " + text(shape));
    const kvcull::Tensor& tensor = found->second->tensors.tensor(name);
    if (tensor.shape != shape)
        fail(found->second->path + ": tensor '" + name + "'",
             "shape is " + text(tensor.shape) + ", want " + text(shape));
    return tensor;
}

void Checkpoint::widen(const std::string& name, const std::vector<std::size_t>& shape, float* out) {
    const kvcull::Tensor& tensor = find(name, shape);
    switch (tensor.dtype) {
        case kvcull::ElementType::f32:
            widen_all<float>(tensor.bytes, out);
            break;
        case kvcull::ElementType::f16:
            widen_all<kvcull::float16>(tensor.bytes, out);
            break;
        case kvcull::ElementType::bf16:
            widen_all<kvcull::bfloat16>(tensor.bytes, out);
            break;
        default:
            fail(shard_of_.at(name)->path + ": tensor '" + name + "'",
                 "dtype is " + std::string(name_of(tensor.dtype)) + ", want F32, F16 or BF16");
    }
    read_.insert(name);
}

}  // namespace tiny_llama
