#pragma once
/// Sentences of a token stream: where they lie, what they are about, and which of them are said again later
/// (SkipKV).

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "../base/error.hpp"
#include "concepts.hpp"
#include "similarity.hpp"

namespace kvcull::inline KVCULL_ABI {

/// A set of token ids.
class TokenSet {
  public:
    TokenSet() = default;
    TokenSet(std::initializer_list<std::int32_t> ids) : TokenSet(std::vector(ids)) {}
    explicit TokenSet(std::vector<std::int32_t> ids) : ids_(std::move(ids)) {
        std::sort(ids_.begin(), ids_.end());
        ids_.erase(std::unique(ids_.begin(), ids_.end()), ids_.end());
    }
    /// "2+3+4", or nothing if it is not of this form.
    [[nodiscard]] static std::optional<TokenSet> parse(std::string_view text) {
        std::vector<std::int32_t> ids;
        while (!text.empty()) {
            std::int32_t id = 0;
            const auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), id);
            const auto used = static_cast<std::size_t>(end - text.data());
            if (code != std::errc{} || (used < text.size() && text[used] != '+') || used + 1 == text.size())
                return std::nullopt;
            ids.push_back(id);
            text.remove_prefix(std::min(used + 1, text.size()));
        }
        return TokenSet(std::move(ids));
    }

    [[nodiscard]] bool empty() const noexcept { return ids_.empty(); }
    [[nodiscard]] bool contains(std::int32_t id) const noexcept {
        return std::binary_search(ids_.begin(), ids_.end(), id);
    }
    [[nodiscard]] bool overlaps(const TokenSet& other) const noexcept {
        return std::any_of(ids_.begin(), ids_.end(), [&](std::int32_t id) { return other.contains(id); });
    }

  private:
    std::vector<std::int32_t> ids_;
};

/// How a stream falls into sentences, and when two of them are alike.
struct SentenceRules {
    TokenSet delimiters = {};             // end a sentence; none: there is never a whole one
    TokenSet markers = {};                // "Wait": make a sentence a second thought
    float tau = 0.95F;                    // cosine above which sentences are alike; from 1 on none are
    bool merge = true;                    // delimiters right after a sentence belong to it
    std::size_t min_sentence_tokens = 2;  // shorter ones are like no other

    static constexpr auto fields() {
        using R = SentenceRules;
        return std::tuple{Field{"delimiters", &R::delimiters}, Field{"markers", &R::markers},
                          Field{"tau", &R::tau}, Field{"merge", &R::merge},
                          Field{"min_sentence_tokens", &R::min_sentence_tokens}};
    }
    void check(std::string_view where) const {
        using error::config_error;
        detail::check<config_error>(is_finite(tau) && tau >= 0.0F, where, "tau", tau,
                                    "a finite number, not negative");
        detail::check<config_error>(min_sentence_tokens >= 1, where, "min_sentence_tokens",
                                    min_sentence_tokens, "at least 1");
        detail::check<config_error>(!delimiters.overlaps(markers), where, "markers", "a delimiter too",
                                    "tokens that end no sentence");
    }
};

struct Sentence {
    position_t begin = 0, end = 0;  // of its first and last token
    std::size_t count = 0;          // tokens
    float similarity = 0.0F;        // to the latest later sentence like it; 0: there is none
    position_t peer = -1;           // the last token of that one
    bool non_execution = false;     // holds a marker
    bool closed = false, scored = false;
    bool known = true;      // the hidden states of all its tokens were given
    bool embedded = false;  // scored, long enough and finite
};

/// A table of sentences as numbers, for saved caches.
struct SentenceNumbers {
    static constexpr std::size_t fields = 5;
    std::vector<std::int64_t> sentences = {};  // begin, end, count, peer, a bit per truth value; of each
    std::vector<float> similarity = {}, vectors = {};
    std::uint64_t dim = 0, left_non_execution = 0;
    bool pruned = false;

    [[nodiscard]] auto parts() noexcept {
        return std::tie(sentences, similarity, vectors, dim, left_non_execution, pruned);
    }
};

/// The sentences of one sequence, in order; all layers and heads share them. Depends on tokens and hidden
/// states alone, and after `prune` on which of them are still held. Memory: 4 D + 64 bytes per sentence,
/// where D is the size of a hidden state.
class SentenceTable {
  public:
    SentenceTable() = default;
    /// Sentences found elsewhere, in order; they have no embeddings.
    explicit SentenceTable(std::vector<Sentence> sentences) : sentences_(std::move(sentences)) {
        find_redundant();
    }

    [[nodiscard]] SentenceNumbers numbers() const {
        SentenceNumbers out{
            .vectors = vectors_, .dim = dim_, .left_non_execution = left_non_execution_, .pruned = pruned_};
        for (const Sentence& one : sentences_) {
            std::int64_t flags = 0;
            for (const bool flag : {one.embedded, one.known, one.scored, one.closed, one.non_execution})
                flags = 2 * flags + (flag ? 1 : 0);
            out.sentences.insert(out.sentences.end(),
                                 {one.begin, one.end, static_cast<std::int64_t>(one.count), one.peer, flags});
            out.similarity.push_back(one.similarity);
        }
        return out;
    }
    /// Nothing if the numbers are of no table: they contradict each other.
    [[nodiscard]] static std::optional<SentenceTable> from(const SentenceNumbers& numbers) {
        constexpr std::size_t fields = SentenceNumbers::fields;
        const std::size_t count = numbers.similarity.size();
        const bool fits = numbers.sentences.size() == fields * count &&
                          (count == 0 ? numbers.vectors.empty()
                                      : numbers.vectors.size() % count == 0 &&
                                            numbers.vectors.size() / count == numbers.dim);
        if (!fits) return std::nullopt;
        SentenceTable table;
        position_t next = 0;
        for (std::size_t i = 0; i < count; ++i) {
            const std::int64_t* const at = &numbers.sentences[fields * i];
            if (at[0] < next || at[1] < at[0] || at[2] < 1 || !is_finite(numbers.similarity[i]))
                return std::nullopt;
            next = at[1] + 1;
            table.sentences_.push_back({.begin = at[0],
                                        .end = at[1],
                                        .count = static_cast<std::size_t>(at[2]),
                                        .similarity = numbers.similarity[i],
                                        .peer = at[3],
                                        .non_execution = (at[4] & 1) != 0,
                                        .closed = (at[4] & 2) != 0,
                                        .scored = (at[4] & 4) != 0,
                                        .known = (at[4] & 8) != 0,
                                        .embedded = (at[4] & 16) != 0});
        }
        table.vectors_ = numbers.vectors;
        table.dim_ = static_cast<std::size_t>(numbers.dim);
        table.left_non_execution_ = static_cast<std::size_t>(numbers.left_non_execution);
        table.pruned_ = numbers.pruned;
        table.find_redundant();
        return table;
    }

    [[nodiscard]] std::span<const Sentence> sentences() const noexcept { return sentences_; }
    /// [D] unit mean of the sentence's hidden states; zeros if it has no embedding.
    [[nodiscard]] std::span<const float> embedding(std::size_t index) const noexcept {
        return {vectors_.data() + index * dim_, dim_};
    }
    /// Closed sentences that hold a marker; those that left count on, even if their tokens are taken back.
    [[nodiscard]] std::size_t non_execution_count() const noexcept {
        return left_non_execution_ + static_cast<std::size_t>(std::count_if(
                                         sentences_.begin(), sentences_.end(), [](const Sentence& one) {
                                             return one.closed && one.non_execution;
                                         }));
    }
    /// Tokens after the newest delimiter; 0 if there is no token.
    [[nodiscard]] std::size_t tokens_since_end() const noexcept {
        return sentences_.empty() || sentences_.back().closed ? 0 : sentences_.back().count;
    }
    /// Whether any sentence is said again later.
    [[nodiscard]] bool any_redundant() const noexcept { return redundant_; }
    /// Similarity of the sentence around a position, 0 outside all.
    [[nodiscard]] float similarity_at(position_t position) const noexcept {
        const std::size_t index = index_of(position);
        return index < sentences_.size() ? sentences_[index].similarity : 0.0F;
    }

    /// @throws shape_error if hidden states have another size than before.
    void check_hidden(std::string_view where, const MatrixView<const float>& hidden) const {
        if (dim_ != 0 && !hidden.empty()) detail::check_size(where, "inputs.hidden.cols", hidden.cols, dim_);
    }
    /// The next token. @param hidden  [D], or empty: its sentence will have no embedding. Cost: O(D).
    /// A position that was there already takes back all from there on: sentences that begin later go, the
    /// one around it opens again without an embedding.
    void feed(const SentenceRules& rules, position_t position, std::int32_t token,
              std::span<const float> hidden) {
        const bool torn = !sentences_.empty() && position <= sentences_.back().end && drop_from(position);
        const bool delimiter = rules.delimiters.contains(token);
        const bool last_open = !sentences_.empty() && !sentences_.back().closed;
        const bool extends = rules.merge && delimiter && !sentences_.empty() && !sentences_.back().scored;
        if (dim_ == 0) dim_ = hidden.size();
        if (!last_open && !extends) sentences_.push_back({.begin = position, .known = !torn});
        vectors_.resize(sentences_.size() * dim_);
        Sentence& one = sentences_.back();
        one.end = position;
        ++one.count;
        one.known = one.known && !hidden.empty();
        one.non_execution = one.non_execution || rules.markers.contains(token);
        one.closed = delimiter;
        float* const sum = vectors_.data() + vectors_.size() - dim_;
        for (std::size_t c = 0; c < hidden.size(); ++c) sum[c] += hidden[c];
    }
    /// Gives every closed sentence its embedding, and every sentence before it its similarity to it. Cost:
    /// new sentences x all x D.
    void score(const SentenceRules& rules, const simd::Kernels& kernels) {
        for (std::size_t j = 0; j < sentences_.size(); ++j) {
            if (sentences_[j].scored || !sentences_[j].closed) continue;
            embed(rules, kernels, j);
            if (sentences_[j].embedded && rules.tau < 1.0F) compare(rules, kernels, j);
        }
    }

    /// Sentences of which no head holds a row leave: whatever is said later, they decide nothing. Those that
    /// are not compared yet stay, and so does the last one. Cost: a binary search per row.
    void prune(CacheView cached) {
        if (cached.heads.empty() || sentences_.empty()) return;
        std::vector<std::uint8_t> stays(sentences_.size());
        for (std::size_t i = 0; i < stays.size(); ++i)
            stays[i] = !sentences_[i].scored || i + 1 == stays.size() ? 1 : 0;
        for (const HeadView& head : cached.heads)
            head.position.for_each_run([&](std::size_t /*first*/, std::span<const position_t> run) {
                for (const position_t& position : run)
                    if (const std::size_t i = index_of(position); i < stays.size()) stays[i] = 1;
            });
        std::size_t count = 0;
        for (std::size_t i = 0; i < stays.size(); ++i) {
            if (stays[i] == 0) {
                left_non_execution_ += sentences_[i].non_execution ? 1 : 0;
                continue;
            }
            sentences_[count] = sentences_[i];
            std::copy_n(vectors_.data() + i * dim_, dim_, vectors_.data() + count * dim_);
            ++count;
        }
        pruned_ = pruned_ || count < stays.size();
        sentences_.erase(sentences_.begin() + static_cast<std::ptrdiff_t>(count), sentences_.end());
        vectors_.resize(count * dim_);
        find_redundant();
    }

  private:
    /// Of the sentence around a position, or their number.
    [[nodiscard]] std::size_t index_of(position_t position) const noexcept {
        const auto after =
            std::upper_bound(sentences_.begin(), sentences_.end(), position,
                             [](position_t at, const Sentence& one) { return at < one.begin; });
        if (after == sentences_.begin() || position > std::prev(after)->end) return sentences_.size();
        return static_cast<std::size_t>(std::prev(after) - sentences_.begin());
    }
    /// The sum of hidden states becomes a unit vector, or zeros.
    void embed(const SentenceRules& rules, const simd::Kernels& kernels, std::size_t j) {
        Sentence& one = sentences_[j];
        one.scored = true;
        const std::span<float> vector(vectors_.data() + j * dim_, dim_);
        for (float& x : vector) x /= static_cast<float>(one.count);
        one.embedded = one.known && one.count >= rules.min_sentence_tokens && all_finite(vector);
        const float scale = one.embedded ? 1.0F / (euclidean_norm(kernels, vector) + 1e-8F) : 0.0F;
        for (float& x : vector) x = one.embedded ? x * scale : 0.0F;
    }
    void compare(const SentenceRules& rules, const simd::Kernels& kernels, std::size_t j) {
        constexpr std::size_t tile = 64;
        std::array<float, tile> cosines;
        for (std::size_t first = 0; first < j; first += tile) {
            const std::size_t count = std::min(tile, j - first);
            kernels.dots_f32(vectors_.data() + j * dim_, dim_, 1, vectors_.data() + first * dim_, dim_, count,
                             dim_, 1.0F, cosines.data(), tile);
            for (std::size_t i = 0; i < count; ++i) {
                const float similarity = std::min(1.0F, cosines[i]);
                if (!(similarity > rules.tau)) continue;
                sentences_[first + i].similarity = similarity;
                sentences_[first + i].peer = sentences_[j].end;
                redundant_ = true;
            }
        }
    }
    /// @returns whether the sentence around `position` may have left before.
    bool drop_from(position_t position) {
        while (!sentences_.empty() && sentences_.back().begin >= position) sentences_.pop_back();
        vectors_.resize(sentences_.size() * dim_);
        const bool torn = pruned_ && (sentences_.empty() || sentences_.back().end + 1 < position);
        if (!sentences_.empty() && sentences_.back().end >= position) {
            Sentence& cut = sentences_.back();
            cut.closed = cut.scored = cut.known = cut.embedded = false;
            cut.end = position - 1;
        }
        for (Sentence& one : sentences_)
            if (one.peer >= position) {
                one.similarity = 0.0F;
                one.peer = -1;
            }
        find_redundant();
        return torn;
    }
    void find_redundant() noexcept {
        redundant_ = std::any_of(sentences_.begin(), sentences_.end(),
                                 [](const Sentence& one) { return one.similarity > 0.0F; });
    }

    std::vector<Sentence> sentences_;
    std::vector<float> vectors_;  // [sentences, D]: sums of hidden states, from scoring on embeddings
    std::size_t dim_ = 0;
    std::size_t left_non_execution_ = 0;
    bool redundant_ = false, pruned_ = false;
};

}  // namespace kvcull::inline KVCULL_ABI
