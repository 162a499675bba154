#pragma once
/// Page requests, one 64-bit id each: from a file, or made.

#include <kvcull/paging/page_table.hpp>
#include <span>
#include <string>
#include <vector>

namespace page {

using Pages = std::vector<kvcull::page_t>;

/// A file that ends in `.safetensors`: its tensor `in.pages` or `pages`, of type I32, I64 or U64. Any other:
/// text with one decimal id per line; blank lines and lines that begin with `#` are skipped.
/// @throws kvcull::error::format_error that names the file and the line, or the tensor and the number
[[nodiscard]] Pages read_trace(const std::string& path);

/// Made requests: `zipf`, `loop` or `uniform`, as in `zipf:pages=1000,requests=50000,seed=7`.
/// @throws kvcull::error::config_error for an unknown name, key or value; it lists what exists
[[nodiscard]] Pages make_trace(const std::string& text);

[[nodiscard]] std::size_t count_distinct(std::span<const kvcull::page_t> pages);

}  // namespace page
