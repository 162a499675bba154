#pragma once
/// EpiCache on a conversation: a task whose cases say where their segments lie.

#include <array>
#include <cstddef>
#include <cstdint>
#include <kvcull/cache/episodes.hpp>
#include <kvcull/policies/epicache.hpp>
#include <kvcull/score/concepts.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "evaluate.hpp"

namespace tiny_llama {

/// What a text becomes where the file brings no embeddings: its words, each by how often it is there and in
/// how few segments (tf-idf), or the mean of the model's input embeddings.
enum class Embedding : std::uint8_t { words, mean };
[[nodiscard]] constexpr auto names_of(Embedding /*any*/) noexcept {
    return std::array<std::string_view, 2>{"words", "mean"};
}

/// `epicache:episodes=4,block=64`: what a command line says of the method.
struct EpisodeMethod {
    static constexpr std::string_view name = "epicache";

    std::size_t episodes = 4, representatives = 8;
    std::size_t block = 64;  ///< tokens of the history between two evictions
    std::uint64_t seed = 42;
    kvcull::Likeness route = kvcull::Likeness::cosine;
    Embedding embedding = Embedding::words;
    kvcull::EpiCache policy = {};

    static constexpr auto fields() {
        using kvcull::Field;
        using kvcull::PartField;
        using E = EpisodeMethod;
        using P = kvcull::EpiCache;
        return std::tuple{Field{"episodes", &E::episodes},
                          Field{"representatives", &E::representatives},
                          Field{"block", &E::block},
                          Field{"seed", &E::seed},
                          Field{"route", &E::route},
                          Field{"embedding", &E::embedding},
                          PartField{"heads", &E::policy, &P::heads},
                          PartField{"sinks", &E::policy, &P::sinks},
                          PartField{"recent", &E::policy, &P::recent}};
    }
    [[nodiscard]] kvcull::EpisodeSettings settings() const {
        return {.episodes = episodes,
                .representatives = representatives,
                .block = block,
                .seed = seed,
                .route = route};
    }
};

/// The method if `policy` names it. @throws kvcull::error::config_error for an unknown key or value
[[nodiscard]] std::optional<EpisodeMethod> episode_method(const std::string& policy);

/// As `check` and `run_case` of evaluate.hpp: every question goes to the episode that routing finds.
/// @throws kvcull::error::config_error also for a case without segments
void check_conversation(const Llama& model, const EpisodeMethod& method, const Setting& setting,
                        std::size_t prompt_tokens);
[[nodiscard]] Outcome run_conversation(const Llama& model, const EpisodeMethod& method,
                                       const Setting& setting, const Case& example);

/// A question meets one cache after the other, all of one size but the last.
enum class Asked : std::size_t {
    routed,     ///< the episode that routing finds
    matched,    ///< the episode whose prompt names the question's topic most often
    wrong,      ///< every other episode
    single,     ///< one cache for all topics: its prompt is the most central segments of all
    infinipot,  ///< one cache, and the prompt asks for a summary
    kvzip,      ///< .. the prompt repeats the block
    snapkv,     ///< .. the end of the block once more
    oracle,     ///< .. the question itself
    keydiff,
    streaming,
    full,
};
inline constexpr std::array<std::string_view, 11> asked_names{
    "routed episode", "matched episode", "wrong episode", "one cache",    "InfiniPot", "KVzip",
    "SnapKV",         "oracle",          "KeyDiff",       "StreamingLLM", "full cache"};

/// Sums over questions.
struct Answers {
    double right = 0;
    double kept = 0;        ///< share of the question's attention to the history that lies on kept rows
    double topic_kept = 0;  ///< the same of its attention to the segments that name its topic
    std::size_t questions = 0;

    Answers& operator+=(const Answers& other) {
        right += other.right;
        kept += other.kept;
        topic_kept += other.topic_kept;
        questions += other.questions;
        return *this;
    }
};
struct EpisodeComparison {
    std::array<Answers, asked_names.size()> answers = {};  ///< by `Asked`
    std::size_t found = 0;                                 ///< questions whose routing finds their topic

    EpisodeComparison& operator+=(const EpisodeComparison& other);
    [[nodiscard]] Answers& operator[](Asked asked) { return answers[static_cast<std::size_t>(asked)]; }
    [[nodiscard]] const Answers& operator[](Asked asked) const {
        return answers[static_cast<std::size_t>(asked)];
    }
};

/// The method beside what it is compared with, in the same loop over blocks, on the first `cases` of a task.
/// Attention is that of a question's rows in the full cache, in all layers and heads.
[[nodiscard]] EpisodeComparison compare_episodes(const Llama& model, const EpisodeMethod& method,
                                                 const Setting& setting, const Task& task, std::size_t cases,
                                                 std::size_t threads);

}  // namespace tiny_llama
