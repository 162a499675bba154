#include "kvcull/base/safetensors_header.hpp"

#include "support/catch.hpp"

namespace {

using kvcull::ElementType;
using kvcull::detail::HeaderParser;
using kvcull::error::format_error;

HeaderParser parsed(const std::string& text) {
    HeaderParser parser("x", text);
    parser.parse();
    return parser;
}
std::string complaint(const std::string& text) {
    try {
        parsed(text);
        return "";
    } catch (const format_error& e) {
        return e.what();
    }
}
auto says(const std::string& text) {
    return contains_text(text);
}
/// A tensor whose `part` of the entry is replaced.
std::string tensor(const std::string& members) {
    return R"({"a":{)" + members + "}}";
}
/// A header whose only metadata value is the raw JSON string body `raw`.
std::string value(const std::string& raw) {
    return parsed(R"({"__metadata__":{"k":")" + raw + R"("}})").metadata.at("k");
}
std::string value_complaint(const std::string& raw) {
    return complaint(R"({"__metadata__":{"k":")" + raw + R"("}})");
}

const std::string good = R"("dtype":"F32","shape":[1,2],"data_offsets":[0,8])";

TEST_CASE("a header is read in any order of keys and with any JSON white space", "[base][property]") {
    const auto plain = parsed(tensor(good));
    REQUIRE(plain.entries.size() == 1);
    CHECK(plain.entries[0].name == "a");
    CHECK(plain.entries[0].dtype == ElementType::f32);
    CHECK(plain.entries[0].shape == std::vector<std::size_t>{1, 2});
    CHECK(plain.entries[0].begin == 0);
    CHECK(plain.entries[0].end == 8);
    CHECK(complaint(tensor(R"("data_offsets":[0,8],"dtype":"F32","shape":[1,2])")).empty());
    CHECK(complaint(
              "{ \"a\"\t: {\n\"dtype\" :\"F32\" ,\r \"shape\": [ 1 , 2 ],\"data_offsets\":[0 ,8 ] } }  \n")
              .empty());
    CHECK(complaint("{}").empty());
    CHECK(complaint("{ }").empty());
    CHECK(complaint(R"({"__metadata__":{}})").empty());
    CHECK(parsed(R"({"":{"dtype":"I8","shape":[],"data_offsets":[3,4]}})").entries[0].name.empty());
}

TEST_CASE("every element type is known by its name and size", "[base][property]") {
    for (const auto& [name, size] : kvcull::detail::element_types) {
        const auto header =
            parsed(tensor(R"("shape":[],"data_offsets":[0,0],"dtype":")" + std::string(name) + '"'));
        CHECK(kvcull::name_of(header.entries[0].dtype) == name);
        CHECK(kvcull::size_of(header.entries[0].dtype) == size);
    }
    CHECK(kvcull::element_type_of<float>() == ElementType::f32);
    CHECK(kvcull::element_type_of<long long>() == ElementType::i64);
    CHECK(kvcull::element_type_of<std::uint16_t>() == ElementType::u16);
    CHECK(kvcull::element_type_of<kvcull::bfloat16>() == ElementType::bf16);
    CHECK(kvcull::size_of(kvcull::element_type_of<kvcull::float16>()) == sizeof(kvcull::float16));
}

TEST_CASE("whatever is not the header's JSON is refused with a reason", "[base][contract]") {
    const auto [text, reason] = GENERATE(table<std::string, std::string>({
        {"", "does not begin with '{'"},
        {" {}", "does not begin with '{'"},
        {"[]", "does not begin with '{'"},
        {"{", "'\"' is missing"},
        {"{}x", "text after"},
        {"{}{}", "text after"},
        {"{,}", "'\"' is missing"},
        {tensor(good + ","), "'\"' is missing"},
        {R"({"a":{)" + good + "}", "'}' is missing"},
        {R"({"a" {)" + good + "}}", "':' is missing"},
        {R"({"a":1})", "'{' is missing"},
        {R"({"a":[]})", "'{' is missing"},
        {R"({a:{}})", "'\"' is missing"},
        {"{'a':{}}", "'\"' is missing"},
        {R"({"a":{}})", "is missing"},
        {R"({"__metadata__":{"k":1}})", "'\"' is missing"},
        {R"({"__metadata__":{"k":{}}})", "'\"' is missing"},
        {R"({"__metadata__":{"k":"1","k":"2"}})", "metadata key 'k' appears twice"},
        {R"({"__metadata__":{},"__metadata__":{}})", "'__metadata__' appears twice"},
        {R"({"__metadata__":{},"\u005f_metadata__":{}})", "'__metadata__' appears twice"},
        {tensor(R"("dtype":"F32","shape":[1])"), "is missing"},
        {tensor(R"("dtype":"F32","data_offsets":[0,4])"), "is missing"},
        {tensor(R"("shape":[1],"data_offsets":[0,4])"), "is missing"},
        {tensor(good + R"(,"dtype":"F32")"), "'dtype' appears twice"},
        {tensor(good + R"(,"shape":[])"), "'shape' appears twice"},
        {tensor(good + R"(,"data_offsets":[0,8])"), "'data_offsets' appears twice"},
        {tensor(good + R"(,"color":"red")"), "unknown key 'color'"},
        {tensor(R"("dtype":"f32","shape":[],"data_offsets":[0,4])"), "unknown dtype 'f32'"},
        {tensor(R"("dtype":1,"shape":[],"data_offsets":[0,4])"), "'\"' is missing"},
        {tensor(R"("dtype":"F32","shape":1,"data_offsets":[0,4])"), "'[' is missing"},
        {tensor(R"("dtype":"F32","shape":[1,],"data_offsets":[0,4])"), "non-negative integer"},
        {tensor(R"("dtype":"F32","shape":[1 2],"data_offsets":[0,4])"), "']' is missing"},
        {tensor(R"("dtype":"F32","shape":[[1]],"data_offsets":[0,4])"), "non-negative integer"},
        {tensor(R"("dtype":"F32","shape":[-1],"data_offsets":[0,4])"), "non-negative integer"},
        {tensor(R"("dtype":"F32","shape":[1.0],"data_offsets":[0,4])"), "']' is missing"},
        {tensor(R"("dtype":"F32","shape":[1e0],"data_offsets":[0,4])"), "']' is missing"},
        {tensor(R"("dtype":"F32","shape":[01],"data_offsets":[0,4])"), "begins with 0"},
        {tensor(R"("dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,4])"), "overflows"},
        {tensor(R"("dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,4])"), "overflows"},
        {tensor(R"("dtype":"F32","shape":[1],"data_offsets":[])"), "not [begin, end]"},
        {tensor(R"("dtype":"F32","shape":[1],"data_offsets":[0,4,8])"), "not [begin, end]"},
        {tensor(R"("dtype":"F32","shape":[1],"data_offsets":[4,0])"), "not [begin, end]"},
        {R"({"a)", "does not end"},
        {std::string("{\"a\0", 4), "control character"},
    }));
    CAPTURE(text);
    CHECK_THAT(complaint(text), says(reason) && says("header byte"));
}

TEST_CASE("the largest integer is read", "[base][property]") {
    CHECK(parsed(tensor(R"("dtype":"F32","shape":[18446744073709551615,0],"data_offsets":[0,0])"))
              .entries[0]
              .shape[0] == 18446744073709551615U);
}

TEST_CASE("nesting as deep as the file is long costs no stack", "[base][contract]") {
    CHECK_FALSE(complaint(R"({"a":)" + std::string(1'000'000, '{')).empty());
    CHECK_FALSE(complaint(R"({"a":{"shape":)" + std::string(1'000'000, '[')).empty());
}

TEST_CASE("string escapes are decoded", "[base][property]") {
    CHECK(value(R"(\"\\\/\b\f\n\r\t)") == "\"\\/\b\f\n\r\t");
    CHECK(value(R"(\u0041\u00e4\u20AC)") == "A\xC3\xA4\xE2\x82\xAC");
    CHECK(value(R"(\ud83d\ude00)") == "\xF0\x9F\x98\x80");
    CHECK(value(R"(\u0000)") == std::string(1, '\0'));
    CHECK(value("\xC3\xA4\xE2\x82\xAC\xF0\x9F\x98\x80") == "\xC3\xA4\xE2\x82\xAC\xF0\x9F\x98\x80");
}

TEST_CASE("malformed strings are refused", "[base][contract]") {
    CHECK_THAT(value_complaint(R"(\x)"), says("unknown escape"));
    CHECK_THAT(value_complaint(R"(\u12)"), says("four hexadecimal digits"));
    CHECK_THAT(value_complaint(R"(\u12g4)"), says("four hexadecimal digits"));
    CHECK_THAT(value_complaint(R"(\ud83d)"), says("surrogate"));
    CHECK_THAT(value_complaint(R"(\ud83dx)"), says("surrogate"));
    CHECK_THAT(value_complaint(R"(\ud83d\u0041)"), says("surrogate"));
    CHECK_THAT(value_complaint(R"(\ude00)"), says("surrogate"));
    CHECK_THAT(value_complaint("tab\t"), says("control character"));
    for (const char* bytes : {"\x80", "\xC3", "\xC0\x80", "\xE0\x80\x80", "\xED\xA0\x80", "\xF0\x80\x80\x80",
                              "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xFF", "\xE2\x82", "\xC3\x41"}) {
        CAPTURE(bytes);
        CHECK_THAT(value_complaint(bytes), says("not UTF-8"));
    }
    for (const char* cut : {R"({"a\)", R"({"a\u)", R"({"a\u00)", R"({"a\ud83d\)", R"({"a\ud83d\u)"})
        CHECK_FALSE(complaint(cut).empty());
}

TEST_CASE("what is quoted is read back", "[base][property]") {
    std::string all;
    for (char c = 0; c < 0x7F; ++c) all += c;
    all += "\xC3\xA4\xF0\x9F\x98\x80";
    std::string text = R"({"__metadata__":{"k":)";
    kvcull::detail::quote(text, all);
    CHECK(parsed(text + "}}").metadata.at("k") == all);
    CHECK_THROWS_AS(kvcull::detail::quote(text, "\xFF"), format_error);
}

}  // namespace
