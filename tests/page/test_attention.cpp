#include "page/attention.hpp"

#include <kvcull/base/error.hpp>
#include <map>

#include "folder.hpp"
#include "support/catch.hpp"

namespace {

using page::Pages;
using page::test::Folder;

/// Two layers of one KV head with one channel: token t has key `keys[t]`, and asks for large or small ones.
replay::Trace trace_of(std::vector<float> keys, std::size_t prompt, float ask_first, float ask_second) {
    replay::Trace trace;
    trace.shape = {.layers = 2, .q_heads = 1, .kv_heads = 1, .head_dim = 1};
    trace.prompt = prompt;
    for (std::size_t t = 0; t < keys.size(); ++t)
        trace.positions.push_back(static_cast<kvcull::position_t>(t));
    for (const float ask : {ask_first, ask_second})
        trace.layers.push_back({std::vector<float>(keys.size(), ask), keys, keys});
    return trace;
}

TEST_CASE("a step requests the ends and the best pages, layer by layer", "[page][contract]") {
    constexpr kvcull::page_t second = kvcull::page_t{1} << 32U;
    // Pages of two tokens: 0, 0 | 1, 5 | -5, 1 | 0, 0 | 9
    const auto trace = trace_of({0, 0, 1, 5, -5, 1, 0, 0, 9}, 7, 1, -1);
    const page::Requests got = page::requests_of(trace, {.page_tokens = 2, .read = 3});
    CHECK(got.steps == 2);
    CHECK(got.pages == Pages{0, 1, 3, second, second + 2, second + 3,  // token 7
                             0, 1, 4, second, second + 2, second + 4});
    CHECK_THROWS_AS(page::requests_of(trace, {.page_tokens = 2, .read = 1}), kvcull::error::config_error);
}

TEST_CASE("recorded attention is told from other files", "[page][contract]") {
    const Folder folder;
    replay::write_trace(folder.file("a.safetensors"), trace_of({1, 2, 3}, 1, 1, 1));
    kvcull::SafeTensors::write(
        folder.file("p.safetensors"), {},
        std::vector{kvcull::Tensor::of<std::int64_t>("pages", {1}, std::vector<std::int64_t>{4})});
    CHECK(page::holds_attention(folder.file("a.safetensors")));
    CHECK_FALSE(page::holds_attention(folder.file("p.safetensors")));
    CHECK_FALSE(page::holds_attention(folder.file("none.txt")));
}

}  // namespace
