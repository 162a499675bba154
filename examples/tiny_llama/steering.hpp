#pragma once
/// Steering the model's thoughts: a vector from what it thought before, kept in a file, and the hook that
/// brings it to bear.

#include <kvcull/cache/steering.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "thoughts.hpp"

namespace tiny_llama {

/// Thoughts of a model: what they do, and the hidden states that they came from.
struct Thoughts {
    std::vector<float> hidden = {};  ///< [labels.size(), hidden size] of the full stop before each thought
    std::vector<kvcull::Thought> labels = {};
};

/// Adds what the model thinks after a prompt. The first thought, which follows no other, does not count.
/// @param words  the text of every token, by which thoughts are labelled
/// @param layer  at whose input hidden states are taken; the number of layers: after the final norm
void add_thoughts(const Llama& model, std::span<const int> prompt, const Thinking& how,
                  std::span<const std::string> words, std::size_t layer, Thoughts& thoughts);

/// The vector in a file, with what the tiny world's language must be told of: where to steer, what ends a
/// sentence, what is a second thought, when the model thinks.
void write_steering(const std::string& file, std::span<const float> vector, std::size_t layer);
/// @throws kvcull::error::format_error
[[nodiscard]] kvcull::Steering read_steering(const std::string& file);

/// Steers one sequence. @param prompt  its tokens, of which the last one alone may be steered
/// @throws kvcull::error::config_error if the vector is none of this model
[[nodiscard]] Hook steer(const Llama& model, kvcull::Steering by, std::size_t prompt);

/// Any policy, with parameters for what is the model's affair and not the cache's.
template <kvcull::Policy P>
struct Steered : P {
    struct File {
        kvcull::Steering steering;

        [[nodiscard]] static File from_text(std::string_view path) {
            return {read_steering(std::string(path))};
        }
    };

    std::optional<File> steer = {};
    float alpha0 = kvcull::Steering{}.alpha0, gamma = kvcull::Steering{}.gamma,
          alpha_max = kvcull::Steering{}.alpha_max;

    static constexpr auto fields() {
        using kvcull::Field;
        return std::tuple_cat(
            P::fields(),
            std::tuple{Field{"steer", &Steered::steer}, Field{"alpha0", &Steered::alpha0},
                       Field{"gamma", &Steered::gamma}, Field{"alpha_max", &Steered::alpha_max}});
    }
    [[nodiscard]] const P& plain() const { return *this; }
    /// Nothing if no file was named. The strength is looked at as often as the policy evicts.
    [[nodiscard]] std::optional<kvcull::Steering> steering() const {
        if (!steer) return std::nullopt;
        kvcull::Steering by = steer->steering;
        by.alpha0 = alpha0;
        by.gamma = gamma;
        by.alpha_max = alpha_max;
        if constexpr (requires { this->interval; }) by.interval = this->interval;
        return by;
    }
};

}  // namespace tiny_llama
