#include "page/trace.hpp"

#include <algorithm>
#include <fstream>
#include <kvcull/base/error.hpp>
#include <kvcull/base/safetensors.hpp>

#include "folder.hpp"
#include "support/catch.hpp"

namespace {

using kvcull::SafeTensors;
using kvcull::Tensor;
using page::Pages;
using page::test::Folder;

Pages read_text(const std::string& text) {
    const Folder folder;
    std::ofstream(folder.file("t.txt")) << text;
    return page::read_trace(folder.file("t.txt"));
}
template <class T>
Pages read_tensor(const std::string& name, const std::vector<T>& ids) {
    const Folder folder;
    SafeTensors::write(folder.file("t.safetensors"), {}, std::vector{Tensor::of<T>(name, {ids.size()}, ids)});
    return page::read_trace(folder.file("t.safetensors"));
}
std::string complaint(const auto& action) {
    try {
        (void)action();
    } catch (const kvcull::error::exception& e) {
        return e.what();
    }
    return "nothing";
}

TEST_CASE("text is one id per line, of all 64 bits", "[page][contract]") {
    constexpr kvcull::page_t largest = ~kvcull::page_t{0};
    CHECK(read_text("# ids\n0\n18446744073709551615\n\n  7\t\r\n \r\n  # more\n007") ==
          Pages{0, largest, 7, 7});
}

TEST_CASE("what is no id is refused by its line", "[page][contract]") {
    const std::string bad =
        GENERATE("-1", "+1", "1.0", "0x10", "1 2", "1,2", "18446744073709551616", "1#", "a");
    const std::string got = complaint([&] { return read_text("# ids\n0\n\n" + bad + "\n5\n"); });
    CHECK_THAT(got, contains_text("t.txt: line 4 is '" + bad + "', want 0 to 2^64 - 1"));
}

TEST_CASE("a file without requests, and one that is not there, are refused", "[page][contract]") {
    CHECK_THAT(complaint([] { return read_text(""); }), contains_text("number of requests is 0"));
    CHECK_THAT(complaint([] { return read_text("# 1\n\n"); }), contains_text("number of requests is 0"));
    CHECK_THAT(complaint([] { return page::read_trace("/no/such/file"); }),
               contains_text("cannot be opened"));
    CHECK_THAT(complaint([] { return page::read_trace("/"); }), contains_text("cannot be read"));
}

TEST_CASE("safetensors have the ids as integers that are not negative", "[page][contract]") {
    CHECK(read_tensor<std::int32_t>("pages", {0, 2147483647}) == Pages{0, 2147483647});
    CHECK(read_tensor<std::int64_t>("in.pages", {5, 0}) == Pages{5, 0});
    CHECK(read_tensor<std::uint64_t>("pages", {~std::uint64_t{0}}) == Pages{~std::uint64_t{0}});
    CHECK_THAT(complaint([] {
                   return read_tensor<std::int32_t>("pages", {0, -1});
               }),
               contains_text("number 1 of tensor 'pages' is -1, want at least 0"));
    CHECK_THAT(complaint([] { return read_tensor<std::int64_t>("in.pages", {-5}); }),
               contains_text("number 0 of tensor 'in.pages' is -5"));
    CHECK_THAT(complaint([] { return read_tensor<float>("pages", {1}); }),
               contains_text("dtype of tensor 'pages' is F32, want I32, I64 or U64"));
    CHECK_THAT(complaint([] { return read_tensor<std::int32_t>("page", {1}); }), contains_text("'pages'"));
    CHECK_THAT(complaint([] { return read_tensor<std::int32_t>("pages", {}); }),
               contains_text("number of requests is 0"));
}

TEST_CASE("made traces have the shape they are named by", "[page][property]") {
    CHECK(page::make_trace("loop:pages=3,requests=7") == Pages{0, 1, 2, 0, 1, 2, 0});
    CHECK(page::make_trace("zipf:seed=3") == page::make_trace("zipf:seed=3"));
    CHECK(page::make_trace("zipf:seed=3") != page::make_trace("zipf:seed=4"));

    const auto share = [](const std::string& text, kvcull::page_t id) {
        const Pages pages = page::make_trace(text);
        CHECK(std::all_of(pages.begin(), pages.end(), [](auto page) { return page < 4; }));
        return static_cast<double>(std::count(pages.begin(), pages.end(), id)) /
               static_cast<double>(pages.size());
    };
    for (kvcull::page_t id = 0; id < 4; ++id) {
        const double rank = static_cast<double>(id) + 1;
        CAPTURE(id);  // four standard deviations of the share are below 0.007
        CHECK(share("zipf:pages=4", id) == Approx(12 / (25 * rank)).margin(0.007));
        CHECK(share("zipf:pages=4,exponent=2", id) == Approx(144 / (205 * rank * rank)).margin(0.007));
        CHECK(share("uniform:pages=4,seed=1", id) == Approx(0.25).margin(0.007));
    }
    CHECK(page::count_distinct(page::make_trace("zipf:pages=1,requests=9")) == 1);
}

TEST_CASE("what cannot be made is refused by what would do", "[page][contract]") {
    const auto refused = [](const char* text) { return complaint([&] { return page::make_trace(text); }); };
    CHECK_THAT(refused("gauss"), contains_text("\"gauss\", want one of zipf, loop, uniform"));
    CHECK_THAT(refused("zipf:size=1"), contains_text("want one of pages, requests, exponent, seed"));
    CHECK_THAT(refused("loop:seed=1"), contains_text("want one of pages, requests"));
    CHECK_THAT(refused("uniform:pages=-1"), contains_text("a whole number, not negative"));
    CHECK_THAT(refused("loop:pages=0"), contains_text("pages is 0, want at least 1"));
    CHECK_THAT(refused("zipf:requests=0"), contains_text("requests is 0, want at least 1"));
    for (const char* exponent : {"zipf:exponent=nan", "zipf:exponent=inf", "zipf:exponent=-1"})
        CHECK_THAT(refused(exponent), contains_text("want a number of at least 0"));
}

}  // namespace
