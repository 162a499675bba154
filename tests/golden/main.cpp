// kvcull-golden [FOLDER|FILE ...]: compares the library with numbers that other code produced.
//
// Goes over every *.safetensors below the folders by `method` and `kind` in the metadata. Without arguments:
// the files that the project ships, and those below $KVCULL_GOLDEN_DIR if that is set. One line per file:
//     pass PATH | FAIL PATH: first difference | not yet PATH: method kind
// then `N files, M checks, K failed`. Exit status 1 if a check failed or no file was found.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <string>
#include <vector>

#include "kinds.hpp"

namespace {

namespace fs = std::filesystem;
using kvcull::test::GoldenFile;

struct Totals {
    std::size_t files = 0, checks = 0, failed = 0;
};

/// @throws what the check throws; `checks` counts the comparisons either way.
void check(const std::string& path, std::size_t& checks) {
    GoldenFile file(path);
    const auto kinds = kvcull::test::known_kinds();
    const auto known = std::find_if(kinds.begin(), kinds.end(), [&](const auto& kind) {
        return kind.method == file.method() && kind.kind == file.kind();
    });
    if (known == kinds.end())
        throw kvcull::test::Difference("method '" + file.method() + "', kind '" + file.kind() +
                                       "' is unknown");
    if (known->check == nullptr) {
        std::printf("not yet %s: %s %s\n", path.c_str(), file.method().c_str(), file.kind().c_str());
        return;
    }
    try {
        known->check(file);
        file.finish();
    } catch (...) {
        checks += file.checks();
        throw;
    }
    checks += file.checks();
    std::printf("pass %s\n", path.c_str());
}

void check(const std::string& path, Totals& totals) {
    ++totals.files;
    std::size_t checks = 0;
    try {
        check(path, checks);
    } catch (const std::exception& error) {
        std::printf("FAIL %s: %s\n", path.c_str(), error.what());
        ++totals.failed;
        checks = std::max<std::size_t>(checks, 1);
    }
    totals.checks += checks;
}

/// @throws filesystem_error if there is no such folder or file.
std::vector<std::string> files_below(const fs::path& root) {
    if (fs::is_regular_file(root)) return {root.string()};
    std::vector<std::string> files;
    for (const auto& entry :
         fs::recursive_directory_iterator(root, fs::directory_options::follow_directory_symlink))
        if (entry.is_regular_file() && entry.path().extension() == ".safetensors")
            files.push_back(entry.path().string());
    std::sort(files.begin(), files.end());
    return files;
}

}  // namespace

int main(int count, char** arguments) {
    std::vector<std::string> roots(arguments + 1, arguments + count);
    if (roots.empty()) {
        roots.emplace_back(KVCULL_TESTS_DIR "/data/golden");
        const char* more = std::getenv("KVCULL_GOLDEN_DIR");
        if (more != nullptr && *more != '\0') roots.emplace_back(more);
    }
    Totals totals;
    bool found = true;
    for (const std::string& root : roots) {
        std::vector<std::string> files;
        try {
            files = files_below(root);
            if (files.empty())
                std::fprintf(stderr, "kvcull-golden: no *.safetensors below %s\n", root.c_str());
        } catch (const fs::filesystem_error& error) {
            std::fprintf(stderr, "kvcull-golden: %s\n", error.what());
        }
        found = found && !files.empty();
        for (const std::string& file : files) check(file, totals);
    }
    std::printf("%zu files, %zu checks, %zu failed\n", totals.files, totals.checks, totals.failed);
    return found && totals.failed == 0 ? 0 : 1;
}
