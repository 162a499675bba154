#pragma once
/// Recorded attention: what the layers of a model gave to their KV cache, token by token. docs/traces.md has
/// the layout of the files.

#include <cstddef>
#include <cstdint>
#include <kvcull/base/safetensors.hpp>
#include <kvcull/cache/shape.hpp>
#include <kvcull/views.hpp>
#include <string>
#include <vector>

namespace replay {

struct Trace {
    /// Numbers as attention saw them, q and k rotated: q [q_heads, tokens, head_dim], k [kv_heads, tokens,
    /// head_dim], v [kv_heads, tokens, value_dim].
    struct Layer {
        std::vector<float> q = {}, k = {}, v = {};
    };

    kvcull::CacheShape shape = {};  ///< dtype: of k and v in the file, and so of the rows in a cache
    std::size_t prompt = 0;         ///< tokens that came as a prompt; each of the others came alone
    std::vector<kvcull::position_t> positions = {};  ///< [tokens], ascending
    std::vector<std::int32_t> tokens = {};           ///< [tokens] ids, or empty
    std::vector<Layer> layers = {};
    kvcull::SafeTensors::Metadata notes = {};  ///< metadata that replaying does not need

    [[nodiscard]] std::size_t size() const noexcept { return positions.size(); }
    /// `count` tokens from `first` on of one of a layer's arrays.
    [[nodiscard]] kvcull::HeadsView<const float> heads(const std::vector<float>& array, std::size_t heads,
                                                       std::size_t first, std::size_t count) const noexcept {
        const std::size_t dim = array.size() / (heads * size());
        return {array.data() + first * dim, heads, count, dim, size() * dim, dim};
    }
};

/// @throws kvcull::error::format_error that names the file and the tensor or key, what it is and what is
/// wanted
[[nodiscard]] Trace read_trace(const std::string& path);

/// Writes q, k and v as `trace.shape.dtype`.
/// @throws kvcull::error::format_error if the file cannot be written, or for a number that is not finite in
///         that type
void write_trace(const std::string& path, const Trace& trace);

/// "386 + 24 tokens, 2 layers, 4 query heads on 2 KV heads of 64, f16".
[[nodiscard]] std::string describe(const Trace& trace);

}  // namespace replay
