#include "world.hpp"

#include <algorithm>
#include <array>
#include <iterator>
#include <kvcull/base/error.hpp>
#include <kvcull/base/memory.hpp>
#include <map>
#include <numeric>
#include <string>

namespace tiny_llama {
namespace {

using namespace word;

/// Words `first .. first + count - 1` of the vocabulary.
struct Words {
    int first, count;

    [[nodiscard]] bool holds(int token) const { return token >= first && token < first + count; }
};
constexpr Words topics{8, 16}, names{24, 128}, values{152, 128}, fillers{280, 168};
static_assert(fillers.first + fillers.count == world_vocabulary);

class Random {
  public:
    explicit Random(std::uint64_t seed) : next_{seed} {}
    double uniform() { return next_.uniform(); }
    bool chance(double probability) { return uniform() < probability; }
    /// Of `least .. most`.
    std::size_t between(std::size_t least, std::size_t most) {
        return least + static_cast<std::size_t>(uniform() * static_cast<double>(most - least + 1));
    }
    int of(const Words& words) { return words.first + static_cast<int>(uniform() * words.count); }
    template <class T>
    const T& of(const std::vector<T>& list) {
        return list[between(0, list.size() - 1)];
    }
    /// `count` of them, or all, in random order.
    std::vector<int> sample(std::vector<int> list, std::size_t count) {
        count = std::min(count, list.size());
        for (std::size_t i = 0; i < count; ++i) std::swap(list[i], list[between(i, list.size() - 1)]);
        list.resize(count);
        return list;
    }

  private:
    kvcull::SplitMix64 next_;
};

/// A document under construction. A name has one value in it.
class World {
  public:
    explicit World(Random& random) : random_(random), free_(static_cast<std::size_t>(names.count)) {
        std::iota(free_.begin(), free_.end(), names.first);
    }
    std::vector<int> tokens{begin_text};

    [[nodiscard]] bool knows() const { return !known_.empty(); }
    [[nodiscard]] int known_name() { return random_.of(known_); }
    /// A name of a topic that some fact was about.
    [[nodiscard]] const std::vector<int>& names_of_a_topic() {
        auto topic = by_topic_.begin();
        std::advance(topic, random_.between(0, by_topic_.size() - 1));
        return topic->second;
    }
    [[nodiscard]] const std::vector<int>& all_names() const { return known_; }
    [[nodiscard]] const std::map<int, std::vector<int>>& names_by_topic() const { return by_topic_; }
    [[nodiscard]] Question ask_for(int name) const { return {{ask, name}, {value_.at(name)}}; }
    [[nodiscard]] std::vector<Question> ask_for(const std::vector<int>& asked) const {
        std::vector<Question> questions;
        for (const int name : asked) questions.push_back(ask_for(name));
        return questions;
    }

    void fact(int topic) {
        if (free_.empty()) return;
        const std::size_t which = random_.between(0, free_.size() - 1);
        const int name = free_[which];
        free_.erase(free_.begin() + static_cast<std::ptrdiff_t>(which));
        known_.push_back(name);
        by_topic_[topic].push_back(name);
        add({topic, name, value_[name] = random_.of(values), stop});
    }
    void filler(int topic) {
        add({topic});
        for (std::size_t words = random_.between(2, 6); words > 0; --words) add({random_.of(fillers)});
        add({stop});
    }
    void restate(int name) { add({random_.chance(0.5) ? wait : so, name, value_[name], stop}); }
    void announce(int name) { add({ask, ask, name, stop}); }
    void question(int name) { add({ask, name, value_[name], stop}); }
    void add(std::initializer_list<int> sentence) { tokens.insert(tokens.end(), sentence); }

  private:
    Random& random_;
    std::vector<int> free_, known_;
    std::map<int, int> value_;
    std::map<int, std::vector<int>> by_topic_;
};

void write_thoughts(World& world, Random& random, std::size_t length, std::size_t end) {
    const int topic = random.of(topics);
    for (std::size_t facts = random.between(2, std::max<std::size_t>(3, length / 24)); facts > 0; --facts)
        world.fact(topic);
    world.add({word::think});
    while (world.tokens.size() < end) {
        const double what = random.uniform();
        if (what < 0.6)
            world.restate(world.known_name());
        else if (what < 0.8)
            world.filler(topic);
        else
            world.fact(topic);
    }
    world.add({end_think});
}
void write_topics(World& world, Random& random, double facts, std::size_t end) {
    while (world.tokens.size() < end) {
        const int topic = random.of(topics);
        for (std::size_t sentences = random.between(4, 14); sentences > 0; --sentences)
            random.chance(std::max(facts, 0.3)) ? world.fact(topic) : world.filler(topic);
    }
}
void write_needles(World& world, Random& random, double facts, std::size_t end) {
    int topic = random.of(topics);
    while (world.tokens.size() < end) {
        if (random.chance(0.3)) topic = random.of(topics);
        random.chance(facts) || !world.knows() ? world.fact(topic) : world.filler(topic);
        if (random.chance(0.15)) world.question(world.known_name());
    }
}

/// Facts among filler; the question is unknown when rows go.
Case make_needle(Random& random) {
    World world(random);
    int topic = random.of(topics);
    while (world.tokens.size() < 384) {
        if (random.chance(0.3)) topic = random.of(topics);
        random.chance(0.2) || !world.knows() ? world.fact(topic) : world.filler(topic);
    }
    return {world.tokens, {}, world.ask_for(random.sample(world.all_names(), 8))};
}
/// The same, but the prompt ends by announcing the question.
Case make_asked(Random& random) {
    Case made = make_needle(random);
    made.questions.resize(1);
    made.prompt.insert(made.prompt.end(), {ask, ask, made.questions[0].ask[1], stop});
    return made;
}
/// A short prompt, then thoughts that restate few of its facts again and again.
Case make_thoughts(Random& random) {
    World world(random);
    const int topic = random.of(topics);
    for (int facts = 0; facts < 16; ++facts) world.fact(topic);
    Case made{.prompt = world.tokens};
    world.add({word::think});
    const std::vector<int> loud = random.sample(world.all_names(), 5);
    while (world.tokens.size() < 420) {
        const double what = random.uniform();
        if (what < 0.55)
            world.restate(random.of(loud));
        else if (what < 0.65)
            world.restate(world.known_name());
        else
            world.filler(topic);
    }
    world.add({end_think});
    made.stream.assign(world.tokens.begin() + static_cast<std::ptrdiff_t>(made.prompt.size()),
                       world.tokens.end());
    made.questions = world.ask_for(random.sample(world.all_names(), 8));
    return made;
}
/// Segments about one topic each; topics come back.
Case make_topics(Random& random) {
    World world(random);
    std::vector<int> all(static_cast<std::size_t>(topics.count));
    std::iota(all.begin(), all.end(), topics.first);
    const std::vector<int> chosen = random.sample(all, 4);
    for (std::size_t segment = 0; segment < 12; ++segment) {
        const int topic = segment < chosen.size() ? chosen[segment] : random.of(chosen);
        for (int sentence = 0; sentence < 7; ++sentence)
            random.chance(0.4) ? world.fact(topic) : world.filler(topic);
    }
    Case made{.prompt = world.tokens};
    for (const auto& [topic, about] : world.names_by_topic())
        for (const int name : random.sample(about, 3)) made.questions.push_back(world.ask_for(name));
    return made;
}

}  // namespace

std::vector<int> world_document(std::uint64_t seed, std::size_t length) {
    Random random(seed);
    World world(random);
    const double facts = random.of(std::vector{0.1, 0.2, 0.4, 0.7});
    const auto body = static_cast<std::size_t>(static_cast<double>(length) * (0.6 + 0.3 * random.uniform()));
    const std::size_t kind = random.between(0, 3);
    if (kind == 0)
        write_thoughts(world, random, length, body);
    else if (kind == 1)
        write_topics(world, random, facts, body);
    else
        write_needles(world, random, facts, body);
    if (!world.knows()) world.fact(random.of(topics));
    while (world.tokens.size() < length) {
        const std::vector<int>& about = kind == 1 ? world.names_of_a_topic() : world.all_names();
        for (std::size_t questions = random.between(1, 4); questions > 0; --questions)
            random.chance(0.15) ? world.announce(random.of(about)) : world.question(random.of(about));
    }
    world.tokens.resize(length);
    return std::move(world.tokens);
}

std::vector<std::uint8_t> recalls(std::span<const int> tokens) {
    std::vector<std::uint8_t> all(tokens.size());
    for (std::size_t t = 1; t + 1 < tokens.size(); ++t) {
        const int before = tokens[t - 1];
        all[t] = (before == ask || before == wait || before == so) && names.holds(tokens[t]) &&
                 values.holds(tokens[t + 1]);
    }
    return all;
}

Task world_task(std::string_view name, std::uint64_t seed, std::size_t cases) {
    constexpr std::array make{make_asked, make_needle, make_thoughts, make_topics};
    static_assert(make.size() == world_tasks.size());
    const auto which = std::find(world_tasks.begin(), world_tasks.end(), name);
    kvcull::detail::check<kvcull::error::config_error>(which != world_tasks.end(), "world_task", "name", name,
                                                       "one of asked, needle, thoughts, topics");
    Task task{.name = std::string(name)};
    kvcull::SplitMix64 seeds{seed};
    for (std::size_t i = 0; i < cases; ++i) {
        Random random(seeds());
        task.cases.push_back(make[static_cast<std::size_t>(which - world_tasks.begin())](random));
    }
    return task;
}

}  // namespace tiny_llama
