#pragma once
/// What no step can do without, whatever a policy adds to it.

#include <cstddef>

#include "kvcull/cache/tiles.hpp"

namespace kvcull::bench {

/// Attention of a token over the rows of a layer. @param view  of a head's rows: HeadView(head)
template <class View>
void attend_plainly(const CacheShape& shape, const View& view, const HeadsView<const float>& q,
                    const HeadsView<float>& out, detail::TileScratch& scratch) {
    for (std::size_t h = 0; h < shape.kv_heads; ++h)
        detail::for_each_tile({.group = shape.group(),
                               .cached = view(h),
                               .scale = shape.logit_scale(),
                               .kernels = &simd::kernels()},
                              q, h * shape.group(), {}, out, {}, scratch, [](const HeadStep&) {});
}

}  // namespace kvcull::bench
