#include "steering.hpp"

#include <algorithm>
#include <charconv>
#include <kvcull/base/safetensors.hpp>
#include <kvcull/cache/kv_cache.hpp>
#include <kvcull/policies/streaming.hpp>
#include <utility>

#include "json.hpp"

namespace tiny_llama {

void add_thoughts(const Llama& model, std::span<const int> prompt, const Thinking& how,
                  std::span<const std::string> words, std::size_t layer, Thoughts& thoughts) {
    std::vector<float> stops;  // [full stops among the thoughts, hidden size]
    Reader reader{model, [&](const LayerInput& at) {
                      if (at.layer != layer || at.tokens.back() != word::stop) return;
                      if (static_cast<std::size_t>(at.position) < prompt.size()) return;
                      const auto row = at.hidden[at.hidden.rows - 1];
                      stops.insert(stops.end(), row.begin(), row.end());
                  }};
    kvcull::KVCache cache(shape_of(model), kvcull::Full{});
    reader.read(prompt, cache);
    const std::vector<int> said = think(reader, cache, how);

    const std::size_t size = model.config().hidden;
    std::size_t stop = 0;
    for (auto begin = said.begin(); begin != said.end(); ++stop) {
        const auto end = std::find(begin, said.end(), int{word::stop});
        if (end == said.end()) break;  // it was cut off, or said nothing more
        std::string text;
        for (; begin != end; ++begin)
            text += (text.empty() ? "" : " ") + words[static_cast<std::size_t>(*begin)];
        ++begin;
        if (stop == 0) continue;
        const auto before = stops.begin() + static_cast<std::ptrdiff_t>((stop - 1) * size);
        thoughts.hidden.insert(thoughts.hidden.end(), before, before + static_cast<std::ptrdiff_t>(size));
        thoughts.labels.push_back(kvcull::classify_thought(text));
    }
}

void write_steering(const std::string& file, std::span<const float> vector, std::size_t layer) {
    const std::string stop = std::to_string(word::stop);
    kvcull::SafeTensors::write(file,
                               {{"layer", std::to_string(layer)},
                                {"delimiters", stop},
                                {"markers", std::to_string(word::wait)},
                                {"steer_at", stop},
                                {"think_start", std::to_string(word::think)},
                                {"think_end", std::to_string(word::end_think)}},
                               {{kvcull::Tensor::of("vector", {vector.size()}, vector)}});
}

kvcull::Steering read_steering(const std::string& path) {
    const auto file = kvcull::SafeTensors::read(path);
    const auto text = [&](const std::string& key) {
        const auto found = file.metadata().find(key);
        if (found == file.metadata().end()) fail(path, "'" + key + "' is missing");
        return found->second;
    };
    const auto number = [&]<class T>(const std::string& key, T value) {
        const std::string digits = text(key);
        const auto [end, code] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
        if (code != std::errc{} || end != digits.data() + digits.size())
            fail(path, "'" + key + "' is " + digits + ", want a number");
        return value;
    };
    const auto ids = [&](const std::string& key) {
        auto set = kvcull::TokenSet::parse(text(key));
        if (!set) fail(path, "'" + key + "' is " + text(key) + ", want ids: 2+3+4");
        return *std::move(set);
    };
    kvcull::Steering steering{.vector = file.tensor("vector").to_vector<float>(),
                              .layer = number("layer", std::size_t{}),
                              .delimiters = ids("delimiters"),
                              .markers = ids("markers"),
                              .steer_at = ids("steer_at"),
                              .think_start = number("think_start", std::int32_t{}),
                              .think_end = number("think_end", std::int32_t{})};
    if (steering.delimiters.overlaps(steering.markers))
        fail(path, "'markers' is " + text("markers") + ", want ids that end no sentence, as " +
                       text("delimiters") + " do");
    return steering;
}

Hook steer(const Llama& model, kvcull::Steering by, std::size_t prompt) {
    using kvcull::error::config_error;
    const Config& config = model.config();
    if (by.vector.size() != config.hidden)
        throw config_error("steer: the vector has " + std::to_string(by.vector.size()) +
                           " numbers, want the model's hidden size " + std::to_string(config.hidden));
    if (by.layer > config.layers)
        throw config_error("steer: the layer is " + std::to_string(by.layer) + ", want at most the model's " +
                           std::to_string(config.layers));
    kvcull::Steering::State state = by.start();
    return [by = std::move(by), state, prompt](const LayerInput& at) mutable {
        if (at.layer != by.layer) return;
        const bool more_prompt = static_cast<std::size_t>(at.position) + at.tokens.size() < prompt;
        if (more_prompt)
            by.pass(state, at.tokens);
        else
            by.step(state, at.tokens, at.hidden);
    };
}

}  // namespace tiny_llama
