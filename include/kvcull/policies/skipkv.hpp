#pragma once
/// SkipKV: sentences that are said again later leave first, whatever scores their tokens.

#include <array>
#include <optional>
#include <tuple>

#include "../score/concepts.hpp"
#include "../score/sentences.hpp"
#include "rkv.hpp"

namespace kvcull::inline KVCULL_ABI {

/// A base that leaves the choice to its scores.
template <class P>
concept SkipBase = Policy<P> && !decides_late<P> && !Selects<P>;
/// Has scores whose spread is of the order of 1 at most.
template <class P>
concept Bounded = P::bounded;

/// When a generating sequence evicts. interval: when the base does. newline: whenever a sentence ends.
enum class Trigger : std::uint8_t { interval, newline };
[[nodiscard]] constexpr auto names_of(Trigger /*any*/) noexcept {
    return std::array<std::string_view, 2>{"interval", "newline"};
}

/// SkipKV (arXiv 2512.07993), the part that stores less: from the scores of any base policy every token of a
/// sentence that is said again later loses the cosine of the two, in every layer and head. Sentences are cut
/// and compared as tokens and final hidden states come with `end_step`; without them it is the base alone.
/// Base parameters, state and triggers are the base's, but evictions wait for the end of the step.
/// State: a `SentenceTable` per sequence, of those sentences that some head still holds a row of. Cost: O(D)
/// per token; new sentences x all x D and O(n log sentences) per head whenever sentences are compared; the
/// latter again per eviction once any is redundant.
template <SkipBase Base = RKV>
struct SkipKV : Base {
    static constexpr std::string_view name = "skipkv";
    static constexpr bool nonnegative = false;
    using State = typename Base::State;
    using Sequence = SentenceTable;

    SentenceRules sentences = {};
    std::optional<std::size_t> compare_interval = {};  // default: the base's `interval`, 128 if it has none
    bool rescale =
        !Bounded<Base>;  // penalties grow with the spread of scores, so that they decide at any scale
    Trigger trigger = Trigger::interval;
    bool prune = true;  // forget sentences that are gone from all heads

    static constexpr auto fields() {
        return std::tuple_cat(Base::fields(), fields_of(&SkipKV::sentences),
                              std::tuple{Field{"compare_interval", &SkipKV::compare_interval},
                                         Field{"rescale", &SkipKV::rescale},
                                         Field{"trigger", &SkipKV::trigger}, Field{"prune", &SkipKV::prune}});
    }
    void check(std::size_t budget) const {
        if constexpr (Checked<Base>) Base::check(budget);
        sentences.check("SkipKV");
        detail::check<error::config_error>(interval_of_sentences() >= 1, "SkipKV", "compare_interval",
                                           interval_of_sentences(), "at least 1");
        detail::check<error::config_error>(trigger == Trigger::interval || !sentences.delimiters.empty(),
                                           "SkipKV", "delimiters", "none",
                                           "what ends a sentence, as the trigger is newline");
    }
    [[nodiscard]] constexpr bool due(const Moment& moment) const {
        const bool over = moment.rows > moment.budget && moment.rows - moment.budget > moment.slack;
        if (trigger == Trigger::newline && moment.phase == Phase::decode) return over;
        if constexpr (Triggered<Base>) return Base::due(moment);
        return over;
    }
    /// Whether a sentence ended in this call, if evictions wait for that. Without token ids every call is an
    /// end.
    [[nodiscard]] bool ready(const Sequence& sequence, const Moment& moment) const {
        return trigger == Trigger::interval || moment.phase != Phase::decode ||
               sequence.tokens_since_end() < moment.tokens;
    }

    /// Sentences are compared after every multiple of the interval, but not inside a prompt, which counts as
    /// one step.
    void end_step(Sequence& sequence, const StepInputs& inputs) const {
        sequence.check_hidden("SkipKV", inputs.hidden);
        const std::size_t every = interval_of_sentences();
        bool compared = false;
        for (std::size_t i = 0; i < inputs.tokens.size(); ++i) {
            sequence.feed(sentences, inputs.position(i), inputs.tokens[i],
                          inputs.hidden.empty() ? std::span<const float>{} : inputs.hidden[i]);
            if (inputs.phase == Phase::prompt || (inputs.seen + i + 1) % every != 0) continue;
            sequence.score(sentences, *inputs.kernels);
            compared = true;
        }
        if (compared && prune) sequence.prune(inputs.cached);
    }
    void end_prompt(Sequence& sequence, const StepInputs& inputs) const {
        if (inputs.seen % interval_of_sentences() == 0) sequence.score(sentences, *inputs.kernels);
    }
    void score(const State& state, const Sequence& sequence, const HeadStep& step,
               std::span<float> out) const {
        Base::score(state, step, out);
        if (!sequence.any_redundant()) return;
        const float unit = rescale ? unit_of(step, out) : 1.0F;
        step.cached.position.for_each_run([&](std::size_t first, std::span<const position_t> run) {
            for (std::size_t j = 0; j < run.size(); ++j)
                out[first + j] -= unit * sequence.similarity_at(run[j]);
        });
    }

  private:
    [[nodiscard]] constexpr std::size_t interval_of_sentences() const {
        if (compare_interval) return *compare_interval;
        if constexpr (requires { this->interval; })
            return this->interval;
        else
            return 128;
    }
    /// What a similarity of 1 takes away: more than lies between any two scores.
    [[nodiscard]] float unit_of(const HeadStep& step, std::span<const float> scores) const {
        float least = 0.0F, most = 0.0F;
        double sum = 0.0;
        step.kernels->summarise(scores.data(), scores.size(), &least, &most, &sum);
        const float spread = (most - least) / std::max(sentences.tau, 1e-3F);
        return is_finite(spread) ? std::max(spread, 1.0F) : 1.0F;
    }
};
static_assert(Policy<SkipKV<>> && SequenceState<SkipKV<>> && EndsPrompt<SkipKV<>> && Waits<SkipKV<>> &&
              Ordered<SkipKV<>> && FollowsLogits<SkipKV<>>);

}  // namespace kvcull::inline KVCULL_ABI
