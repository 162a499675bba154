// Pages in a file, under system calls that fail, stop halfway, or are the last of the process.
#include "kvcull/paging/file_store.hpp"

#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <set>

#include "kvcull/paging/guard.hpp"
#include "kvcull/paging/predictors.hpp"
#include "support/catch.hpp"
#include "support/failure.hpp"
#include "support/faults.hpp"

namespace {

using kvcull::FileStore;
using kvcull::FileStoreOptions;
using kvcull::Frames;
using kvcull::page_t;
using kvcull::PageTier;
using kvcull::slot_t;
using kvcull::SplitMix64;
using kvcull::test::failure;
using kvcull::test::Faults;
using kvcull::test::FaultyIo;
namespace error = kvcull::error;

constexpr std::size_t page_bytes = 100, block = FileStore<>::block;
using Bytes = std::vector<char>;

/// A name in the directory for temporary files; the file goes with it.
struct TempFile {
    std::string path;

    explicit TempFile(const std::string& name)
        : path(std::filesystem::temp_directory_path() /
               ("kvcull-" + name + "-" + std::to_string(::getpid()))) {
        std::filesystem::remove(path);
    }
    TempFile(const TempFile&) = delete;
    TempFile& operator=(const TempFile&) = delete;
    ~TempFile() { std::filesystem::remove(path); }

    [[nodiscard]] Bytes bytes() const {
        std::ifstream file(path, std::ios::binary);
        return {std::istreambuf_iterator<char>(file), {}};
    }
    void put(const Bytes& bytes, std::size_t count) const {
        std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(count));
    }
};

using Store = FileStore<FaultyIo>;

/// Every page and version has bytes of its own; version 0: the page is not there.
void fill(std::span<std::byte> frame, page_t page, std::uint64_t version) {
    SplitMix64 random{page * 1000 + version};
    for (std::byte& b : frame) b = static_cast<std::byte>(random() >> 56U);
}
template <class AnyStore>
void write(AnyStore& store, page_t page, std::uint64_t version) {
    fill(store.frame(0), page, version);
    store.write(page, 0);
}
template <class AnyStore>
bool holds(AnyStore& store, page_t page, std::uint64_t version) {
    if (!store.contains(page)) return version == 0;
    if (version == 0) return false;
    std::vector<std::byte> want(page_bytes);
    fill(want, page, version);
    store.read(page, 1);
    return std::ranges::equal(store.frame(1), want);
}

/// What the store has said, beside what it may have done without saying so.
struct Model {
    std::map<page_t, std::uint64_t> acknowledged;
    std::map<page_t, std::set<std::uint64_t>> tried;  // by calls that threw since

    template <class AnyStore>
    [[nodiscard]] bool is(AnyStore& store) const {
        return std::ranges::all_of(acknowledged,
                                   [&](const auto& at) { return holds(store, at.first, at.second); });
    }
    /// For the next to open the file.
    template <class AnyStore>
    [[nodiscard]] bool may_be(AnyStore& store) const {
        return std::ranges::all_of(acknowledged, [&](const auto& at) {
            const auto found = tried.find(at.first);
            return holds(store, at.first, at.second) ||
                   (found != tried.end() && std::ranges::any_of(found->second, [&](std::uint64_t version) {
                        return holds(store, at.first, version);
                    }));
        });
    }
};
/// Writes, rewrites and erases pages, one call of the store per step; what throws is noted and passed over.
struct Workload {
    static constexpr std::uint64_t steps = 40, pages = 5;
    Model model;
    SplitMix64 random{7};
    std::size_t failures = 0;

    void step(Store& store, std::uint64_t version) {
        const page_t page = random() % pages;
        const bool erase = random() % 4 == 0;
        auto& now = model.acknowledged[page];
        try {
            if (erase)
                store.erase(page);
            else
                write(store, page, version);
            now = erase ? 0 : version;
            model.tried[page].clear();
        } catch (const error::io_error&) {
            model.tried[page].insert(erase ? 0 : version);
            ++failures;
        }
    }
};

Store open(const TempFile& file, Faults& faults, bool sync = false, std::size_t frames = 2) {
    return {file.path, Frames(frames, page_bytes), FileStoreOptions{.sync = sync}, FaultyIo{&faults}};
}
FileStore<> open(const TempFile& file, FileStoreOptions options = {}) {
    return {file.path, Frames(2, page_bytes), options};
}

}  // namespace

TEST_CASE("a file store gives back what was written last, also to the next that opens the file") {
    const TempFile file("file-store");
    const page_t last = ~page_t{0};
    {
        auto store = open(file, {.sync = true});
        write(store, 0, 1);
        write(store, last, 1);
        write(store, last, 2);
        write(store, 5, 1);
        store.erase(5);
        store.erase(5);
        store.erase(77);
        auto moved = std::move(store);
        REQUIRE(moved.size() == 2);
        REQUIRE(holds(moved, 0, 1));
        REQUIRE(holds(moved, last, 2));
    }
    auto store = open(file);
    REQUIRE(store.size() == 2);
    REQUIRE(holds(store, 0, 1));
    REQUIRE(holds(store, last, 2));
    REQUIRE(holds(store, 5, 0));
    REQUIRE(failure<error::state_error>([&] { store.read(5, 0); }) ==
            "FileStore::read: page is 5, want a page that was written");
    REQUIRE(failure<error::shape_error>([&] { store.write(5, 2); }) ==
            "Frames: frame is 2, want less than 2");
    REQUIRE(store.size() == 2);
}

TEST_CASE("free records are used again, so a file holds one more than it has pages") {
    const TempFile file("file-store-reuse");
    auto store = open(file);
    for (std::uint64_t version = 1; version <= 30; ++version)
        for (page_t page = 0; page < 3; ++page) write(store, page, version);
    REQUIRE(store.records() == 4);
    store.erase(1);
    store.erase(2);
    write(store, 10, 1);
    write(store, 11, 1);
    REQUIRE(store.records() == 4);
    REQUIRE(std::filesystem::file_size(file.path) <= block + 4 * 2 * block);
    REQUIRE(holds(store, 0, 30));
    REQUIRE(holds(store, 10, 1));
}

TEST_CASE("transfers cut short and interrupted calls change nothing", "[property]") {
    const TempFile file("file-store-short");
    const std::size_t at_most = GENERATE(1U, 7U, 99U, 5000U);
    const bool interrupted = GENERATE(false, true);
    Faults faults{.at_most = at_most, .interrupted = interrupted};
    Workload work;
    {
        auto store = open(file, faults, true);
        for (std::uint64_t v = 1; v <= Workload::steps; ++v) work.step(store, v);
        REQUIRE(work.model.is(store));
    }
    REQUIRE(work.failures == 0);
    auto store = open(file, faults);
    REQUIRE(work.model.is(store));
    for (const char* call : {"open", "pread", "pwrite", "fsync", "fstat"}) REQUIRE(faults.seen[call] > 0);
}

TEST_CASE("whichever system call fails, no page that was acknowledged is lost", "[property]") {
    const TempFile file("file-store-faults"), crash("file-store-crash");
    const bool sync = GENERATE(false, true);
    const bool last = GENERATE(false, true);
    const std::size_t partial = GENERATE(0U, 3U, 40U, 64U, 70U, 99U);
    CAPTURE(sync, last, partial);
    std::size_t failed = 0;
    for (std::size_t fail_at = 1;; ++fail_at) {
        CAPTURE(fail_at);
        std::filesystem::remove(file.path);
        Faults faults{.fail_at = fail_at, .partial = partial, .last = last};
        Workload work;
        try {
            auto store = open(file, faults, sync);
            bool crashed = false;
            for (std::uint64_t v = 1; v <= Workload::steps; ++v) {
                const bool before = faults.calls < fail_at;
                work.step(store, v);
                if (before && faults.calls >= fail_at) {  // the process ends here, or goes on
                    crashed = true;
                    std::filesystem::copy_file(file.path, crash.path,
                                               std::filesystem::copy_options::overwrite_existing);
                    auto reopened = open(crash);
                    REQUIRE(work.model.may_be(reopened));
                }
            }
            faults.fail_at = 0;
            REQUIRE(work.model.is(store));
            if (!crashed) break;  // the workload makes fewer calls
            ++failed;
            auto reopened = open(file);
            REQUIRE(work.model.may_be(reopened));
            if (!last) {
                for (page_t page = 0; page < Workload::pages; ++page) write(reopened, page, 1000);
                for (page_t page = 0; page < Workload::pages; ++page) REQUIRE(holds(reopened, page, 1000));
                REQUIRE(reopened.records() <= Workload::pages + 2);
            }
        } catch (const error::io_error&) {  // could not be opened; the next one can
            auto store = open(file);
            REQUIRE(store.size() == 0);
        }
    }
    REQUIRE(failed > 90);
}

TEST_CASE("a call that fails while a file is opened harms nothing", "[property]") {
    const TempFile file("file-store-open"), crash("file-store-open-crash");
    // Ends where a page is written twice: the header of its new bytes stands, that of the old ones is not
    // free yet.
    Faults faults;
    Workload work;
    {
        auto store = open(file, faults);
        write(store, 1, 1);
        write(store, 2, 1);
        faults.fail_at = faults.calls + 3 + 2;  // two of growth, page, header; then what frees the old record
        faults.last = true;
        write(store, 1, 2);
        REQUIRE(faults.calls >= faults.fail_at);
    }
    work.model.acknowledged = {{1, 2}, {2, 1}};
    const std::size_t partial = GENERATE(0U, 40U, 64U, 70U);
    std::size_t fail_at = 1;
    for (bool opened = false; !opened; ++fail_at) {
        std::filesystem::copy_file(file.path, crash.path, std::filesystem::copy_options::overwrite_existing);
        Faults again{.fail_at = fail_at, .partial = partial};
        try {
            auto store = open(crash, again);
            opened = again.calls < fail_at;
            again.fail_at = 0;
            REQUIRE(work.model.is(store));
        } catch (const error::io_error&) {
        }
        auto store = open(crash);
        REQUIRE(work.model.is(store));
        REQUIRE(store.size() == 2);
    }
    REQUIRE(fail_at > 7);  // open, fstat, the file's header, three records, one freed
}

TEST_CASE("a full disk refuses a page by name, and gives room again when pages are erased") {
    const TempFile file("file-store-full");
    Faults faults{.room = block + 3 * 2 * block - 50 - (block - page_bytes)};
    auto store = open(file, faults);
    write(store, 0, 1);
    write(store, 1, 1);
    const auto text = failure<error::io_error>([&] { write(store, 2, 1); });
    REQUIRE(text == "FileStore: pwrite of page 2 in " + file.path + ": No space left on device");
    try {
        write(store, 2, 1);
    } catch (const error::io_error& e) {
        REQUIRE(e.code == ENOSPC);
    }
    REQUIRE(store.size() == 2);
    REQUIRE(holds(store, 0, 1));
    REQUIRE(holds(store, 1, 1));
    store.erase(0);
    write(store, 2, 1);
    auto reopened = open(file);
    REQUIRE(reopened.size() == 2);
    REQUIRE(holds(reopened, 1, 1));
    REQUIRE(holds(reopened, 2, 1));
}

TEST_CASE("every flipped bit is an error or has no effect, never wrong bytes", "[property]") {
    const TempFile file("file-store-flip");
    {
        auto store = open(file);
        for (page_t page = 0; page < 2; ++page) write(store, page, 1);
        write(store, 0, 2);  // leaves its first record free
    }
    const Bytes good = file.bytes();
    std::size_t refused = 0, pages_refused = 0;
    for (std::size_t at = 0; at < good.size(); ++at) {
        if (at % block >= 130) continue;
        Bytes bad = good;
        bad[at] = static_cast<char>(bad[at] ^ (1 << (at % 8)));
        file.put(bad, bad.size());
        CAPTURE(at);
        try {
            auto store = open(file);
            REQUIRE(store.size() == 2);
            const bool in_record = at >= block && (at / block) % 2 == 1;
            const bool mended = file.bytes() == (at % block < 128 ? good : bad);
            REQUIRE((mended || !in_record));
            for (page_t page = 0; page < 2; ++page) {
                try {
                    const bool right = holds(store, page, page == 0 ? 2 : 1);
                    REQUIRE(right);
                } catch (const error::format_error& e) {
                    ++pages_refused;
                    REQUIRE_THAT(e.what(), contains_text("page " + std::to_string(page) + " in " + file.path +
                                                         " is unlike its checksum"));
                }
            }
        } catch (const error::format_error&) {
            ++refused;
        }
    }
    REQUIRE(refused == 0);  // the other copy of a header serves
    REQUIRE(pages_refused == 2 * page_bytes);

    // Both copies of a header.
    for (std::size_t record = 0; record <= 3; ++record) {
        Bytes bad = good;
        const std::size_t at = record == 0 ? 0 : block + (record - 1) * 2 * block;
        bad[at + 20] = static_cast<char>(bad[at + 20] ^ 4);
        bad[at + 84] = static_cast<char>(bad[at + 84] ^ 4);
        file.put(bad, bad.size());
        REQUIRE_THAT(failure<error::format_error>([&] { (void)open(file); }), contains_text("damaged"));
    }
}

TEST_CASE("a file that was cut short is refused at every length", "[property]") {
    const TempFile file("file-store-cut");
    {
        auto store = open(file);
        for (page_t page = 0; page < 3; ++page) write(store, page, 1);
    }
    const Bytes good = file.bytes();
    REQUIRE(good.size() == block + 2 * 2 * block + block + page_bytes);
    for (std::size_t length = 0; length < good.size(); length += length % 64 == 1 ? 63 : 1) {
        file.put(good, length);
        CAPTURE(length);
        if (length <= 16) {  // nothing but what a new file begins with
            REQUIRE(open(file).size() == 0);
            continue;
        }
        REQUIRE_THAT(failure<error::format_error>([&] { (void)open(file); }), contains_text("cut short"));
    }
    // Cut while it is open.
    file.put(good, good.size());
    auto store = open(file);
    std::filesystem::resize_file(file.path, good.size() - 1);
    REQUIRE_THAT(failure<error::format_error>([&] { store.read(2, 0); }),
                 contains_text("page 2 in " + file.path + " is cut short"));
    REQUIRE(holds(store, 1, 1));
}

TEST_CASE("files of others are refused and left alone") {
    const TempFile file("file-store-foreign");
    for (const std::size_t length : {1U, 4000U, 5000U, 100000U}) {
        const Bytes foreign(length, 'x');
        file.put(foreign, length);
        REQUIRE_THAT(failure<error::format_error>([&] { (void)open(file); }), contains_text("foreign"));
        REQUIRE(file.bytes() == foreign);
    }
    std::filesystem::remove(file.path);
    (void)open(file);
    REQUIRE(failure<error::format_error>([&] { FileStore<>(file.path, Frames(1, 64)); }) ==
            "FileStore: the file's header in " + file.path + " is for pages of 100 bytes, want 64");
    auto header =
        kvcull::detail::RecordHeader{.version = 2, .kind = kvcull::detail::RecordHeader::Kind::file};
    const auto copies = header.copies();
    Bytes newer(block);
    std::memcpy(newer.data(), copies.data(), copies.size());
    file.put(newer, block);
    REQUIRE_THAT(failure<error::format_error>([&] { (void)open(file); }),
                 contains_text("is of version 2, want 1"));
    // A record of a kind that there is not, in a file that is whole otherwise.
    using Header = kvcull::detail::RecordHeader;
    const auto put_header = [&](std::size_t at, const Header& one) {
        const auto twice = one.copies();
        std::memcpy(newer.data() + at, twice.data(), twice.size());
    };
    newer.resize(3 * block);
    put_header(0, {.kind = Header::Kind::file, .page = 1, .payload_bytes = page_bytes});
    put_header(block, {.kind = static_cast<Header::Kind>(4), .payload_bytes = page_bytes});
    file.put(newer, newer.size());
    REQUIRE_THAT(failure<error::format_error>([&] { (void)open(file); }),
                 contains_text("the header of record 0 in " + file.path + " is damaged"));
    REQUIRE_THAT(failure<error::io_error>([&] { FileStore<>("/nonexistent/x", Frames(1, 64)); }),
                 contains_text("open in /nonexistent/x: No such file or directory"));
}

TEST_CASE("a tier over a file goes on after any system call failed", "[property]") {
    const TempFile file("file-store-tier");
    const bool full_disk = GENERATE(false, true);
    bool failing = true;
    for (std::size_t fail_at = 1; failing; ++fail_at) {
        CAPTURE(fail_at, full_disk);
        std::filesystem::remove(file.path);
        Faults faults{.partial = fail_at % 100, .code = full_disk ? ENOSPC : EIO};
        PageTier tier(kvcull::Guard<>(3), open(file, faults, false, 3), kvcull::Popularity{});
        faults.calls = 0;
        faults.fail_at = fail_at;
        std::map<page_t, std::uint64_t> version;
        std::size_t failures = 0;
        const auto persist = [&](const auto& call) {  // a second time if the first one fails
            try {
                call();
            } catch (const error::io_error& e) {
                REQUIRE(e.code == faults.code);
                ++failures;
                call();
            }
        };
        SplitMix64 random{3};
        for (page_t next = 0; next < 30; ++next) {
            std::vector<page_t> pages;
            if (next > 0 && !version.empty()) {
                auto at = version.begin();
                std::advance(at, random() % version.size());
                pages.push_back(at->first);
            }
            persist([&] { tier.step(pages, next); });
            std::vector<std::byte> want(page_bytes);
            for (const page_t page : pages) {
                fill(want, page, version[page]);
                REQUIRE(std::ranges::equal(tier.store().frame(tier.frame(page)), want));
                fill(tier.store().frame(tier.frame(page)), page, ++version[page]);
                tier.mark_dirty(page);
            }
            fill(tier.store().frame(tier.frame(next)), next, version[next] = 1);
            tier.end_step();
            if (next % 3 == 2) {
                const page_t gone = version.begin()->first;
                persist([&] { tier.erase(gone); });
                version.erase(gone);
            }
        }
        REQUIRE(failures <= 1);
        failing = faults.calls >= fail_at;
        REQUIRE((!failing || fail_at > 0));
        if (!failing) REQUIRE(fail_at > 100);
    }
}

TEST_CASE("a tier over a file that exists takes the pages that are there") {
    const TempFile file("adopt");
    using Tier = PageTier<kvcull::Guard<>, FileStore<>, kvcull::Popularity>;
    const auto open_tier = [&] { return Tier(kvcull::Guard<>(2), open(file), {}); };
    const std::vector<page_t> pages{0, 3, 4, ~page_t{0}};
    {
        auto tier = open_tier();
        for (const page_t page : pages) {
            tier.step({}, page);
            fill(tier.store().frame(tier.frame(page)), page, 1);
            tier.end_step();
        }
        REQUIRE(tier.store().pages().size() == 2);
        tier.flush();
        tier.flush();
        REQUIRE(tier.store().pages() == pages);
        REQUIRE(tier.counts().write_backs == 4);
    }
    const auto bytes_of = [](page_t page) {
        std::vector<std::byte> bytes(page_bytes);
        fill(bytes, page, 1);
        return bytes;
    };
    {
        auto tier = open_tier();
        REQUIRE(failure<error::state_error>([&] { tier.step(pages); }) ==
                "PageTier::step: page is 0, want a known page");
        for (const page_t page : tier.store().pages()) tier.adopt(page);
        REQUIRE(failure<error::state_error>([&] { tier.adopt(3); }) ==
                "PageTier::adopt: page is 3, want a page that is not known yet");
        REQUIRE(failure<error::state_error>([&] { tier.adopt(5); }) ==
                "PageTier::adopt: page is 5, want a page that the store holds");
        for (const page_t page : pages) {
            tier.step(std::vector{page});
            REQUIRE(std::ranges::equal(tier.store().frame(tier.frame(page)), bytes_of(page)));
            tier.end_step();
        }
        REQUIRE(tier.counts().fetches == 4);
        REQUIRE(tier.counts().write_backs == 0);  // nothing was changed
        tier.erase(4);
    }
    auto altered = file.bytes();
    const auto zero = bytes_of(0);
    const auto found = std::search(altered.begin(), altered.end(), zero.begin(), zero.end(),
                                   [](char a, std::byte b) { return static_cast<std::byte>(a) == b; });
    REQUIRE(found != altered.end());
    *found = static_cast<char>(*found ^ 1);
    file.put(altered, altered.size());
    auto tier = open_tier();
    REQUIRE(failure<error::state_error>([&] { tier.adopt(4); }) ==
            "PageTier::adopt: page is 4, want a page that the store holds");
    for (const page_t page : tier.store().pages()) tier.adopt(page);
    REQUIRE_THROWS_AS(tier.step(std::vector<page_t>{0}), error::format_error);
    REQUIRE(tier.cache().pinned_slots() == 0);
    tier.step(std::vector<page_t>{3});
    REQUIRE(std::ranges::equal(tier.store().frame(tier.frame(3)), bytes_of(3)));
    tier.end_step();
}
