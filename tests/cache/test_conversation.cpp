#include "kvcull/cache/conversation.hpp"

#include "support/catch.hpp"

using namespace kvcull;

namespace {

std::vector<std::string> pieces_of(const std::string& text, std::size_t longest, std::size_t shortest) {
    const Utterance one{"bot", text};
    std::vector<std::string> texts;
    for (const Utterance& piece : split_replies(std::span(&one, 1), "bot", longest, shortest)) {
        CHECK(piece.speaker == "bot");
        texts.push_back(piece.text);
    }
    return texts;
}

}  // namespace

TEST_CASE("a segment's text has a line per utterance, an empty one too", "[contract]") {
    const std::vector<Utterance> talk{{"Ann", "Hi."}, {"Bob", ""}};
    CHECK(segment_text(talk) == "Ann said, \"Hi.\"\nBob said, \"\"\n");
    CHECK(segment_text({}).empty());
}

TEST_CASE("only long replies of the one speaker are split, after runs of . ! ? before a space",
          "[contract]") {
    using Texts = std::vector<std::string>;
    CHECK(pieces_of("One two. Three?! Four 1.5 five. ", 10, 0) ==
          Texts{"One two.", "Three?!", "Four 1.5 five."});
    CHECK(pieces_of("One two. Three?! Four 1.5 five.", 31, 0) == Texts{"One two. Three?! Four 1.5 five."});
    CHECK(pieces_of("One two. Three?! Four 1.5 five.", 30, 8) == Texts{"Four 1.5 five."});
    CHECK(pieces_of("no end at all", 3, 0) == Texts{"no end at all"});
    CHECK(pieces_of("...!", 3, 0) == Texts{"...!"});
    CHECK(pieces_of("   \n ", 3, 0).empty());
    CHECK(pieces_of("\u00e4\u00f6\u00fc.", 4, 0) ==
          Texts{"\u00e4\u00f6\u00fc."});  // four characters are not too long
    CHECK(pieces_of("\u00e4\u00f6\u00fc. a", 4, 4).empty());
    const std::vector<Utterance> talk{{"Ann", "A long one. Of two."}, {"bot", "Short."}};
    CHECK(split_replies(talk, "bot", 10, 0).size() == 2);
}

TEST_CASE("segments are what encoder and tokenizer make of their text", "[contract]") {
    struct Length {
        static std::vector<float> embed_segment(const std::string& text) {
            return {static_cast<float>(text.size())};
        }
        static std::vector<float> embed_query(const std::string&) { return {0}; }
    } encoder;
    const auto tokenize = [](const std::string& text) {
        return std::vector<std::int32_t>(text.begin(), text.end());
    };
    const std::vector<Utterance> talk{{"a", "b"}, {"c", "d"}, {"e", "f"}};
    const auto segments = make_segments(talk, 2, encoder, tokenize);
    REQUIRE(segments.size() == 2);
    CHECK(segments[0].embedding == std::vector<float>{24});
    CHECK(std::string(segments[1].tokens.begin(), segments[1].tokens.end()) == "e said, \"f\"\n\n");
    CHECK(make_segments({}, 2, encoder, tokenize).empty());
    CHECK_THROWS_AS(make_segments(talk, 0, encoder, tokenize), error::config_error);
}
