#include "world.hpp"

#include <algorithm>
#include <array>
#include <kvcull/base/memory.hpp>
#include <map>
#include <numeric>
#include <span>

namespace tiny_llama {
namespace {

using namespace word;

/// Words `first .. first + count - 1` of the vocabulary.
struct Words {
    int first, count;
};
constexpr Words topics{8, 16}, names{24, 128}, values{152, 128}, fillers{280, 168};

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
    world.add({think});
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

}  // namespace tiny_llama
