// A long conversation in small caches, one per topic: the question decides which of them answers.
//
// The model is a toy that attends by words in common: a token is a word, the key of a word is a fixed random
// vector, and so is its query. A real program calls its own model, encoder and tokenizer where this one does.
#include <cctype>
#include <cstdio>
#include <kvcull/kvcull.hpp>
#include <map>
#include <sstream>
#include <string>
#include <vector>

using Tokens = std::vector<std::int32_t>;

constexpr std::size_t word_dim = 64;
constexpr kvcull::CacheShape toy_shape{.layers = 1, .q_heads = 1, .kv_heads = 1, .head_dim = word_dim};

// A token per word, punctuation aside.
struct Tokenizer {
    std::vector<std::string> words;
    std::map<std::string, std::int32_t> ids;

    Tokens operator()(const std::string& text) {
        Tokens tokens;
        std::istringstream stream(text);
        for (std::string word; stream >> word;) {
            std::erase_if(word, [](char c) { return std::ispunct(static_cast<unsigned char>(c)) != 0; });
            const auto [found, fresh] = ids.try_emplace(word, static_cast<std::int32_t>(words.size()));
            if (fresh) words.push_back(word);
            tokens.push_back(found->second);
        }
        return tokens;
    }
};

std::vector<float> vector_of(std::int32_t word) {
    kvcull::SplitMix64 random{static_cast<std::uint64_t>(word) + 1};
    std::vector<float> row(word_dim);
    for (float& x : row) x = static_cast<float>(2.0 * random.uniform() - 1.0);
    return row;
}

// What the library asks of a model: run tokens through all layers, and probe with tokens that leave no trace.
struct Model {
    template <class Cache>
    void forward(Cache& cache, std::span<const std::int32_t> tokens) {
        run(tokens, [&](auto rows, auto out) {
            cache.append(0, rows, rows);
            cache.attend(0, rows, out);
        });
        cache.end_step();
    }
    template <class Cache>
    void probe(Cache& cache, std::span<const std::int32_t> tokens) {
        run(tokens, [&](auto rows, auto out) { cache.probe(0, rows, rows, rows, out); });
    }

  private:
    template <class Use>
    static void run(std::span<const std::int32_t> tokens, const Use& use) {
        std::vector<float> rows;
        for (const std::int32_t token : tokens) {
            const std::vector<float> row = vector_of(token);
            rows.insert(rows.end(), row.begin(), row.end());
        }
        std::vector<float> out(rows.size());
        use(kvcull::head_major<const float>(rows.data(), 1, tokens.size(), word_dim),
            kvcull::head_major(out.data(), 1, tokens.size(), word_dim));
    }
};

// No encoder at hand: the mean of word vectors.
struct Encoder {
    Tokenizer& tokenize;

    std::vector<float> embed_segment(const std::string& text) {
        std::vector<float> table, mean(word_dim);
        const Tokens tokens = tokenize(text);
        for (std::size_t id = 0; id < tokenize.words.size(); ++id) {
            const std::vector<float> row = vector_of(static_cast<std::int32_t>(id));
            table.insert(table.end(), row.begin(), row.end());
        }
        kvcull::mean_token_embedding({table.data(), tokenize.words.size(), word_dim, word_dim}, tokens, mean);
        return mean;
    }
    std::vector<float> embed_query(const std::string& text) { return embed_segment(text); }
};

int main() {
    std::vector<kvcull::Utterance> talk;
    const auto chat = [&](const std::string& about, const std::vector<std::string>& lines) {
        for (const std::string& line : lines) talk.push_back({"Ann", about + " " + line + " " + about});
    };
    for (int round = 0; round < 3; ++round) {
        chat("garden plant soil",
             {"tomato seeds in rows", "roses need sun", "water it early", "basil by the door"});
        chat("train ticket travel",
             {"leaves at nine", "two seats to Rome", "luggage rack is full", "platform four"});
        chat("guitar song band",
             {"new strings today", "chorus in minor", "drummer is late", "show on Friday"});
    }
    Tokenizer tokenize;
    Encoder encoder{tokenize};
    const auto segments = kvcull::make_segments(talk, 4, encoder, tokenize);
    const Tokens history = tokenize(kvcull::segment_text(talk));

    Model model;
    kvcull::MemoryBytes store;
    const auto make_cache = [] {
        return kvcull::KVCache(toy_shape, kvcull::EpiCache{}, kvcull::Budget{.tokens = 64});
    };
    kvcull::Episodes episodes(make_cache, model, store, {.episodes = 3, .block = 64});
    episodes.build(history, segments);
    std::printf("%zu tokens in %zu segments: %zu episodes of 64 rows\n", history.size(), segments.size(),
                episodes.size());

    const auto segment_of = [&](kvcull::position_t position) {
        std::size_t segment = 0, end = segments[0].tokens.size();
        while (static_cast<std::size_t>(position) >= end) end += segments[++segment].tokens.size();
        return segment;
    };
    for (const std::string question :
         {"which plant wants soil and sun", "when does the train leave for travel",
          "which song does the band play on guitar"}) {
        const auto turn = episodes.begin_turn(encoder.embed_query(question));
        std::map<std::size_t, int>
            kept;  // rows of the episode by the topic of the segment that they are from
        for (const kvcull::position_t position : episodes.cache().positions(0, 0))
            ++kept[segment_of(position) % 3];
        std::printf("%-40s episode %zu (%.2f), rows about garden %d, train %d, guitar %d\n", question.c_str(),
                    turn.episode, turn.likeness, kept[0], kept[1], kept[2]);
        const Tokens tokens = tokenize(question);
        const auto mark = episodes.cache().mark();
        model.forward(episodes.cache(), tokens);  // ... and decode the answer
        episodes.cache().rollback(mark);          // questions leave no trace here; end_turn(..) keeps them
    }
}
