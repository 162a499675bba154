#pragma once
/// Lets the model think: what it says between `<think>` and `</think>`.

#include <cstddef>
#include <cstdint>
#include <kvcull/base/memory.hpp>
#include <vector>

#include "reader.hpp"
#include "world.hpp"

namespace tiny_llama {

/// How a model thinks.
struct Thinking {
    std::size_t most = 0;      ///< tokens of a chain of thought; 0: it does not think
    double temperature = 1.0;  ///< 0: always the likeliest token
    std::uint64_t seed = 1;    ///< the same one draws alike everywhere
};

/// Draws tokens from logits.
class Voice {
  public:
    explicit Voice(const Thinking& how) : temperature_(how.temperature), random_{how.seed} {}

    [[nodiscard]] int next(const RowMajorMatrix& logits) {
        if (temperature_ == 0.0) return argmax(logits);
        const Eigen::ArrayXd row = logits.row(logits.rows() - 1).transpose().cast<double>();
        const Eigen::ArrayXd weights = ((row - row.maxCoeff()) / temperature_).exp();
        double left = random_.uniform() * weights.sum();
        for (Eigen::Index token = 0; token < weights.size(); ++token) {
            left -= weights[token];
            if (left < 0.0) return static_cast<int>(token);
        }
        return argmax(logits);  // rounding has left a crumb
    }

  private:
    double temperature_;
    kvcull::SplitMix64 random_;
};

/// Reads `<think>`, then what the model says until it is done or has said all it may, then `</think>`.
/// @returns what it said, without these two
template <class Cache>
std::vector<int> think(Reader& reader, Cache& cache, const Thinking& how) {
    Voice voice(how);
    std::vector<int> said;
    int token = word::think;
    reader.read({&token, 1}, cache);
    while (said.size() < how.most && (token = voice.next(reader.logits)) != word::end_think) {
        said.push_back(token);
        reader.read({&token, 1}, cache);
    }
    token = word::end_think;
    reader.read({&token, 1}, cache);
    return said;
}

}  // namespace tiny_llama
