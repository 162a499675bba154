#pragma once
/// Steering of hidden states, so that a reasoning model has fewer second thoughts (SkipKV's other half).
/// Apart from any cache: the host calls it at the input of one layer.

#include <algorithm>
#include <array>
#include <cctype>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../base/error.hpp"
#include "../score/sentences.hpp"
#include "../views.hpp"

namespace kvcull::inline KVCULL_ABI {

/// What a thought does: works on the answer, doubts what was said, or starts another way.
enum class Thought : std::uint8_t { execution, reflection, transition };

/// The class of a thought by its words, ASCII upper and lower case alike (SEAL, arXiv 2504.07986).
[[nodiscard]] inline Thought classify_thought(std::string_view text) {
    constexpr std::array<std::string_view, 8> doubts{"verify",       "make sure",  "hold on",
                                                     "think again",  "'s correct", "'s incorrect",
                                                     "let me check", "seems right"};
    constexpr std::array<std::string_view, 7> turns{
        "think differently", "another way",      "another approach", "another method",
        "another solution",  "another strategy", "another technique"};
    std::string lower(text);
    for (char& c : lower) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    const auto any_of = [&](const auto& words) {
        return std::any_of(words.begin(), words.end(),
                           [&](std::string_view word) { return lower.find(word) != std::string::npos; });
    };
    if (lower.starts_with("wait") || any_of(doubts)) return Thought::reflection;
    if (lower.starts_with("alternatively") || any_of(turns)) return Thought::transition;
    return Thought::execution;
}

/// Mean hidden state of execution thoughts minus that of all others.
/// @param hidden  [N, D] at the input of the steered layer, of the token before each thought.
/// @throws shape_error if the sizes differ or one of the two groups is empty.
[[nodiscard]] inline std::vector<float> steering_vector(MatrixView<const float> hidden,
                                                        std::span<const Thought> labels) {
    constexpr std::string_view where = "steering_vector";
    detail::check_size(where, "labels.size()", labels.size(), hidden.rows);
    std::array<std::vector<double>, 2> sums{std::vector<double>(hidden.cols),
                                            std::vector<double>(hidden.cols)};
    std::array<std::size_t, 2> counts{};
    for (std::size_t i = 0; i < labels.size(); ++i) {
        const std::size_t group = labels[i] == Thought::execution ? 0 : 1;
        ++counts[group];
        for (std::size_t c = 0; c < hidden.cols; ++c) sums[group][c] += static_cast<double>(hidden[i][c]);
    }
    for (const std::size_t count : counts)
        detail::check<error::shape_error>(count > 0, where, "labels", "of one group only",
                                          "execution thoughts and others");
    std::vector<float> vector(hidden.cols);
    for (std::size_t c = 0; c < hidden.cols; ++c)
        vector[c] = static_cast<float>(sums[0][c] / static_cast<double>(counts[0]) -
                                       sums[1][c] / static_cast<double>(counts[1]));
    return vector;
}

/// SkipKV (arXiv 2512.07993), the part that generates less. In a step whose last input token is one of
/// `steer_at` inside the thinking span, alpha * vector joins the hidden state of that token at the input of
/// layer `layer`, where alpha grows with the number of sentences that held a marker.
struct Steering {
    /// Of one sequence: a value, copied by a mark or fork of the host.
    struct State {
        std::size_t seen = 0, non_execution = 0;  // tokens; closed sentences with a marker
        float alpha = 0.0F;                       // in force in the next step
        bool thinking = true, marked = false;     // the open sentence holds a marker
    };

    std::vector<float> vector = {};  // [D], shared by all sequences
    std::size_t layer = 0;           // whose input is steered; the number of layers: after the final norm
    TokenSet delimiters = {}, markers = {}, steer_at = {};
    std::optional<std::int32_t> think_start = {}, think_end = {};  // neither: thinking all the time
    std::size_t interval = 128;  // alpha changes where a step ends at a multiple of it
    float alpha0 = 1.25F, gamma = 0.02F, alpha_max = std::numeric_limits<float>::infinity();

    /// @throws config_error
    void check() const {
        using error::config_error;
        constexpr std::string_view where = "Steering";
        for (const auto& [name, value] : {std::pair{"alpha0", alpha0}, {"gamma", gamma}})
            detail::check<config_error>(is_finite(value) && value >= 0.0F, where, name, value,
                                        "a finite number, not negative");
        detail::check<config_error>(!is_nan(alpha_max) && alpha_max >= 0.0F, where, "alpha_max", alpha_max,
                                    "not negative");
        detail::check<config_error>(interval >= 1, where, "interval", interval, "at least 1");
        detail::check<config_error>(!delimiters.overlaps(markers), where, "markers", "a delimiter too",
                                    "tokens that end no sentence");
    }
    /// min(alpha_max, alpha0 + gamma * count), of `count` closed sentences with a marker.
    [[nodiscard]] float strength(std::size_t count) const noexcept {
        return std::min(alpha_max, alpha0 + gamma * static_cast<float>(count));
    }
    /// The state of a sequence without tokens. @throws config_error if the parameters are not legal.
    [[nodiscard]] State start() const {
        check();
        return {.alpha = strength(0), .thinking = !think_start.has_value()};
    }
    /// Tokens of a prompt before its last call: they are heard, not steered.
    void pass(State& state, std::span<const std::int32_t> tokens) const noexcept {
        for (const std::int32_t token : tokens) {
            ++state.seen;
            if (token == think_start) state.thinking = true;
            if (token == think_end) state.thinking = false;
            state.marked = state.marked || markers.contains(token);
            if (!delimiters.contains(token)) continue;
            state.non_execution += state.marked ? 1 : 0;
            state.marked = false;
        }
    }
    /// One step: a prompt, the last call of one, or decoded tokens. Changes the last row alone, if any.
    /// @param hidden  [c, D] at the input of the steered layer. @returns whether the last row was steered.
    /// @throws shape_error if there is no token or sizes differ; nothing changed.
    bool step(State& state, std::span<const std::int32_t> tokens, MatrixView<float> hidden) const {
        constexpr std::string_view where = "Steering::step";
        detail::check<error::shape_error>(!tokens.empty(), where, "tokens.size()", tokens.size(),
                                          "at least 1");
        detail::check_size(where, "hidden.rows", hidden.rows, tokens.size());
        detail::check_size(where, "hidden.cols", hidden.cols, vector.size());
        pass(state, tokens);
        const bool steers = state.thinking && steer_at.contains(tokens.back());
        const std::span<float> row = hidden[hidden.rows - 1];
        for (std::size_t c = 0; steers && c < row.size(); ++c) row[c] += state.alpha * vector[c];
        if (state.seen % interval == 0) state.alpha = strength(state.non_execution);
        return steers;
    }
};

}  // namespace kvcull::inline KVCULL_ABI
