#pragma once
/// From a conversation in words to segments with embeddings and tokens. Encoder and tokenizer are the
/// caller's.

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../base/error.hpp"
#include "../select/cluster.hpp"

namespace kvcull::inline KVCULL_ABI {

struct Utterance {
    std::string speaker, text;
};

/// A line per utterance: `<speaker> said, "<text>"`.
[[nodiscard]] inline std::string segment_text(std::span<const Utterance> utterances) {
    std::string text;
    for (const Utterance& one : utterances) text += one.speaker + " said, \"" + one.text + "\"\n";
    return text;
}

/// For logs of long answers: those of `speaker` with more than `longest` characters become an utterance per
/// sentence (after a run of . ! ? before a space or the end); pieces of `shortest` characters or fewer go.
[[nodiscard]] inline std::vector<Utterance> split_replies(std::span<const Utterance> utterances,
                                                          std::string_view speaker, std::size_t longest = 500,
                                                          std::size_t shortest = 10) {
    const auto characters = [](std::string_view text) {  // UTF-8: bytes that begin a character
        std::size_t count = 0;
        for (const char byte : text) count += (static_cast<unsigned char>(byte) & 0xC0U) != 0x80U ? 1 : 0;
        return count;
    };
    constexpr std::string_view ends = ".!?", space = " \t\r\n";
    std::vector<Utterance> pieces;
    for (const Utterance& one : utterances) {
        if (one.speaker != speaker || characters(one.text) <= longest) {
            pieces.push_back(one);
            continue;
        }
        const std::string_view text = one.text;
        for (std::size_t begin = text.find_first_not_of(space); begin < text.size();) {
            std::size_t end = begin;
            do {
                end = std::min(text.find_first_of(ends, end), text.size());
                end = std::min(text.find_first_not_of(ends, end), text.size());
            } while (end < text.size() && space.find(text[end]) == std::string_view::npos);
            const std::string_view piece = text.substr(begin, end - begin);
            if (characters(piece) > shortest) pieces.push_back({one.speaker, std::string(piece)});
            begin = text.find_first_not_of(space, end);
        }
    }
    return pieces;
}

/// What episodes are made of.
struct EpisodeSegment {
    std::vector<float> embedding;      // [D]
    std::vector<std::int32_t> tokens;  // of its text and a blank line: how it stands in a prompt
};

/// Encoders tuned by instructions phrase the two differently; both must live in one space. Embed a bare
/// question, not one wrapped in instructions.
template <class E>
concept Encoder = requires(E& encoder, const std::string& text) {
    { encoder.embed_segment(text) } -> std::convertible_to<std::vector<float>>;
    { encoder.embed_query(text) } -> std::convertible_to<std::vector<float>>;
};
template <class T>
concept Tokenizer = requires(T& tokenize, const std::string& text) {
    { tokenize(text) } -> std::convertible_to<std::vector<std::int32_t>>;
};

/// A segment per `window` utterances, embedded and tokenized. @throws config_error if `window` is 0
template <Encoder E, Tokenizer T>
[[nodiscard]] std::vector<EpisodeSegment> make_segments(std::span<const Utterance> utterances,
                                                        std::size_t window, E& encoder, T&& tokenize) {
    std::vector<EpisodeSegment> segments;
    for (const auto& [begin, end] : cut_segments(utterances.size(), window)) {
        const std::string text = segment_text(utterances.subspan(begin, end - begin));
        segments.push_back({encoder.embed_segment(text), tokenize(text + "\n")});
    }
    return segments;
}

}  // namespace kvcull::inline KVCULL_ABI
