#pragma once
/// A long conversation in bounded memory: a cache per topic, one of them in fast memory (EpiCache).

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "../base/error.hpp"
#include "../select/cluster.hpp"
#include "block_prefill.hpp"
#include "byte_store.hpp"
#include "conversation.hpp"
#include "kv_cache.hpp"
#include "saved.hpp"

namespace kvcull::inline KVCULL_ABI {

struct EpisodeSettings {
    std::size_t episodes = 4;         // at most; fewer segments make fewer
    std::size_t representatives = 8;  // segments in an episode's prompt
    std::size_t block = 2048;         // tokens between evictions while building
    std::uint64_t seed = 42;
    std::size_t restarts = 10, max_iter = 300;
    Likeness route = Likeness::cosine;
    std::optional<double> tau = {};              // a query less like every episode opens a new one
    std::vector<std::int32_t> system = {};       // tokens at the start of every cache
    std::vector<std::int32_t> instruction = {};  // tokens at the start of every episode's prompt

    /// @throws config_error
    void check() const {
        constexpr std::string_view where = "EpisodeSettings";
        for (const auto& [what, value] :
             {std::pair{"episodes", episodes}, std::pair{"representatives", representatives},
              std::pair{"block", block}, std::pair{"restarts", restarts}, std::pair{"max_iter", max_iter}})
            detail::check<error::config_error>(value >= 1, where, what, value, "at least 1");
    }
};

/// Episodes of one conversation. The caller runs the model, here through `Model` (see CachedModel) and, for
/// questions, on `cache()`:
///
///     Episodes episodes(make_cache, model, store, settings);
///     episodes.build(history, segments);                  // once: clusters, and prefills a cache per
///     episode for (question ..) {
///         episodes.begin_turn(query_embedding);           // the nearest episode becomes resident
///         .. run the question and the answer on episodes.cache() ..
///         episodes.end_turn(tokens, segments);            // they stay; or cache().rollback(mark): they do
///         not
///     }
///
/// Exactly one episode is in fast memory. A resident episode that was added to is written back when another
/// one takes its place. Every call checks its arguments and reads what it needs before anything changes: if a
/// store or a model throws, the resident episode goes on as it was.
template <class Cache, class Model, ByteStore Store>
requires CachedModel<Model, Cache>
class Episodes {
  public:
    enum class Action : std::uint8_t { stayed, loaded, created };
    struct Turn {
        std::size_t episode = 0;
        double likeness = 0;  // the largest over the episodes there were; 0 if there were none
        Action action = Action::stayed;
        std::optional<std::size_t> written_back = {};
    };

    /// @param make  gives an empty cache: its shape, policy and budget are those of every episode. Caches
    /// that share a pool return their blocks to it. `model` and `store` must outlive this object.
    /// @throws config_error
    Episodes(std::function<Cache()> make, Model& model, Store& store, EpisodeSettings settings = {})
        : make_(std::move(make)), model_(&model), store_(&store), settings_(std::move(settings)) {
        settings_.check();
    }

    [[nodiscard]] std::size_t size() const noexcept { return episodes_.size(); }
    /// Plain mean of the members' unit embeddings; [D].
    [[nodiscard]] std::span<const double> centroid(std::size_t episode) const {
        return at("Episodes::centroid", episode).centroid;
    }
    /// Segments that the centroid stands for.
    [[nodiscard]] std::size_t members(std::size_t episode) const {
        return at("Episodes::members", episode).count;
    }
    /// Which episode is in fast memory.
    [[nodiscard]] std::optional<std::size_t> resident() const noexcept { return resident_; }
    /// The resident episode's cache: eviction is on hold, so what is appended stays until `end_turn`.
    /// @throws state_error if there is none
    [[nodiscard]] Cache& cache() const {
        detail::check<error::state_error>(cache_ != nullptr, "Episodes::cache", "resident episode", "none",
                                          "one: begin_turn first");
        return *cache_;
    }
    /// Tokens of an episode's prompt: the instruction, then its most central segments in conversation order.
    [[nodiscard]] std::vector<std::int32_t> prompt(std::size_t episode) const {
        const Episode& one = at("Episodes::prompt", episode);
        return prompt_of(one.members, one.centroid);
    }

    /// Clusters the history's segments and builds a cache for each episode, one after the other; none is
    /// resident afterwards. Memory: one cache of M_l + block rows per head and layer, and the prompt's own
    /// keys, which are the model's. @param history  all tokens but those of `system`.
    /// @throws state_error if there are episodes already; config_error that names a segment without a
    /// direction; whatever model or store throw. There are no episodes then.
    void build(std::span<const std::int32_t> history, std::span<const EpisodeSegment> segments) {
        begin("Episodes::build", history, segments);
        const Clustering clusters = k_means(points_, {.clusters = settings_.episodes,
                                                      .seed = settings_.seed,
                                                      .restarts = settings_.restarts,
                                                      .max_iter = settings_.max_iter});
        try {
            for (std::size_t e = 0; e < clusters.centroid.size(); ++e) {
                const auto mean = clusters.centroid[e];
                Episode episode{.centroid = {mean.begin(), mean.end()}, .members = clusters.members(e)};
                episode.count = episode.members.size();
                Cache cache = make_();
                prefill(cache, prompt_of(episode.members, episode.centroid), {});
                store_->put(e, bytes_of(cache, episode));
                episodes_.push_back(std::move(episode));
            }
        } catch (...) {
            episodes_.clear();
            throw;
        }
    }

    /// Takes over `count` episodes that the store holds, as another run left them there, with the history and
    /// the segments that they were built from. Segments of later turns are known to the centroids alone.
    /// @throws state_error if there are episodes already; config_error as `build`; format_error for bytes of
    /// something else or that no episodes leave behind; whatever the store throws. There are no episodes
    /// then.
    void reopen(std::span<const std::int32_t> history, std::span<const EpisodeSegment> segments,
                std::size_t count) {
        constexpr std::string_view where = "Episodes::reopen";
        begin(where, history, segments);
        try {
            const Cache cache = make_();
            for (std::size_t e = 0; e < count; ++e) {
                const std::vector<std::byte> bytes = store_->get(e);
                const SafeTensors file = open_saved(cache, bytes);
                Episode episode{.centroid = file.tensor("episode.centroid").to_vector<double>()};
                if (points_.dim() == 0) points_ = Points(episode.centroid.size());
                const auto stands_for = file.tensor("episode.count").to_vector<std::int64_t>();
                for (const std::int64_t i : file.tensor("episode.members").to_vector<std::int64_t>())
                    episode.members.push_back(static_cast<std::size_t>(i));
                episode.turns = file.tensor("episode.turns").to_vector<std::int32_t>();
                const auto what = detail::text("stored episode ", e);
                const auto& members = episode.members;
                detail::check<error::format_error>(episode.centroid.size() == points_.dim() &&
                                                       (members.empty() || members.back() < segments.size()),
                                                   where, what, "another conversation's",
                                                   "one of these segments");
                const bool whole =
                    stands_for.size() == 1 && std::cmp_greater_equal(stands_for[0], members.size()) &&
                    std::adjacent_find(members.begin(), members.end(), std::greater_equal<>{}) ==
                        members.end() &&
                    is_mean(episode.centroid);
                detail::check<error::format_error>(whole, where, what, "inconsistent",
                                                   "one that episodes leave behind");
                episode.count = static_cast<std::size_t>(stands_for[0]);
                episodes_.push_back(std::move(episode));
            }
        } catch (...) {
            episodes_.clear();
            throw;
        }
    }

    /// Finds the episode for a question and makes it resident. @param query  its embedding, of any length but
    /// 0
    /// @throws config_error for a query without a direction; state_error if there is no episode and none may
    /// be opened, or if the resident cache has tokens that no `end_turn` named
    Turn begin_turn(std::span<const float> query) {
        constexpr std::string_view where = "Episodes::begin_turn";
        const std::vector<double> unit = unit_query(where, query);
        check_settled(where);
        Turn turn;
        const std::vector<double> likeness = likeness_to_all(unit);
        if (!likeness.empty()) {
            const auto best = std::max_element(likeness.begin(), likeness.end());
            turn.likeness = *best;
            turn.episode = static_cast<std::size_t>(best - likeness.begin());
        }
        if (likeness.empty() || (settings_.tau && turn.likeness < *settings_.tau)) {
            turn.episode = size();
            turn.action = Action::created;
            create(unit, turn);
        } else if (resident_ != turn.episode) {
            turn.action = Action::loaded;
            bring(turn);
        }
        return turn;
    }

    /// The turn's tokens, which the cache has, stay with the episode; `segments` are cut from them. Refreshes
    /// the episode if it holds more than M_l + block rows per head. @returns whether it did.
    /// @throws state_error if the cache has other tokens; config_error that names a segment; the turn then
    /// does not count yet. What model or store throw at a refresh: the turn counts, and the episode is
    /// refreshed after the next one.
    bool end_turn(std::span<const std::int32_t> tokens, std::span<const EpisodeSegment> segments) {
        constexpr std::string_view where = "Episodes::end_turn";
        Cache& cache = this->cache();
        Episode& episode = episodes_[*resident_];
        detail::check<error::state_error>(cache.seen() == seen_ + tokens.size(), where,
                                          "number of tokens that the cache has seen", cache.seen(),
                                          seen_ + tokens.size());
        const Points units = units_of(where, segments, points_.dim());
        episode.turns.insert(episode.turns.end(), tokens.begin(), tokens.end());
        for (std::size_t i = 0; i < segments.size(); ++i) {
            episode.waiting.push_back(tokens_.size());
            tokens_.push_back(segments[i].tokens);
            points_.add(units[i]);
        }
        seen_ = cache.seen();
        dirty_ = dirty_ || !tokens.empty();
        if (!outgrown()) return false;
        refresh(episode);
        return true;
    }

    /// Writes the resident episode to the store if it was added to since.
    void write_back() {
        if (!dirty_) return;
        store_->put(*resident_, bytes_of(*cache_, episodes_[*resident_]));
        dirty_ = false;
    }

  private:
    struct Episode {
        std::vector<double> centroid;
        std::size_t count = 0;                  // segments that the centroid stands for
        std::vector<std::size_t> members = {};  // of them, those that are known; ascending
        std::vector<std::size_t> waiting = {};  // segments of turns since the last build
        std::vector<std::int32_t> turns = {};   // tokens of all turns
    };

    /// Whether a point can be a mean of unit vectors.
    [[nodiscard]] static bool is_mean(std::span<const double> point) noexcept {
        return !point.empty() && std::all_of(point.begin(), point.end(), [](double x) {
            return std::abs(x) < 1.001 && is_finite(static_cast<float>(x));
        });
    }
    /// Takes a history and its segments, if there are no episodes.
    void begin(std::string_view where, std::span<const std::int32_t> history,
               std::span<const EpisodeSegment> segments) {
        detail::check<error::state_error>(episodes_.empty(), where, "number of episodes", size(), 0);
        points_ = units_of(where, segments, segments.empty() ? 0 : segments[0].embedding.size());
        tokens_.clear();
        for (const EpisodeSegment& segment : segments) tokens_.push_back(segment.tokens);
        history_.assign(history.begin(), history.end());
        history_segments_ = segments.size();
    }
    [[nodiscard]] const Episode& at(std::string_view where, std::size_t episode) const {
        detail::check<error::shape_error>(episode < size(), where, "episode", episode,
                                          detail::text("below ", size()));
        return episodes_[episode];
    }
    [[nodiscard]] std::vector<double> unit_query(std::string_view where, std::span<const float> query) const {
        if (points_.dim() > 0) detail::check_size(where, "query.size()", query.size(), points_.dim());
        return unit_vector(query, where, "query");
    }
    /// Unit embeddings of segments, [K, dim].
    [[nodiscard]] static Points units_of(std::string_view where, std::span<const EpisodeSegment> segments,
                                         std::size_t dim) {
        Points units(dim);
        for (std::size_t i = 0; i < segments.size(); ++i) {
            detail::check_size(where, detail::text("segments[", i, "].embedding.size()"),
                               segments[i].embedding.size(), dim);
            units.add(unit_vector(segments[i].embedding, where, detail::text("embedding of segment ", i)));
        }
        return units;
    }
    [[nodiscard]] std::vector<double> likeness_to_all(std::span<const double> unit) const {
        Points centroids(points_.dim());
        for (const Episode& episode : episodes_) centroids.add(episode.centroid);
        return likeness_to(centroids, unit, settings_.route);
    }
    void check_settled(std::string_view where) const {
        if (cache_ != nullptr)
            detail::check<error::state_error>(cache_->seen() == seen_, where, "tokens of the resident cache",
                                              cache_->seen(),
                                              detail::text(seen_, ": end_turn or rollback first"));
    }

    [[nodiscard]] std::vector<std::int32_t> prompt_of(const std::vector<std::size_t>& members,
                                                      std::span<const double> centroid) const {
        auto best = nearest_members(points_, members, centroid, settings_.representatives);
        std::sort(best.begin(), best.end());
        std::vector<std::int32_t> prompt = settings_.instruction;
        for (const std::size_t i : best) prompt.insert(prompt.end(), tokens_[i].begin(), tokens_[i].end());
        return prompt;
    }
    /// The whole history and an episode's turns into an empty cache, which then only answers.
    void prefill(Cache& cache, std::vector<std::int32_t> prompt, std::span<const std::int32_t> turns) {
        std::vector<std::int32_t> all = settings_.system;
        all.insert(all.end(), history_.begin(), history_.end());
        all.insert(all.end(), turns.begin(), turns.end());
        FixedPrompt fixed{std::move(prompt)};
        block_prefill(cache, *model_, std::span<const std::int32_t>(all), settings_.block, fixed);
        cache.hold(true);
    }

    [[nodiscard]] std::vector<std::byte> bytes_of(const Cache& cache, const Episode& episode) const {
        const auto count = static_cast<std::int64_t>(episode.count);
        std::vector<std::int64_t> members;
        for (const std::size_t i : episode.members)
            if (i < history_segments_) members.push_back(static_cast<std::int64_t>(i));
        const auto tensor = []<class T>(std::string name, std::span<const T> numbers) {
            return Tensor::of(std::move(name), {numbers.size()}, numbers);
        };
        const Tensor extra[] = {tensor("episode.centroid", std::span<const double>(episode.centroid)),
                                tensor("episode.count", std::span<const std::int64_t>(&count, 1)),
                                tensor("episode.members", std::span<const std::int64_t>(members)),
                                tensor("episode.turns", std::span<const std::int32_t>(episode.turns))};
        return save(cache, extra);
    }
    /// An episode's bytes into `cache`. Those of another one, or of before its last turn, are refused.
    void read(Cache& cache, std::size_t e) const {
        const std::vector<std::byte> bytes = store_->get(e);
        const SafeTensors file = open_saved(cache, bytes);
        detail::check<error::format_error>(
            file.tensor("episode.centroid").to_vector<double>() == episodes_[e].centroid &&
                file.tensor("episode.turns").to_vector<std::int32_t>() == episodes_[e].turns,
            "Episodes", detail::text("stored episode ", e), "another one or an old copy",
            "the one with this centroid and these turns");
        load(cache, file);
        cache.hold(true);
    }

    /// Loads the turn's episode in place of the resident one.
    void bring(Turn& turn) {
        std::unique_ptr<Cache> fresh;
        if (cache_ == nullptr) fresh = std::make_unique<Cache>(make_());
        const auto leaving = dirty_ ? resident_ : std::nullopt;
        write_back();
        read(fresh ? *fresh : *cache_, turn.episode);
        turn.written_back = leaving;
        if (fresh) cache_ = std::move(fresh);
        settle(turn.episode);
    }
    /// A new episode about the query, with nothing but the system prompt in its cache.
    void create(const std::vector<double>& unit, Turn& turn) {
        constexpr std::string_view where = "Episodes::begin_turn";
        detail::check<error::state_error>(settings_.tau.has_value(), where, "number of episodes", 0,
                                          "at least 1, or a tau");
        auto fresh = std::make_unique<Cache>(make_());
        FixedPrompt prompt{settings_.instruction};
        block_prefill(*fresh, *model_, std::span<const std::int32_t>(settings_.system), settings_.block,
                      prompt);
        fresh->hold(true);
        episodes_.reserve(size() + 1);
        Episode episode{.centroid = unit};
        const auto leaving = dirty_ ? resident_ : std::nullopt;
        write_back();
        turn.written_back = leaving;
        if (points_.dim() == 0) points_ = Points(unit.size());
        episodes_.push_back(std::move(episode));
        cache_ = std::move(fresh);
        settle(turn.episode);
    }
    void settle(std::size_t episode) noexcept {
        resident_ = episode;
        seen_ = cache_->seen();
        dirty_ = false;
    }

    [[nodiscard]] bool outgrown() const {
        const CacheShape& shape = cache_->shape();
        std::size_t rows = 0, most = 0;
        for (std::size_t layer = 0; layer < shape.layers; ++layer)
            for (std::size_t h = 0; h < shape.kv_heads; ++h) {
                const std::size_t size = cache_->evictor().size(layer, h);
                if (size == unlimited) return false;
                rows += cache_->rows(layer, h);
                most += size;
            }
        return rows > most && (rows - most - 1) / shape.heads() >= settings_.block;  // no product wraps
    }
    /// Moves the centroid by the turns' segments and builds the cache anew. The old rows must go first, or
    /// memory would not be bounded: the store keeps them until the new ones are whole.
    void refresh(Episode& episode) {
        Episode next = episode;
        const std::size_t added = episode.waiting.size(), total = episode.count + added;
        for (std::size_t c = 0; added > 0 && c < next.centroid.size(); ++c) {
            double sum = static_cast<double>(episode.count) * episode.centroid[c];
            for (const std::size_t i : episode.waiting) sum += points_[i][c];
            next.centroid[c] = sum / static_cast<double>(total);
        }
        next.count = total;
        next.members.insert(next.members.end(), episode.waiting.begin(), episode.waiting.end());
        next.waiting.clear();
        std::vector<std::int32_t> prompt = prompt_of(next.members, next.centroid);
        if (prompt.empty()) {  // nobody gave it a segment: its newest tokens
            const std::size_t count = std::min(settings_.block, next.turns.size());
            prompt.assign(next.turns.end() - static_cast<std::ptrdiff_t>(count), next.turns.end());
        }
        write_back();
        const std::size_t e = *resident_;
        try {
            cache_.reset();
            cache_ = std::make_unique<Cache>(make_());
            prefill(*cache_, std::move(prompt), next.turns);
        } catch (...) {
            take_back(e);
            throw;
        }
        episode = std::move(next);
        settle(e);
        dirty_ = true;
    }
    /// The resident episode as the store has it; none is resident if that fails too.
    void take_back(std::size_t e) noexcept {
        cache_.reset();
        resident_.reset();
        try {
            auto again = std::make_unique<Cache>(make_());
            read(*again, e);
            cache_ = std::move(again);
            settle(e);
        } catch (...) {  // the store keeps the episode for the next turn
        }
    }

    std::function<Cache()> make_;
    Model* model_;
    Store* store_;
    EpisodeSettings settings_;
    Points points_;                                  // unit embeddings of all segments
    std::vector<std::vector<std::int32_t>> tokens_;  // of them
    std::vector<std::int32_t> history_;
    std::size_t history_segments_ = 0;
    std::vector<Episode> episodes_;
    std::unique_ptr<Cache> cache_;
    std::optional<std::size_t> resident_;
    std::size_t seen_ = 0;  // tokens of the resident cache that belong to the episode
    bool dirty_ = false;
};
template <class Make, class Model, class Store>
Episodes(Make, Model&, Store&, EpisodeSettings) -> Episodes<std::invoke_result_t<Make&>, Model, Store>;
template <class Make, class Model, class Store>
Episodes(Make, Model&, Store&) -> Episodes<std::invoke_result_t<Make&>, Model, Store>;

}  // namespace kvcull::inline KVCULL_ABI
