#include "kvcull/train/documents.hpp"

#include <vector>

#include "support/catch.hpp"
#include "support/failure.hpp"

using namespace kvcull;
using namespace kvcull::test;
using train::TokenRange;

TEST_CASE("a run of equal numbers is a document", "[property]") {
    CHECK(train::documents_of({}).empty());
    const std::vector<std::int64_t> number{4, 4, 4, 0, 7, 7, 4};
    const auto documents = train::documents_of(number);
    REQUIRE(documents.size() == 4);
    CHECK((documents[0].begin == 0 && documents[0].end == 3));
    CHECK((documents[1].begin == 3 && documents[1].end == 4));
    CHECK((documents[3].begin == 6 && documents[3].end == 7));
    CHECK(documents[2].size() == 2);
    CHECK_NOTHROW(train::check_documents("test", documents, 7));
}

TEST_CASE("documents with holes, overlaps or no tokens are refused", "[contract]") {
    const auto text = [](const std::vector<TokenRange>& documents) {
        return failure<error::shape_error>([&] { train::check_documents("test", documents, 5); });
    };
    CHECK(text({{0, 2}, {3, 5}}) == "test: begin of a document is 3, want 2");
    CHECK(text({{0, 3}, {2, 5}}) == "test: begin of a document is 2, want 3");
    CHECK(text({{0, 0}, {0, 5}}) == "test: end of a document is 0, want beyond 0");
    CHECK(text({{0, 4}}) == "test: end of the last document is 4, want 5");
    CHECK(text({}) == "test: end of the last document is 0, want 5");
}
