#include "trace.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <fstream>
#include <kvcull/base/memory.hpp>
#include <kvcull/base/safetensors.hpp>
#include <kvcull/integrations/registry.hpp>
#include <string_view>
#include <tuple>
#include <unordered_set>
#include <utility>

namespace page {
namespace {

using kvcull::ElementType;
using kvcull::Field;
using kvcull::page_t;
using kvcull::SplitMix64;
using kvcull::Tensor;

[[noreturn]] void fail(const std::string& path, const std::string& what, const std::string& got,
                       const std::string& want) {
    throw kvcull::error::format_error(path + ": " + what + " is " + got + ", want " + want);
}

Pages read_text(const std::string& path) {
    std::ifstream in(path);
    if (!in) throw kvcull::error::format_error(path + ": cannot be opened");
    constexpr const char* blanks = " \t\r";
    Pages pages;
    std::size_t number = 0;
    for (std::string line; std::getline(in, line);) {
        ++number;
        const std::size_t begin = line.find_first_not_of(blanks);
        if (begin == std::string::npos || line[begin] == '#') continue;
        const std::string id = line.substr(begin, line.find_last_not_of(blanks) + 1 - begin);
        page_t page = 0;
        const auto [end, error] = std::from_chars(id.data(), id.data() + id.size(), page);
        if (error != std::errc() || end != id.data() + id.size())
            fail(path, "line " + std::to_string(number), "'" + id.substr(0, 40) + "'", "0 to 2^64 - 1");
        pages.push_back(page);
    }
    if (in.bad()) throw kvcull::error::format_error(path + ": cannot be read");
    return pages;
}

template <std::integral T>
Pages ids_of(const std::string& path, const Tensor& tensor) {
    const std::vector<T> ids = tensor.to_vector<T>();
    if constexpr (std::signed_integral<T>) {
        const auto negative = std::find_if(ids.begin(), ids.end(), [](T id) { return id < 0; });
        if (negative != ids.end())
            fail(path,
                 "number " + std::to_string(negative - ids.begin()) + " of tensor '" + tensor.name + "'",
                 std::to_string(*negative), "at least 0");
    }
    return {ids.begin(), ids.end()};
}

Pages read_tensor(const std::string& path) {
    const auto file = kvcull::SafeTensors::read(path);
    const Tensor& tensor = file.tensor(file.contains("in.pages") ? "in.pages" : "pages");
    switch (tensor.dtype) {
        case ElementType::i32:
            return ids_of<std::int32_t>(path, tensor);
        case ElementType::i64:
            return ids_of<std::int64_t>(path, tensor);
        case ElementType::u64:
            return ids_of<std::uint64_t>(path, tensor);
        default:
            fail(path, "dtype of tensor '" + tensor.name + "'", std::string(name_of(tensor.dtype)),
                 "I32, I64 or U64");
    }
}

/// What the made traces have in common.
struct Made {
    std::size_t pages = 4096, requests = 100'000;

    template <class NextPage>
    [[nodiscard]] Pages repeat(const NextPage& next) const {
        for (const auto& [what, count] : {std::pair{"pages", pages}, {"requests", requests}})
            kvcull::detail::check<kvcull::error::config_error>(count > 0, "make_trace", what, count,
                                                               "at least 1");
        Pages all(requests);
        std::generate(all.begin(), all.end(), next);
        return all;
    }
};

/// Page r - 1 is requested with a probability in proportion to r^-exponent.
struct Zipf : Made {
    static constexpr std::string_view name = "zipf";
    double exponent = 1;
    std::uint64_t seed = 0;

    static constexpr auto fields() {
        return std::tuple{Field{"pages", &Zipf::pages}, Field{"requests", &Zipf::requests},
                          Field{"exponent", &Zipf::exponent}, Field{"seed", &Zipf::seed}};
    }
    [[nodiscard]] Pages operator()() const {
        kvcull::detail::check<kvcull::error::config_error>(
            kvcull::is_finite(static_cast<float>(exponent)) && exponent >= 0, name, "exponent", exponent,
            "a number of at least 0");
        std::vector<double> up_to(pages);  // the distribution function, not yet divided by its last value
        double sum = 0;
        for (std::size_t i = 0; i < pages; ++i)
            up_to[i] = sum += std::pow(static_cast<double>(i + 1), -exponent);
        return repeat([&, random = SplitMix64{seed}]() mutable {
            const auto found = std::upper_bound(up_to.begin(), up_to.end() - 1, random.uniform() * sum);
            return static_cast<page_t>(found - up_to.begin());
        });
    }
};

/// 0, 1, .., pages - 1, and again.
struct Loop : Made {
    static constexpr std::string_view name = "loop";
    static constexpr auto fields() {
        return std::tuple{Field{"pages", &Loop::pages}, Field{"requests", &Loop::requests}};
    }
    [[nodiscard]] Pages operator()() const {
        return repeat([this, t = page_t{0}]() mutable { return t++ % pages; });
    }
};

struct Uniform : Made {
    static constexpr std::string_view name = "uniform";
    std::uint64_t seed = 0;

    static constexpr auto fields() {
        return std::tuple{Field{"pages", &Uniform::pages}, Field{"requests", &Uniform::requests},
                          Field{"seed", &Uniform::seed}};
    }
    [[nodiscard]] Pages operator()() const {
        return repeat([this, random = SplitMix64{seed}]() mutable {
            return static_cast<page_t>(random.uniform() * static_cast<double>(pages));
        });
    }
};

template <class T>
Pages make(std::string_view parameters) {
    return kvcull::parse_named<T>(parameters)();
}
struct Maker {
    std::string_view name;
    Pages (*make)(std::string_view parameters);
};
constexpr std::array makers{Maker{Zipf::name, make<Zipf>}, Maker{Loop::name, make<Loop>},
                            Maker{Uniform::name, make<Uniform>}};

}  // namespace

Pages read_trace(const std::string& path) {
    Pages pages = path.ends_with(".safetensors") ? read_tensor(path) : read_text(path);
    if (pages.empty()) fail(path, "number of requests", "0", "at least 1");
    return pages;
}

Pages make_trace(const std::string& text) {
    const std::string name = text.substr(0, text.find(':'));
    std::string known;
    for (const Maker& maker : makers) {
        if (maker.name == name)
            return maker.make(std::string_view(text).substr(std::min(text.size(), name.size() + 1)));
        known.append(known.empty() ? "" : ", ").append(maker.name);
    }
    throw kvcull::error::config_error("trace is \"" + name + "\", want one of " + known);
}

std::size_t count_distinct(std::span<const page_t> pages) {
    return std::unordered_set<page_t>(pages.begin(), pages.end()).size();
}

}  // namespace page
