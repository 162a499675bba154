#pragma once
/// Page requests of a model's decode steps, from its recorded attention (docs/traces.md).

#include <cstddef>
#include <string>

#include "../replay/trace.hpp"
#include "trace.hpp"

namespace page {

/// How the rows of a layer and KV head are cut into pages, and how many of them a step reads.
struct Paging {
    std::size_t page_tokens = 4;
    std::size_t read =
        8;  ///< per layer and KV head: the first page, the newest, and the best by Quest's bound
};

struct Requests {
    Pages pages = {};
    std::size_t steps = 0;  ///< 0: the requests are no steps'
};

/// Whether the file says that it holds recorded attention.
[[nodiscard]] bool holds_attention(const std::string& path);

/// One step per token after the prompt: layer by layer, head by head, the pages that its queries choose, from
/// keys up to that token. An id is layer, head and page, from the upper bits to the lower.
/// @throws kvcull::error::config_error if `read` is below 2
[[nodiscard]] Requests requests_of(const replay::Trace& trace, const Paging& paging);

}  // namespace page
