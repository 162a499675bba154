// The runner must be able to fail: it is run on copies of every file that passes, each with one thing
// changed.

#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "kvcull/base/safetensors.hpp"
#include "support/catch.hpp"

namespace {

namespace fs = std::filesystem;
using kvcull::ElementType;
using kvcull::SafeTensors;
using kvcull::Tensor;

const fs::path shipped = fs::path(KVCULL_TESTS_DIR) / "data" / "golden";

/// A folder that goes away with the object.
class Folder {
  public:
    Folder() {
        std::string pattern = (fs::temp_directory_path() / "kvcull-golden-XXXXXX").string();
        REQUIRE(mkdtemp(pattern.data()) != nullptr);
        path_ = pattern;
    }
    Folder(const Folder&) = delete;
    Folder& operator=(const Folder&) = delete;
    ~Folder() {
        std::error_code ignored;
        fs::remove_all(path_, ignored);
    }
    [[nodiscard]] fs::path operator/(const std::string& name) const { return path_ / name; }
    [[nodiscard]] std::string text() const { return path_.string(); }

  private:
    fs::path path_;
};

struct Report {
    int status = -1;
    std::map<std::string, std::string> lines;  // by path
    std::string last;

    [[nodiscard]] std::size_t count(const std::string& verdict) const {
        return static_cast<std::size_t>(std::count_if(lines.begin(), lines.end(), [&](const auto& line) {
            return line.second.starts_with(verdict + " ");
        }));
    }
};

Report run(const std::string& arguments) {
    const Folder folder;
    const std::string output = (folder / "output").string();
    const int status =
        std::system((KVCULL_GOLDEN_RUNNER " " + arguments + " > " + output + " 2> /dev/null").c_str());
    Report report{.status = WIFEXITED(status) ? WEXITSTATUS(status) : -1, .lines = {}, .last = {}};
    std::ifstream file(output);
    for (std::string line; std::getline(file, line); report.last = line) {
        const std::size_t begin = line.find('/'), end = line.find(".safetensors");
        if (begin != std::string::npos && end != std::string::npos)
            report.lines[line.substr(begin, end - begin)] = line;
    }
    return report;
}

/// A file in memory whose parts can be changed before it is written again.
struct Editable {
    SafeTensors::Metadata metadata;
    std::vector<Tensor> tensors;
    std::vector<std::vector<std::byte>> bytes;

    explicit Editable(const fs::path& path) {
        const SafeTensors file = SafeTensors::read(path.string());
        metadata = file.metadata();
        tensors = file.tensors();
        for (const Tensor& tensor : tensors) bytes.emplace_back(tensor.bytes.begin(), tensor.bytes.end());
    }
    void write(const fs::path& path) {
        for (std::size_t i = 0; i < tensors.size(); ++i) tensors[i].bytes = bytes[i];
        SafeTensors::write(path.string(), metadata, tensors);
    }
    /// Largest magnitude of a tensor of floats: tolerances may be relative to it.
    [[nodiscard]] float largest(std::size_t tensor) const {
        std::vector<float> values(bytes[tensor].size() / sizeof(float));
        std::memcpy(values.data(), bytes[tensor].data(), bytes[tensor].size());
        float largest = 0;
        for (const float x : values) largest = std::max(largest, std::abs(x));
        return largest;
    }
    template <class T, class Change>
    void change(std::size_t tensor, std::size_t index, const Change& change) {
        T value{};
        std::memcpy(&value, bytes[tensor].data() + index * sizeof(T), sizeof(T));
        value = change(value);
        std::memcpy(bytes[tensor].data() + index * sizeof(T), &value, sizeof(T));
    }
};

/// Shipped files of the methods that exist.
const std::vector<fs::path>& passing() {
    static const std::vector<fs::path> paths = [] {
        std::vector<fs::path> found;
        for (const auto& [path, line] : run("\"" + shipped.string() + "\"").lines)
            if (line.starts_with("pass ")) found.emplace_back(path + ".safetensors");
        return found;
    }();
    return paths;
}
fs::path passing_of(const std::string& method, const std::string& kind) {
    for (const fs::path& path : passing()) {
        const auto metadata = SafeTensors::read(path.string()).metadata();
        if (metadata.at("method") == method && metadata.at("kind") == kind) return path;
    }
    FAIL("no file of " << method << " " << kind);
    return {};
}

}  // namespace

TEST_CASE("every shipped golden file passes or waits for its method", "[golden]") {
    const Report report = run("\"" + shipped.string() + "\"");
    CHECK(report.status == 0);
    CHECK(report.count("FAIL") == 0);
    CHECK(report.count("pass") + report.count("not yet") == report.lines.size());
    CHECK(report.count("pass") >= 10);
    CHECK(report.last.starts_with(std::to_string(report.lines.size()) + " files, "));
    CHECK(report.last.ends_with(" checks, 0 failed"));
}

TEST_CASE("one changed number of any output makes the runner fail", "[golden][contract]") {
    for (const fs::path& path : passing()) {
        Folder folder;
        std::size_t copies = 0;
        const Editable original(path);
        const auto copy = [&](std::size_t tensor, std::size_t index, const std::string& how, auto&& change) {
            Editable edited = original;
            change(edited);
            edited.write(folder / (original.tensors[tensor].name + "-" + std::to_string(index) + how +
                                   ".safetensors"));
            ++copies;
        };
        for (std::size_t i = 0; i < original.tensors.size(); ++i) {
            const Tensor& tensor = original.tensors[i];
            if (!tensor.name.starts_with("out.")) continue;
            const std::size_t size = tensor.size();
            REQUIRE(size > 0);
            const bool copied =
                original.metadata.at("kind") == "evict" && (tensor.name == "out.k" || tensor.name == "out.v");
            const float largest = tensor.dtype == ElementType::f32 ? original.largest(i) : 0.0F;
            for (const std::size_t index : std::set<std::size_t>{0, size / 2, size - 1}) {
                const auto next = [&]<class T>(T) {
                    copy(i, index, "", [&](Editable& edited) {
                        edited.change<T>(i, index, [](T x) { return static_cast<T>(x + 1); });
                    });
                };
                switch (tensor.dtype) {
                    case ElementType::i64:
                        next(std::int64_t{});
                        continue;
                    case ElementType::i32:
                        next(std::int32_t{});
                        continue;
                    case ElementType::u8:
                        next(std::uint8_t{});
                        continue;
                    case ElementType::f64:
                        copy(i, index, "", [&](Editable& edited) {
                            edited.change<double>(i, index, [](double x) { return x + 2e-9 * std::abs(x); });
                        });
                        continue;
                    default:
                        REQUIRE(tensor.dtype == ElementType::f32);
                }
                copy(i, index, "", [&](Editable& edited) {
                    edited.change<float>(
                        i, index, [&](float x) { return x + 2e-3F + 2e-3F * std::abs(x) + 2e-6F * largest; });
                });
                if (copied)
                    copy(i, index, "-bit", [&](Editable& edited) {
                        edited.change<std::uint32_t>(i, index, [](std::uint32_t x) { return x ^ 1U; });
                    });
            }
        }
        const Report report = run(folder.text());
        CAPTURE(path.string(), copies);
        CHECK(report.status == 1);
        CHECK(report.lines.size() == copies);
        CHECK(report.last.ends_with(" " + std::to_string(copies) + " failed"));
        for (const auto& [name, line] : report.lines) {
            CAPTURE(line);
            const std::string tensor = fs::path(name).filename().string();
            CHECK(line.starts_with("FAIL "));
            CHECK(line.find(": " + tensor.substr(0, tensor.find('-')) + "[") != std::string::npos);
        }
    }
}

TEST_CASE("an output that nothing computes and one that is missing make the runner fail",
          "[golden][contract]") {
    for (const fs::path& path : passing()) {
        Folder folder;
        const Editable original(path);
        std::size_t copies = 1;
        Editable more = original;
        more.tensors.push_back({.name = "out.more", .dtype = ElementType::f32, .shape = {1}, .bytes = {}});
        more.bytes.emplace_back(sizeof(float));
        more.write(folder / "more.safetensors");
        for (std::size_t i = 0; i < original.tensors.size(); ++i) {
            if (!original.tensors[i].name.starts_with("out.")) continue;
            if (original.tensors[i].name == "out.o_next") continue;  // this one a file may leave out
            Editable less = original;
            less.tensors.erase(less.tensors.begin() + static_cast<std::ptrdiff_t>(i));
            less.bytes.erase(less.bytes.begin() + static_cast<std::ptrdiff_t>(i));
            less.write(folder / ("without-" + std::to_string(i) + ".safetensors"));
            ++copies;
        }
        const Report report = run(folder.text());
        CAPTURE(path.string());
        CHECK(report.status == 1);
        CHECK(report.lines.size() == copies);
        CHECK(report.count("FAIL") == copies);
        CHECK(report.lines.at((folder / "more").string()).find("out.more") != std::string::npos);
    }
}

TEST_CASE("a word of the metadata that nobody knows makes the runner fail and is named",
          "[golden][contract]") {
    struct Case {
        std::string method, kind, key, word;
    };
    const std::vector<Case> cases{{"baselines", "h2o", "reduce", "median"},
                                  {"baselines", "h2o", "reduce", "layer"},
                                  {"baselines", "h2o", "pool", "median"},
                                  {"baselines", "h2o", "budget", "many"},
                                  {"baselines", "tova", "reduce", "rss"},
                                  {"baselines", "tova", "window", "7"},
                                  {"snapkv", "evict", "pooling", "median"},
                                  {"snapkv", "evict", "gqa", "rss"},
                                  {"snapkv", "decode", "gqa", "rss"},
                                  {"baselines", "streaming_reposition", "rope_convention", "spiral"},
                                  {"baselines", "h2o", "kind", "surprise"},
                                  {"snapkv", "evict", "kind", "h2o"},
                                  {"snapkv", "evict", "method", "surprise"},
                                  {"snapkv", "evict", "kernel", "4"}};
    Folder folder;
    for (std::size_t i = 0; i < cases.size(); ++i) {
        Editable edited(passing_of(cases[i].method, cases[i].kind));
        edited.metadata[cases[i].key] = cases[i].word;
        edited.write(folder / (std::to_string(i) + ".safetensors"));
    }
    const Report report = run(folder.text());
    CHECK(report.status == 1);
    for (std::size_t i = 0; i < cases.size(); ++i) {
        const std::string& line = report.lines.at((folder / std::to_string(i)).string());
        CAPTURE(line, cases[i].key);
        CHECK(line.starts_with("FAIL "));
        CHECK(line.find(cases[i].key) != std::string::npos);
        CHECK(line.find(cases[i].word) != std::string::npos);
    }
}

TEST_CASE("a file is known by its metadata and not by its name", "[golden][contract]") {
    Folder folder;
    fs::create_directories(folder / "a/b");
    fs::copy(passing_of("snapkv", "evict"), folder / "a/b/h2o_decode.safetensors");
    const Report report = run(folder.text());
    CHECK(report.status == 0);
    CHECK(report.count("pass") == 1);
    CHECK(report.last.starts_with("1 files, "));
}

TEST_CASE("no file, no folder and a file cut short make the runner fail", "[golden][contract]") {
    Folder folder;
    CHECK(run(folder.text()).status == 1);
    CHECK(run((folder / "nowhere").string()).status == 1);
    CHECK(run("\"" + shipped.string() + "\" " + folder.text()).status == 1);
    fs::copy(passing().front(), folder / "cut.safetensors");
    fs::resize_file(folder / "cut.safetensors", 1000);
    const Report report = run(folder.text());
    CHECK(report.status == 1);
    CHECK(report.count("FAIL") == 1);
}
