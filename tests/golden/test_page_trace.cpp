// A recorded trace of page requests that is not this project's to ship: read where it lies beside the
// project.

#include <cstdint>
#include <filesystem>
#include <map>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "kvcull/base/safetensors.hpp"
#include "support/catch.hpp"

TEST_CASE("the recorded page trace holds what its metadata says", "[golden]") {
    const auto file = std::filesystem::path(KVCULL_SOURCE_DIR).parent_path() /
                      "shared/golden/guard/cloudphysics_20k.safetensors";
    if (!std::filesystem::exists(file))
        KVCULL_SKIP("../shared/golden/guard/cloudphysics_20k.safetensors is not there");
    const auto trace = kvcull::SafeTensors::read(file);
    const auto number = [&](const char* key) { return std::stoll(trace.metadata().at(key)); };
    const auto pages = trace.tensor("in.pages").to_vector<std::int32_t>();
    const auto next = trace.tensor("in.next").to_vector<std::int32_t>();
    REQUIRE(static_cast<long long>(pages.size()) == number("n"));
    REQUIRE(next.size() == pages.size());
    CHECK(std::accumulate(pages.begin(), pages.end(), 0LL) == number("pages_sum"));
    CHECK(static_cast<long long>(std::set(pages.begin(), pages.end()).size()) == number("distinct"));
    std::map<std::int32_t, std::size_t> later;  // page -> its next request
    for (std::size_t i = pages.size(); i-- > 0; later[pages[i]] = i)
        if (const auto found = later.find(pages[i]); found != later.end())
            REQUIRE(static_cast<std::size_t>(next[i]) == found->second);
}
