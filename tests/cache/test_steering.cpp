#include "kvcull/cache/steering.hpp"

#include <limits>
#include <vector>

#include "support/catch.hpp"
#include "support/failure.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

constexpr std::size_t dim = 3;
/// 2 ends a sentence, 4 too and steers, 5 is "Wait", 7 and 8 begin and end the thinking.
Steering steering() {
    return {.vector = {1.0F, -2.0F, 0.5F},
            .delimiters = {2, 4},
            .markers = {5},
            .steer_at = {4},
            .think_start = 7,
            .think_end = 8,
            .interval = 4,
            .alpha0 = 1.0F,
            .gamma = 0.25F};
}
/// Token by token; @returns how far along the vector every token was moved.
std::vector<float> strengths(const Steering& by, const std::vector<std::int32_t>& tokens) {
    Steering::State state = by.start();
    std::vector<float> all;
    for (const std::int32_t& token : tokens) {
        std::vector<float> row(dim);
        const bool steered = by.step(state, {&token, 1}, {row.data(), 1, dim});
        CHECK(steered == (row[0] > 0.0F));
        CHECK(row[1] == row[0] * -2.0F);
        all.push_back(row[0]);
    }
    return all;
}

}  // namespace

TEST_CASE("hidden states are steered at the named tokens inside the thinking span", "[property]") {
    CHECK(same_bits(strengths(steering(), {4, 10, 7, 4, 10, 4, 8, 4, 7, 4}),
                    std::vector<float>{0, 0, 0, 1, 0, 1, 0, 0, 0, 1}));
    Steering always = steering();
    always.think_start = always.think_end = std::nullopt;
    CHECK(same_bits(strengths(always, {4, 10, 4}), std::vector<float>{1, 0, 1}));
    // The token that begins or ends the span is already in or out of it.
    Steering edge = steering();
    edge.steer_at = {7, 8};
    CHECK(same_bits(strengths(edge, {7, 8}), std::vector<float>{1, 0}));
}

TEST_CASE("the strength grows with sentences that held a marker, after every interval, up to a limit",
          "[property]") {
    const std::vector<std::int32_t> doubts{7, 5, 4, 4, 4, 5, 5, 2, 4, 5, 4, 4, 4};
    CHECK(same_bits(strengths(steering(), doubts),
                    std::vector<float>{0, 0, 1, 1, 1.25F, 0, 0, 0, 1.5F, 0, 1.5F, 1.5F, 1.75F}));
    Steering limited = steering();
    limited.alpha_max = 1.4F;
    CHECK(same_bits(strengths(limited, doubts).back(), 1.4F));
    CHECK(same_bits(limited.start().alpha, 1.0F));
    limited.alpha_max = 0.5F;
    CHECK(same_bits(limited.start().alpha, 0.5F));
}

TEST_CASE("of a prompt only the last token is steered, however it is cut", "[property]") {
    const Steering by = steering();
    const std::vector<std::int32_t> prompt{7, 4, 5, 2, 5, 10, 10, 4};
    const std::vector<float> before = random_floats(prompt.size() * dim, 1);
    for (const std::size_t first : {0U, 1U, 3U, 7U}) {
        std::vector<float> rows = before;
        Steering::State state = by.start();
        by.pass(state, std::span(prompt).first(first));
        CHECK(by.step(state, std::span(prompt).subspan(first),
                      {rows.data() + first * dim, prompt.size() - first, dim}));
        CHECK(same_bits(std::span(rows).first(7 * dim), std::span(before).first(7 * dim)));
        for (std::size_t c = 0; c < dim; ++c)
            CHECK(same_bits(rows[7 * dim + c], before[7 * dim + c] + by.vector[c]));
        CHECK(state.seen == 8);
        CHECK(state.non_execution == 2);
        CHECK(same_bits(state.alpha, 1.5F));
    }
}

TEST_CASE("thoughts are told apart by their words", "[property]") {
    CHECK(classify_thought("So x is 4.") == Thought::execution);
    CHECK(classify_thought("") == Thought::execution);
    CHECK(classify_thought("WAIT, no") == Thought::reflection);
    CHECK(classify_thought("I wait for it") == Thought::execution);
    for (const char* text : {"let me VERIFY", "to make sure of it", "Hold on", "think again",
                             "that's correct", "it's incorrect", "Let me check", "which seems right"})
        CHECK(classify_thought(text) == Thought::reflection);
    CHECK(classify_thought("Alternatively, take 3") == Thought::transition);
    CHECK(classify_thought("or alternatively") == Thought::execution);
    CHECK(classify_thought("Alternatively, verify it") == Thought::reflection);
    for (const char* text : {"Think differently:", "another way", "another approach", "another method",
                             "Another solution", "another strategy", "another technique"})
        CHECK(classify_thought(text) == Thought::transition);
}

TEST_CASE("the vector leads from other thoughts to execution", "[property]") {
    const std::vector<float> hidden{1, 2, 3, /**/ 3, 2, 1, /**/ 0, 0, 6, /**/ 0, 2, 0};
    const std::vector<Thought> labels{Thought::execution, Thought::execution, Thought::reflection,
                                      Thought::transition};
    CHECK(same_bits(steering_vector({hidden.data(), 4, dim}, labels), std::vector<float>{2, 1, -1}));
    CHECK(failure<error::shape_error>([&] {
              (void)steering_vector({hidden.data(), 3, dim}, labels);
          }) == "steering_vector: labels.size() is 4, want 3");
    for (const std::size_t first : {0U, 2U})
        CHECK(failure<error::shape_error>([&] {
                  (void)steering_vector({hidden.data(), 2, dim}, std::span(labels).subspan(first, 2));
              }) == "steering_vector: labels is of one group only, want execution thoughts and others");
}

TEST_CASE("what cannot be steered is refused, and nothing has changed", "[contract]") {
    const Steering by = steering();
    Steering::State state = by.start();
    std::vector<float> row(4);
    const std::int32_t token = 4;
    CHECK(failure<error::shape_error>([&] {
              by.step(state, {}, {row.data(), 0, dim});
          }) == "Steering::step: tokens.size() is 0, want at least 1");
    CHECK(failure<error::shape_error>([&] {
              by.step(state, {&token, 1}, {row.data(), 2, 2});
          }) == "Steering::step: hidden.rows is 2, want 1");
    CHECK(failure<error::shape_error>([&] {
              by.step(state, {&token, 1}, {row.data(), 1, 4});
          }) == "Steering::step: hidden.cols is 4, want 3");
    CHECK(state.seen == 0);
    const auto refused = [](auto change) {
        Steering wrong = steering();
        change(wrong);
        return failure<error::config_error>([&] { (void)wrong.start(); });
    };
    const float nan = std::numeric_limits<float>::quiet_NaN();
    CHECK(refused([](Steering& s) { s.alpha0 = -1.0F; }) ==
          "Steering: alpha0 is -1.000000, want a finite number, not negative");
    CHECK(refused([&](Steering& s) { s.gamma = nan; }).starts_with("Steering: gamma is "));
    CHECK(refused([&](Steering& s) { s.alpha_max = nan; }).starts_with("Steering: alpha_max is "));
    CHECK(refused([](Steering& s) { s.alpha_max = -1.0F; }).starts_with("Steering: alpha_max is "));
    CHECK(refused([](Steering& s) { s.interval = 0; }) == "Steering: interval is 0, want at least 1");
    CHECK(refused([](Steering& s) { s.markers = {4}; }) ==
          "Steering: markers is a delimiter too, want tokens that end no sentence");
}
