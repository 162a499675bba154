#include "attention.hpp"

#include <kvcull/paging/quest.hpp>
#include <vector>

namespace page {

using namespace kvcull;

bool holds_attention(const std::string& path) {
    return path.ends_with(".safetensors") && SafeTensors::read(path).metadata().contains("kvcull_trace");
}

Requests requests_of(const replay::Trace& trace, const Paging& paging) {
    kvcull::detail::check<error::config_error>(paging.read >= 2, "requests_of", "read", paging.read,
                                               "at least 2: the first page and the newest");
    const std::size_t heads = trace.shape.kv_heads, group = trace.shape.group(), dim = trace.shape.head_dim;
    std::vector<PageBounds> bounds(trace.layers.size() * heads, PageBounds(dim));
    Requests requests;
    std::vector<float> scores;
    for (std::size_t token = 0; token < trace.size(); ++token) {
        const std::size_t newest = token / paging.page_tokens;
        for (std::size_t i = 0; i < bounds.size(); ++i) {
            const replay::Trace::Layer& layer = trace.layers[i / heads];
            const auto k = trace.heads(layer.k, heads, token, 1);
            bounds[i].add(newest, RowsView(k.row(i % heads, 0), 1, dim, dim));
            if (token < trace.prompt) continue;
            const auto q = trace.heads(layer.q, trace.shape.q_heads, token, 1);
            scores.resize(newest + 1);
            bounds[i].scores({q.row(i % heads * group, 0), group, dim, q.head_stride}, scores);
            for (const std::size_t chosen : choose_pages(scores, {.count = paging.read}))
                requests.pages.push_back((page_t{i} << 32U) | chosen);
        }
    }
    requests.steps = trace.size() - trace.prompt;
    return requests;
}

}  // namespace page
