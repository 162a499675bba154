// Episodes in a folder, under system calls that fail, stop halfway, or are the last of the process.
#include "kvcull/cache/file_bytes.hpp"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/failure.hpp"
#include "support/faults.hpp"
#include "support/talk.hpp"

using namespace kvcull;
using namespace kvcull::test;
using namespace kvcull::test::talk;
namespace fs = std::filesystem;

namespace {

using Bytes = std::vector<std::byte>;
using Files = FileBytes<FaultyIo>;
using Talk = TalkOver<Files>;
using Action = decltype(Talk::episodes)::Action;

/// An empty folder among the temporary files, which goes with all that is in it.
struct TempFolder {
    std::string path;

    explicit TempFolder(const std::string& name)
        : path(fs::temp_directory_path() / ("kvcull-" + name + "-" + std::to_string(::getpid()))) {
        clear();
    }
    TempFolder(const TempFolder&) = delete;
    TempFolder& operator=(const TempFolder&) = delete;
    ~TempFolder() { fs::remove_all(path); }

    void clear() const {
        fs::remove_all(path);
        fs::create_directory(path);
    }
    void become(const TempFolder& other) const {
        fs::remove_all(path);
        fs::copy(other.path, path);
    }
    [[nodiscard]] std::size_t files() const {
        return static_cast<std::size_t>(std::distance(fs::directory_iterator(path), {}));
    }
};

Bytes some_bytes(std::size_t count, std::uint64_t seed) {
    SplitMix64 random{seed};
    Bytes bytes(count);
    for (std::byte& b : bytes) b = static_cast<std::byte>(random() >> 56U);
    return bytes;
}
FileBytes<> open(const TempFolder& folder) {
    return FileBytes<>(folder.path);
}
Files open(const TempFolder& folder, Faults& faults) {
    return Files(folder.path, FaultyIo{&faults});
}
std::unique_ptr<Talk> talk_in(const TempFolder& folder, Faults& faults, bool build = true) {
    return std::make_unique<Talk>(settings(), build, open(folder, faults));
}
/// The conversation as a new process finds it in the folder.
std::unique_ptr<Talk> reopened(const TempFolder& folder, Faults& faults) {
    auto talk = talk_in(folder, faults, false);
    talk->episodes.reopen(talk->history, talk->segments, topics);
    return talk;
}

}  // namespace

TEST_CASE("a folder gives back what was put last, also to the next that opens it", "[property]") {
    const TempFolder folder("file-bytes");
    const Bytes first = some_bytes(1000, 1), second = some_bytes(10, 2);
    {
        auto store = open(folder);
        store.put(0, second);
        store.put(0, first);
        store.put(7, second);
        store.put(8, {});
        store.put(9, first);
        store.erase(9);
        store.erase(9);
        auto moved = std::move(store);
        CHECK(moved.get(0) == first);
    }
    auto store = open(folder);
    CHECK(store.get(0) == first);
    CHECK(store.get(7) == second);
    CHECK(store.get(8).empty());
    CHECK(failure<error::state_error>([&] { (void)store.get(9); }) ==
          "FileBytes::get: key is 9, want one that was put: there is no " + folder.path + "/9.safetensors");
    CHECK(folder.files() == 3);
    CHECK(fs::file_size(store.path(0)) == 1000);
}

TEST_CASE("a folder that is not there is refused by name", "[contract]") {
    const TempFolder folder("file-bytes-none");
    const std::string gone = folder.path + "/gone";
    CHECK(failure<error::io_error>([&] { FileBytes<> store(gone); }) ==
          "FileBytes: open in " + gone + ": No such file or directory");
    std::ofstream(gone) << "a file";
    CHECK(failure<error::io_error>([&] { FileBytes<> store(gone); }) ==
          "FileBytes: open in " + gone + ": Not a directory");
}

TEST_CASE("bytes are on the device before they have their name, and the name before put returns",
          "[contract]") {
    const TempFolder folder("file-bytes-order");
    Faults faults;
    auto store = open(folder, faults);
    faults.order.clear();
    store.put(3, some_bytes(100, 1));
    CHECK(faults.order == " open pwrite fsync rename open fsync");
    faults.order.clear();
    (void)store.get(3);
    CHECK(faults.order == " open fstat pread");
    faults.order.clear();
    store.erase(3);
    CHECK(faults.order == " unlink open fsync");
}

TEST_CASE("transfers cut short and interrupted calls change nothing of a file", "[property]") {
    const TempFolder folder("file-bytes-short");
    const std::size_t at_most = GENERATE(1U, 7U, 99U, 5000U);
    Faults faults{.at_most = at_most, .interrupted = GENERATE(false, true)};
    auto store = open(folder, faults);
    for (const std::uint64_t version : {1U, 2U}) {
        store.put(1, some_bytes(300, version));
        CHECK(store.get(1) == some_bytes(300, version));
    }
    store.erase(1);
    CHECK(folder.files() == 0);
}

TEST_CASE("whichever call of a put fails or is the last, the old bytes are there or the new ones",
          "[property]") {
    const TempFolder folder("file-bytes-put"), crash("file-bytes-put-crash");
    const bool last = GENERATE(false, true);
    const std::size_t partial = GENERATE(0U, 1U, 299U);
    const Bytes before = some_bytes(200, 1), after = some_bytes(300, 2);
    std::size_t fail_at = 1;
    for (bool done = false; !done; ++fail_at) {
        CAPTURE(last, partial, fail_at);
        folder.clear();
        Faults faults;
        auto store = open(folder, faults);
        store.put(1, before);
        faults = {.fail_at = fail_at, .partial = partial, .last = last};
        try {
            store.put(1, after);
            done = true;
        } catch (const error::io_error& e) {
            CHECK(e.code == EIO);
        }
        const bool renamed = faults.order.find("rename open") != std::string::npos;
        crash.become(folder);
        CHECK(open(crash).get(1) == (renamed ? after : before));
        if (!last) CHECK(folder.files() == 1);
        faults = {};
        CHECK(store.get(1) == (renamed ? after : before));
        store.put(1, after);
        CHECK(store.get(1) == after);
        CHECK(folder.files() == 1);
    }
    CHECK(fail_at == 8);  // six calls, then one that meets no fault
}

TEST_CASE("a full disk is an error by name and leaves the old bytes", "[contract]") {
    const TempFolder folder("file-bytes-full");
    Faults faults;
    auto store = open(folder, faults);
    store.put(1, some_bytes(50, 1));
    faults.room = 80;
    try {
        store.put(1, some_bytes(100, 2));
        FAIL("no error");
    } catch (const error::io_error& e) {
        CHECK(e.code == ENOSPC);
        CHECK(e.what() ==
              "FileBytes: pwrite in " + folder.path + "/1.safetensors.new: No space left on device");
    }
    CHECK(store.get(1) == some_bytes(50, 1));
    CHECK(folder.files() == 1);
}

TEST_CASE("whatever call on a file fails, the resident episode is unharmed and the talk goes on",
          "[property]") {
    // Written back, loaded, refreshed, each of them at whatever call fails; then the call is made again.
    const TempFolder folder("episodes-faults"), crash("episodes-crash");
    struct Turn {
        std::size_t topic, number, count;
    };
    const std::vector<Turn> turns{{0, 1000, 3}, {1, 2000, 20}, {1, 3000, 10}, {0, 4000, 2}};
    const auto play = [&](std::size_t fail_at, bool last, std::size_t& failures) {
        folder.clear();
        Faults faults;
        const auto talk = talk_in(folder, faults);
        faults = {.fail_at = fail_at, .partial = 100, .last = last};
        const auto mend = [&] {
            ++failures;
            // Who opens the folder now finds every episode whole, as it was before the call or after it.
            crash.become(folder);
            Faults none;
            const auto other = reopened(crash, none);
            for (std::size_t e = 0; e < topics; ++e)
                REQUIRE(other->episodes.begin_turn(embedding(e, 5)).episode == e);
            faults = {};
        };
        for (const Turn& turn : turns) {
            const auto resident = talk->episodes.resident();
            const Bytes before = resident ? talk->bytes() : Bytes{};
            const auto begin = [&] { talk->episodes.begin_turn(embedding(turn.topic, turn.number)); };
            try {
                begin();
            } catch (const error::io_error&) {
                REQUIRE(talk->episodes.resident() == resident);
                if (resident) REQUIRE(talk->bytes() == before);
                mend();
                begin();
            }
            std::vector<std::int32_t> tokens;
            for (std::size_t i = 0; i < turn.count; ++i)
                tokens.push_back(topic_token(turn.topic, turn.number + i));
            const EpisodeSegment own{embedding(turn.topic, turn.number + 7), tokens};
            talk->model.forward(talk->episodes.cache(), tokens);
            const Bytes said = talk->bytes();
            try {
                talk->episodes.end_turn(tokens, std::span(&own, 1));
            } catch (const error::io_error&) {  // the turn counts, the refresh is still to come
                REQUIRE(talk->bytes() == said);
                mend();
                REQUIRE(talk->episodes.end_turn({}, {}));
            }
        }
        talk->episodes.write_back();
        return open(folder);
    };
    const auto contents = [](FileBytes<> files) {
        std::vector<Bytes> all;
        for (std::size_t e = 0; e < topics; ++e) all.push_back(files.get(e));
        return all;
    };
    std::size_t none = 0;
    const auto wanted = contents(play(0, false, none));
    REQUIRE(none == 0);
    for (const bool last : {false, true}) {
        std::size_t fail_at = 1;
        for (std::size_t failures = 1; failures > 0; ++fail_at) {
            CAPTURE(last, fail_at);
            failures = 0;
            FileBytes<> files = open(folder);
            try {
                files = play(fail_at, last, failures);
            } catch (const error::io_error&) {  // the last write_back: nothing is lost, it is made again
                ++failures;
                continue;
            }
            REQUIRE(contents(std::move(files)) == wanted);
        }
        CHECK(fail_at > 25);
    }
}

TEST_CASE("an episode's file that is missing, cut, altered or foreign is an error, and the resident goes on",
          "[contract]") {
    const TempFolder folder("episodes-files");
    Faults faults;
    const auto talk = talk_in(folder, faults);
    Faults none;
    auto raw = open(folder, none);
    talk->episodes.begin_turn(embedding(1, 1));
    const Bytes old = raw.get(1);
    talk->say(1, 1000, 3);
    talk->episodes.begin_turn(embedding(0, 1));
    const Bytes resident = talk->bytes(), whole = raw.get(1);
    const auto refused = [&](const Bytes& bytes) {
        raw.put(1, bytes);
        CHECK_THROWS_AS(talk->episodes.begin_turn(embedding(1, 1)), error::format_error);
        CHECK(talk->bytes() == resident);
        CHECK(talk->episodes.resident() == std::optional<std::size_t>(0));
        CHECK(talk->episodes.begin_turn(embedding(0, 1)).action == Action::stayed);
    };
    for (std::size_t keep = 0; keep < whole.size(); keep += 1 + whole.size() / 50)
        refused({whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(keep)});
    refused({whole.begin(), whole.end() - 1});
    for (std::size_t at = 0; at < whole.size(); at += 1 + whole.size() / 97) {
        Bytes altered = whole;
        altered[at] ^= std::byte{16};
        refused(altered);
    }
    refused(some_bytes(5000, 3));
    refused(raw.get(2));  // of another episode
    refused(old);         // of this one, but before its turn
    {
        TalkOver<MemoryBytes> larger(settings(), false);
        larger.model.shape.layers = 2;
        larger.episodes.build(larger.history, larger.segments);
        refused(larger.store.get(1));  // of another model
    }
    raw.erase(1);
    CHECK_THROWS_AS(talk->episodes.begin_turn(embedding(1, 1)), error::state_error);
    CHECK(talk->bytes() == resident);
    raw.put(1, whole);
    CHECK(talk->episodes.begin_turn(embedding(1, 1)).episode == 1);
    CHECK(talk->episodes.cache().seen() == 243);
}

TEST_CASE("a build that is cut short by a crash is seen by who opens the folder", "[contract]") {
    const TempFolder folder("episodes-build");
    for (std::size_t fail_at = 1;; ++fail_at) {
        CAPTURE(fail_at);
        folder.clear();
        Faults faults;
        const auto talk = talk_in(folder, faults, false);
        faults = {.fail_at = fail_at, .last = true};
        bool built = true;
        try {
            talk->episodes.build(talk->history, talk->segments);
        } catch (const error::io_error&) {
            built = false;
            CHECK(talk->episodes.size() == 0);
        }
        if (built) break;
        Faults none;
        const auto other = talk_in(folder, none, false);
        if (fail_at <= 16)  // the third file has no name yet
            CHECK_THROWS_AS(other->episodes.reopen(other->history, other->segments, topics),
                            error::state_error);
        else
            CHECK_NOTHROW(other->episodes.reopen(other->history, other->segments, topics));
        if (other->episodes.size() == 0) other->episodes.build(other->history, other->segments);
        CHECK(other->say(1, 1000, 2).size() > 0);
        CHECK(folder.files() == topics);
    }
}
