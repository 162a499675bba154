#pragma once
/// Calls in which a policy hears no attention, and who is asked again because of it.

#include <cstddef>

#include "engine.hpp"

namespace kvcull::test {

/// A call of an engine that attends by itself: no attention is made.
template <class Cache>
void feed_silently(Cache& engine, const Stream& stream, std::size_t first, std::size_t count) {
    for (std::size_t layer = 0; layer < stream.shape.layers; ++layer) {
        engine.append(layer, stream.keys(layer, first, count), stream.values(layer, first, count));
        engine.attend(layer, stream.queries(layer, first, count), {});
    }
    engine.end_step();
}
/// Query tokens before the newest whose logits are computed in a call: those that are asked again.
struct AskedAgain {
    std::size_t count = 0;
    position_t newest = 0;

    [[nodiscard]] Bias bias() {
        return [this](const BiasRow& row) { count += row.query < newest ? 1 : 0; };
    }
};

}  // namespace kvcull::test
