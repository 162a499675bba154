#include "kvcull/cache/episodes.hpp"

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kvcull/policies.hpp"
#include "kvcull/select/layer_rules.hpp"
#include "support/catch.hpp"
#include "support/failure.hpp"
#include "support/talk.hpp"

using namespace kvcull;
using namespace kvcull::test;
using namespace kvcull::test::talk;

namespace {

/// A store that fails when its calls run out.
struct Store {
    MemoryBytes memory;
    std::size_t calls_left = static_cast<std::size_t>(-1), puts = 0, gets = 0;
    struct Failure : std::runtime_error {
        Failure() : std::runtime_error("the store fails") {}
    };

    void put(std::size_t key, std::span<const std::byte> bytes) {
        count();
        ++puts;
        memory.put(key, bytes);
    }
    std::vector<std::byte> get(std::size_t key) {
        count();
        ++gets;
        return memory.get(key);
    }
    void erase(std::size_t key) { memory.erase(key); }

  private:
    void count() {
        if (calls_left == 0) throw Failure();
        --calls_left;
    }
};

using Talk = TalkOver<Store>;

}  // namespace

TEST_CASE("an episode per topic is built, each as a block prefill with its own segments builds it",
          "[differential]") {
    Talk talk;
    CHECK(talk.episodes.size() == topics);
    CHECK(!talk.episodes.resident());
    CHECK(talk.store.memory.size() == topics);
    CHECK(talk.pool.bytes() == 0);
    CHECK(failure<error::state_error>([&] { (void)talk.episodes.cache(); }) ==
          "Episodes::cache: resident episode is none, want one: begin_turn first");
    for (std::size_t topic = 0; topic < topics; ++topic) {
        CHECK(talk.episodes.members(topic) == 4);
        FixedPrompt prompt{talk.episodes.prompt(topic)};
        CHECK(prompt.tokens.size() == 2 * run);
        CHECK(std::is_sorted(prompt.tokens.begin(), prompt.tokens.end()));
        for (const std::int32_t token : prompt.tokens)
            CHECK(token / topic_stride == static_cast<std::int32_t>(topic));
        const auto turn = talk.episodes.begin_turn(embedding(topic, 5));
        CHECK(turn.episode == topic);
        CHECK(turn.action == decltype(talk.episodes)::Action::loaded);
        CHECK(!turn.written_back);
        auto direct = talk.make()();
        block_prefill(direct, talk.model, std::span<const std::int32_t>(talk.history), block, prompt);
        direct.hold(true);
        CHECK(save(direct) == talk.bytes());
        CHECK(talk.episodes.begin_turn(embedding(topic, 6)).action ==
              decltype(talk.episodes)::Action::stayed);
    }
}

TEST_CASE("building and switching take no more memory than one cache of budget and block", "[property]") {
    Talk talk;
    std::size_t peak = talk.pool.peak_bytes();
    const std::size_t heads = talk.model.shape.heads(),
                      block_bytes = RowLayout{16, 16, DType::f32, 8}.block_bytes();
    CHECK(peak <= (heads * (budget + block) / 8 + 2 * heads) * block_bytes);
    for (std::size_t i = 0; i < 9; ++i) talk.say(i, 1000 * (i + 1), 5);
    CHECK(talk.pool.peak_bytes() == peak);
}

TEST_CASE("a turn stays with its episode, over switches too, and only what was added to is written back",
          "[property]") {
    Talk talk;
    const std::size_t built = talk.store.puts;
    talk.say(0, 1000, 4);
    talk.say(0, 2000, 4);
    CHECK(talk.store.puts == built);  // nobody else wanted to be resident
    const auto bytes = talk.bytes();
    const auto turn = talk.episodes.begin_turn(embedding(1, 3));
    CHECK(turn.written_back == std::optional<std::size_t>(0));
    CHECK(talk.store.puts == built + 1);
    talk.episodes.begin_turn(embedding(0, 3));
    CHECK(talk.store.puts == built + 1);  // episode 1 has not changed
    CHECK(talk.bytes() == bytes);
    const auto positions = talk.episodes.cache().positions(0, 0);
    CHECK(positions.back() == 247);
    talk.say(0, 3000, 1);
    talk.episodes.write_back();
    talk.episodes.write_back();
    CHECK(talk.store.puts == built + 2);
}

TEST_CASE("questions that are rolled back leave no trace", "[property]") {
    Talk talk;
    talk.episodes.begin_turn(embedding(2, 1));
    const auto before = talk.bytes();
    const Mark mark = talk.episodes.cache().mark();
    talk.model.forward(talk.episodes.cache(), std::vector<std::int32_t>{topic_token(2, 77)});
    CHECK(failure<error::state_error>([&] { talk.episodes.begin_turn(embedding(1, 1)); }) ==
          "Episodes::begin_turn: tokens of the resident cache is 241, want 240: end_turn or rollback first");
    CHECK(failure<error::state_error>([&] { talk.episodes.end_turn({}, {}); }) ==
          "Episodes::end_turn: number of tokens that the cache has seen is 241, want 240");
    talk.episodes.cache().rollback(mark);
    CHECK(talk.bytes() == before);
    CHECK(!talk.episodes.begin_turn(embedding(1, 1)).written_back);
    CHECK_THROWS_AS(talk.episodes.cache().rollback(mark), error::state_error);  // it was another episode's
}

TEST_CASE("an episode that outgrows budget and block is refreshed with its turns", "[property]") {
    Talk talk;
    const std::vector<double> centroid(talk.episodes.centroid(1).begin(), talk.episodes.centroid(1).end());
    talk.say(1, 1000, block - 1);
    CHECK(talk.episodes.members(1) == 4);
    talk.say(1, 2000, 1);
    CHECK(talk.episodes.members(1) == 4);  // budget + block rows per head: not more
    CHECK(std::equal(centroid.begin(), centroid.end(), talk.episodes.centroid(1).begin()));
    talk.say(1, 3000, 1);
    CHECK(talk.episodes.members(1) == 7);
    CHECK(talk.episodes.cache().rows(0, 0) + talk.episodes.cache().rows(0, 1) == 2 * budget);
    CHECK(talk.episodes.cache().seen() == 240 + block + 1);
    for (std::size_t c = 0; c < dim; ++c) {
        double sum = 4 * centroid[c];
        for (const std::size_t number : {1000U, 2000U, 3000U}) {
            const auto unit = unit_vector(embedding(1, number + 7), "test", "segment");
            sum += unit[c];
        }
        CHECK(std::abs(talk.episodes.centroid(1)[c] - sum / 7) < 1e-12);
    }
    FixedPrompt prompt{talk.episodes.prompt(1)};
    auto direct = talk.make()();
    auto all = talk.history;
    for (std::size_t i = 0; i < block - 1; ++i) all.push_back(topic_token(1, 1000 + i));
    for (const std::size_t number : {2000U, 3000U}) all.push_back(topic_token(1, number));
    block_prefill(direct, talk.model, std::span<const std::int32_t>(all), block, prompt);
    direct.hold(true);
    CHECK(save(direct) == talk.bytes());
    // It is not yet stored as it is now.
    CHECK(talk.episodes.begin_turn(embedding(0, 3)).written_back == std::optional<std::size_t>(1));
}

TEST_CASE("a question unlike every episode opens a new one, with the system prompt alone", "[property]") {
    EpisodeSettings with = settings();
    with.tau = 0.5;
    with.system = {topic_token(9, 1), topic_token(9, 2)};
    Talk talk(with);
    talk.say(0, 1000, 3);
    const auto turn = talk.episodes.begin_turn(embedding(4, 1));
    CHECK(turn.episode == topics);
    CHECK(turn.action == decltype(talk.episodes)::Action::created);
    CHECK(turn.likeness < 0.5);
    CHECK(turn.written_back == std::optional<std::size_t>(0));
    CHECK(talk.episodes.members(topics) == 0);
    CHECK(talk.episodes.cache().seen() == 2);
    talk.say(4, 2000, 2);
    CHECK(talk.episodes.size() == topics + 1);
    CHECK(talk.episodes.cache().seen() == 4);
    talk.say(0, 3000, 1);
    CHECK(talk.episodes.begin_turn(embedding(4, 5)).episode == topics);
    CHECK(talk.episodes.cache().seen() == 4);
}

TEST_CASE(
    "an episode without a segment is refreshed by its own tokens, and a block of any size is no sum that "
    "wraps",
    "[contract]") {
    EpisodeSettings with = settings();
    with.tau = 0.5;
    Talk talk(with);
    talk.episodes.begin_turn(embedding(4, 1));
    bool refreshed = false;
    for (std::size_t turn = 0; turn < 8; ++turn) {
        const std::vector<std::int32_t> tokens(block / 2, topic_token(4, turn));
        talk.model.forward(talk.episodes.cache(), tokens);
        refreshed = talk.episodes.end_turn(tokens, {}) || refreshed;
    }
    CHECK(refreshed);
    CHECK(talk.episodes.cache().rows(0, 0) + talk.episodes.cache().rows(0, 1) <= 2 * (budget + block));

    with.block = std::numeric_limits<std::size_t>::max();
    Talk whole(with);
    whole.say(1, 1000, 3 * block);
    CHECK(whole.episodes.members(1) == 4);  // not refreshed
}

TEST_CASE("without a history a question opens the first episode, if it may", "[contract]") {
    EpisodeSettings with = settings();
    Talk closed(with, false);
    closed.episodes.build({}, {});
    CHECK(closed.episodes.size() == 0);
    CHECK(failure<error::state_error>([&] { closed.episodes.begin_turn(embedding(0, 1)); }) ==
          "Episodes::begin_turn: number of episodes is 0, want at least 1, or a tau");
    with.tau = 0.5;
    Talk open(with, false);
    CHECK(open.episodes.begin_turn(embedding(0, 1)).action == decltype(open.episodes)::Action::created);
    CHECK(open.episodes.size() == 1);
}

TEST_CASE("one episode takes every question; fewer segments than episodes make one each", "[property]") {
    EpisodeSettings with = settings();
    with.episodes = 1;
    Talk talk(with);
    for (std::size_t topic = 0; topic < 5; ++topic)
        CHECK(talk.episodes.begin_turn(embedding(topic, 3)).episode == 0);
    with.episodes = 100;
    Talk many(with);
    CHECK(many.episodes.size() == many.segments.size());
    Talk one(with, false);
    one.episodes.build(one.history, std::span(one.segments).first(1));
    CHECK(one.episodes.size() == 1);
    CHECK(one.episodes.members(0) == 1);
}

TEST_CASE("whatever call of store or model fails, the conversation goes on as if it had been asked once",
          "[property]") {
    // Each turn is tried until it succeeds. A refresh that fails leaves the turn counted: it is asked for
    // again.
    struct Turn {
        std::size_t topic, number, count;
    };
    const std::vector<Turn> turns{{0, 1000, 3}, {1, 2000, 20}, {4, 2500, 2}, {0, 3000, 2}, {1, 4000, 10},
                                  {1, 5000, 2}, {2, 6000, 4},  {1, 7000, 3}, {4, 8000, 1}, {1, 9000, 30}};
    EpisodeSettings with = settings();
    with.tau = 0.5;
    with.system = {topic_token(9, 1)};
    const auto play = [&](bool of_store, std::size_t fail_at, std::size_t& failures) {
        auto talk = std::make_unique<Talk>(with);
        std::vector<float> outputs;
        (of_store ? talk->store.calls_left : talk->model.calls_left) = fail_at;
        const auto mend = [&] {
            ++failures;
            talk->store.calls_left = talk->model.calls_left = static_cast<std::size_t>(-1);
        };
        for (const Turn& turn : turns) {
            std::vector<std::int32_t> tokens;
            for (std::size_t i = 0; i < turn.count; ++i)
                tokens.push_back(topic_token(turn.topic, turn.number + i));
            const auto resident = talk->episodes.resident();
            const auto before = resident ? talk->bytes() : std::vector<std::byte>{};
            for (bool done = false; !done;) {
                try {
                    talk->episodes.begin_turn(embedding(turn.topic, turn.number));
                    done = true;
                } catch (const std::runtime_error&) {
                    mend();
                    REQUIRE(talk->episodes.resident() == resident);
                    if (resident) REQUIRE(talk->bytes() == before);
                }
            }
            try {
                talk->model.forward(talk->episodes.cache(), tokens);
            } catch (const TopicModel::Failure&) {
                mend();
                talk->model.forward(talk->episodes.cache(), tokens);
            }
            outputs.insert(outputs.end(), talk->model.last.begin(), talk->model.last.end());
            const EpisodeSegment own{embedding(turn.topic, turn.number + 7), tokens};
            const std::size_t seen = talk->episodes.cache().seen();
            try {
                talk->episodes.end_turn(tokens, std::span(&own, 1));
            } catch (const std::runtime_error&) {
                mend();
                REQUIRE(talk->episodes.cache().seen() == seen);
                REQUIRE(talk->episodes.end_turn({}, {}));
            }
        }
        const auto last = talk->bytes();
        for (const std::byte byte : last) outputs.push_back(static_cast<float>(byte));
        return outputs;
    };
    std::size_t none = 0;
    const auto wanted = play(true, static_cast<std::size_t>(-1), none);
    REQUIRE(none == 0);
    for (const bool of_store : {true, false}) {
        std::size_t failed = 0;
        for (std::size_t at = 0;; ++at) {
            std::size_t failures = 0;
            const auto got = play(of_store, at, failures);
            CAPTURE(of_store, at);
            REQUIRE(got == wanted);
            if (failures == 0) break;
            ++failed;
        }
        CHECK(failed > 15);
    }
}

TEST_CASE(
    "stored bytes that are missing, altered or another episode's are an error, and the resident goes on",
    "[contract]") {
    Talk talk;
    talk.episodes.begin_turn(embedding(0, 1));
    const auto before = talk.bytes();
    const auto refused = [&] {
        CHECK_THROWS_AS(talk.episodes.begin_turn(embedding(1, 1)), error::format_error);
        CHECK(talk.bytes() == before);
        CHECK(talk.episodes.resident() == std::optional<std::size_t>(0));
        CHECK(talk.episodes.begin_turn(embedding(0, 1)).action == decltype(talk.episodes)::Action::stayed);
    };
    const auto whole = talk.store.memory.get(1);
    talk.store.memory.put(1, talk.store.memory.get(2));
    refused();
    auto altered = whole;
    altered[altered.size() / 2] ^= std::byte{4};
    talk.store.memory.put(1, altered);
    refused();
    talk.store.memory.put(1, std::span(whole).first(whole.size() - 1));
    refused();
    talk.store.memory.put(1, {});
    refused();
    talk.store.memory.erase(1);
    CHECK_THROWS_AS(talk.episodes.begin_turn(embedding(1, 1)), error::state_error);
    CHECK(talk.bytes() == before);
    talk.store.memory.put(1, whole);
    CHECK(talk.episodes.begin_turn(embedding(1, 1)).episode == 1);
}

TEST_CASE("episodes that another run left in a store go on as they would have there", "[property]") {
    Talk first, second(settings(), false);
    first.say(1, 1000, 20);
    first.say(0, 2000, 3);
    first.episodes.write_back();
    second.store.memory = first.store.memory;
    second.episodes.reopen(second.history, second.segments, topics);
    for (std::size_t e = 0; e < topics; ++e) {
        CHECK(second.episodes.members(e) == first.episodes.members(e));
        CHECK(std::ranges::equal(second.episodes.centroid(e), first.episodes.centroid(e)));
        CHECK(second.episodes.prompt(e) == first.episodes.prompt(e));
    }
    CHECK(second.say(1, 3000, 2) == first.say(1, 3000, 2));
    CHECK(second.bytes() == first.bytes());

    Talk third(settings(), false);
    third.store.memory = first.store.memory;
    CHECK_THROWS_AS(third.episodes.reopen(third.history, std::span(third.segments).first(3), topics),
                    error::format_error);
    CHECK(third.episodes.size() == 0);
    CHECK_THROWS_AS(third.episodes.reopen(third.history, third.segments, topics + 1), error::state_error);
    CHECK(third.episodes.size() == 0);
    CHECK_NOTHROW(third.episodes.reopen(third.history, third.segments, topics));
}

TEST_CASE("a stored episode must make sense even if its checksum holds", "[contract]") {
    Talk first;
    const std::vector<std::byte> bytes = first.store.memory.get(1);
    const SafeTensors file(std::span<const std::byte>{bytes});
    /// Takes the place of the tensor of its name.
    const auto refusal = [&](const std::vector<Tensor>& others, bool segments = true) {
        std::vector<Tensor> tensors = file.tensors();
        for (Tensor& tensor : tensors)
            for (const Tensor& other : others)
                if (tensor.name == other.name) tensor = other;
        SafeTensors::Metadata metadata = file.metadata();
        metadata["checksum"] = detail::checksum(metadata, tensors);
        Talk talk(settings(), false);
        talk.store.memory.put(0, SafeTensors::serialize(metadata, tensors));
        if (!segments) talk.segments.clear();
        const auto words =
            failure<error::format_error>([&] { talk.episodes.reopen(talk.history, talk.segments, 1); });
        CHECK(talk.episodes.size() == 0);
        return words;
    };
    const auto tensor = []<class T>(const char* part, const std::vector<T>& numbers) {
        return Tensor::of<T>(std::string("episode.") + part, {numbers.size()}, numbers);
    };
    const std::string inconsistent =
                          "Episodes::reopen: stored episode 0 is inconsistent, want one that episodes leave "
                          "behind",
                      other =
                          "Episodes::reopen: stored episode 0 is another conversation's, want one of these "
                          "segments";
    using Counts = std::vector<std::int64_t>;
    for (const Counts& count : {Counts{3}, Counts{-1}, Counts{}, Counts{4, 4}}) {
        CAPTURE(count);
        CHECK(refusal({tensor("count", count)}) == inconsistent);
    }
    for (const Counts& members : {Counts{1, 1, 4, 7}, Counts{4, 1, 7, 10}, Counts{-1, 4, 7, 10}}) {
        CAPTURE(members);
        CHECK(refusal({tensor("members", members)}) == inconsistent);
    }
    for (const Counts& members : {Counts{1, 4, 7, 12}, Counts{1, 4, 7, -1}}) {
        CAPTURE(members);
        CHECK(refusal({tensor("members", members)}) == other);
    }
    std::vector<double> centroid = file.tensor("episode.centroid").to_vector<double>();
    for (const double wrong :
         {1e300, -1.01, static_cast<double>(quiet_nan()), static_cast<double>(positive_infinity())}) {
        centroid[2] = wrong;
        CAPTURE(wrong);
        CHECK(refusal({tensor("centroid", centroid)}) == inconsistent);
    }
    centroid.pop_back();
    CHECK(refusal({tensor("centroid", centroid)}) == other);
    centroid.clear();
    const Counts none;
    CHECK(refusal({tensor("centroid", centroid), tensor("members", none)}, false) == inconsistent);
}

TEST_CASE("embeddings without a direction are refused by name before anything changes", "[contract]") {
    Talk talk(settings(), false);
    for (const float bad : {0.0F, quiet_nan(), positive_infinity()}) {
        auto segments = talk.segments;
        std::fill(segments[3].embedding.begin(), segments[3].embedding.end(), bad);
        const auto words = failure<error::config_error>([&] { talk.episodes.build(talk.history, segments); });
        CHECK(words.starts_with("Episodes::build: embedding of segment 3 is "));
        CHECK(talk.episodes.size() == 0);
    }
    auto segments = talk.segments;
    segments[2].embedding.pop_back();
    CHECK(failure<error::shape_error>([&] { talk.episodes.build(talk.history, segments); }) ==
          "Episodes::build: segments[2].embedding.size() is 5, want 6");
    talk.episodes.build(talk.history, talk.segments);
    CHECK(failure<error::state_error>([&] { talk.episodes.build(talk.history, talk.segments); }) ==
          "Episodes::build: number of episodes is 3, want 0");
    CHECK(failure<error::config_error>([&] { talk.episodes.begin_turn(std::vector<float>(dim)); }) ==
          "Episodes::begin_turn: query is zero, want a vector with a direction");
    CHECK(failure<error::config_error>([&] {
              talk.episodes.begin_turn(std::vector<float>(dim, quiet_nan()));
          }) == "Episodes::begin_turn: query is not finite, want finite numbers");
    CHECK_THROWS_AS(talk.episodes.begin_turn(std::vector<float>(dim + 1, 1.0F)), error::shape_error);
    CHECK(!talk.episodes.resident());
    talk.episodes.begin_turn(embedding(0, 1));
    const EpisodeSegment bad{std::vector<float>(dim), {1}};
    const std::vector<std::int32_t> tokens{1};
    talk.model.forward(talk.episodes.cache(), tokens);
    CHECK_THROWS_AS(talk.episodes.end_turn(tokens, std::span(&bad, 1)), error::config_error);
    CHECK_NOTHROW(talk.episodes.end_turn(tokens, {}));
}

TEST_CASE("settings of nothing are refused by name", "[contract]") {
    const auto refusal = [](const EpisodeSettings& with) {
        return failure<error::config_error>([&] { with.check(); });
    };
    CHECK(refusal({.episodes = 0}) == "EpisodeSettings: episodes is 0, want at least 1");
    CHECK(refusal({.representatives = 0}) == "EpisodeSettings: representatives is 0, want at least 1");
    CHECK(refusal({.block = 0}) == "EpisodeSettings: block is 0, want at least 1");
    CHECK(refusal({.restarts = 0}) == "EpisodeSettings: restarts is 0, want at least 1");
    CHECK(refusal({.max_iter = 0}) == "EpisodeSettings: max_iter is 0, want at least 1");
    EpisodeSettings with = settings();
    with.block = 0;
    CHECK_THROWS_AS(Talk(with, false), error::config_error);
}

TEST_CASE("a build that fails leaves no episodes and can be tried again", "[contract]") {
    for (std::size_t at = 0; at < 3; ++at) {
        Talk talk(settings(), false);
        talk.store.calls_left = at;
        CHECK_THROWS_AS(talk.episodes.build(talk.history, talk.segments), Store::Failure);
        CHECK(talk.episodes.size() == 0);
        talk.store.calls_left = 100;
        talk.episodes.build(talk.history, talk.segments);
        CHECK(talk.episodes.size() == topics);
    }
}

TEST_CASE("full caches never outgrow anything", "[property]") {
    TopicModel model;
    MemoryBytes store;
    Episodes episodes([&] { return KVCache(model.shape, Full{}); }, model, store, settings());
    const auto history = topic_history(60, topics, run);
    episodes.build(history, segments_of(history));
    episodes.begin_turn(embedding(1, 1));
    const std::vector<std::int32_t> turn(100, topic_token(1, 5));
    model.forward(episodes.cache(), turn);
    CHECK(!episodes.end_turn(turn, {}));
    CHECK(episodes.cache().rows(0, 0) == 160);
}

TEST_CASE("layers of different sizes, one of them without a row, work like others", "[property]") {
    TopicModel model;
    model.shape.layers = 3;
    MemoryBytes store;
    const BySimilarity rule{.similarity = {1, 0.5F, 0.2F}, .weights = BySimilarity::Weights::paper};
    BlockPool pool;
    Episodes episodes([&] { return KVCache(model.shape, EpiCache{}, Budget{.tokens = budget}, pool, rule); },
                      model, store, settings());
    const auto history = topic_history(240, topics, run);
    episodes.build(history, segments_of(history));
    episodes.begin_turn(embedding(1, 1));
    CHECK(episodes.cache().rows(0, 0) + episodes.cache().rows(0, 1) == 0);
    CHECK(episodes.cache().rows(2, 0) + episodes.cache().rows(2, 1) > 2 * budget);
    model.forward(episodes.cache(), std::vector<std::int32_t>{topic_token(1, 999)});
    CHECK(std::all_of(model.last.begin(), model.last.end(), [](const float& x) { return is_finite(x); }));
}
