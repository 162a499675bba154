#include "kvcull/cache/blocks.hpp"

#include <atomic>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <set>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "kvcull/base/memory.hpp"
#include "support/catch.hpp"
#include "support/resident.hpp"

#if defined(__linux__)
#    include <sys/resource.h>
#endif

using namespace kvcull;

namespace {

constexpr std::size_t mib = std::size_t{1} << 20U;

/// Blocks that a test holds, released at its end whatever happened: a pool insists on that.
struct Held : std::vector<std::byte*> {
    explicit Held(BlockPool& pool_) : pool(pool_) {}
    Held(BlockPool& pool_, std::size_t payload, std::size_t count) : pool(pool_) {
        pool.acquire(payload, count, *this);
    }
    Held(const Held&) = delete;
    Held& operator=(const Held&) = delete;
    ~Held() { release(); }

    void release() {
        while (!empty()) release_last();
    }
    void release_last() {
        pool.release(back());
        pop_back();
    }
    /// Releases the blocks for which `drop(index)` holds.
    template <class Drop>
    void release_if(Drop drop) {
        std::vector<std::byte*> kept;
        for (std::size_t i = 0; i < size(); ++i) {
            if (drop(i))
                pool.release((*this)[i]);
            else
                kept.push_back((*this)[i]);
        }
        assign(kept.begin(), kept.end());
    }

    BlockPool& pool;
};
static_assert(!std::is_copy_constructible_v<BlockPool> && !std::is_move_constructible_v<BlockPool>);
static_assert(!std::is_copy_assignable_v<BlockPool> && !std::is_move_assignable_v<BlockPool>);

}  // namespace

TEST_CASE("options are checked", "[contract]") {
    REQUIRE(BlockPool().block_rows() == 64);
    REQUIRE(BlockPool().limit() == SIZE_MAX);
    REQUIRE(BlockPool({.bytes = 5, .block_rows = 4096}).limit() == 5);
    REQUIRE_THROWS_AS(BlockPool({.block_rows = 0}), error::config_error);
    REQUIRE_THROWS_AS(BlockPool({.block_rows = 4097}), error::config_error);
    BlockPool pool;
    std::vector<std::byte*> out;
    REQUIRE_THROWS_AS(pool.acquire(0, 1, out), error::config_error);
    REQUIRE_THROWS_AS(pool.acquire(SIZE_MAX, 1, out), error::config_error);
    REQUIRE_NOTHROW(pool.acquire(1, 0, out));
    REQUIRE(out.empty());
    REQUIRE(pool.mapped_bytes() == 0);
}

TEST_CASE("blocks are aligned, disjoint and counted with their headers", "[property]") {
    const std::size_t payload = GENERATE(std::size_t{1}, 64, 65, 4096, 33 * 1024, 3 * mib);
    const std::size_t count = payload > mib ? 10 : 100;
    BlockPool pool;
    Held blocks(pool, payload, count);
    REQUIRE(blocks.size() == count);
    REQUIRE(pool.bytes() == count * BlockPool::footprint(payload));
    REQUIRE(pool.peak_bytes() == pool.bytes());
    REQUIRE(pool.mapped_bytes() >= pool.bytes());
    for (std::size_t i = 0; i < count; ++i) {
        REQUIRE(reinterpret_cast<std::uintptr_t>(blocks[i]) % 64 == 0);
        REQUIRE(BlockPool::use_count(blocks[i]) == 1);
        std::memset(blocks[i], static_cast<int>(i), payload);
    }
    for (std::size_t i = 0; i < count; ++i) {
        CAPTURE(i);
        REQUIRE(BlockPool::use_count(blocks[i]) == 1);  // no payload reaches into a header
        REQUIRE(blocks[i][0] == static_cast<std::byte>(i));
        REQUIRE(blocks[i][payload - 1] == static_cast<std::byte>(i));
    }
    blocks.release();
    REQUIRE(pool.bytes() == 0);
    REQUIRE(pool.peak_bytes() == count * BlockPool::footprint(payload));
}

TEST_CASE("a block is free when its last owner releases it", "[contract]") {
    BlockPool pool;
    Held owners(pool, 100, 1);
    std::byte* block = owners[0];
    for (int i = 0; i < 2; ++i) {
        BlockPool::retain(block);
        owners.push_back(block);
    }
    REQUIRE(BlockPool::use_count(block) == 3);
    REQUIRE(pool.bytes() == BlockPool::footprint(100));  // a shared block counts once
    owners.release_last();
    owners.release_last();
    REQUIRE(BlockPool::use_count(block) == 1);
    REQUIRE(pool.bytes() == BlockPool::footprint(100));
    owners.release_last();
    REQUIRE(pool.bytes() == 0);
}

TEST_CASE("acquire gives all blocks or changes nothing, whichever block is the one too many", "[contract]") {
    const std::size_t payload = 1000, size = BlockPool::footprint(payload), count = 5;
    for (std::size_t room = 0; room < count; ++room) {
        CAPTURE(room);
        BlockPool pool;
        Held held(pool, payload, 3);
        pool.set_limit((3 + room + 1) * size - 1);  // one byte short of the next block
        std::vector<std::byte*> out(2);  // stays: what a caller already has is none of acquire's business
        const std::size_t mapped = pool.mapped_bytes();
        REQUIRE_THROWS_AS(pool.acquire(payload, count, out), error::capacity_error);
        REQUIRE(out == std::vector<std::byte*>(2));
        REQUIRE(pool.bytes() == 3 * size);
        REQUIRE(pool.peak_bytes() == 3 * size);
        REQUIRE(pool.mapped_bytes() == mapped);
        pool.acquire(payload, room, held);
        REQUIRE(held.size() == 3 + room);
        REQUIRE_THROWS_AS(pool.acquire(payload, 1, held), error::capacity_error);
        REQUIRE(held.size() == 3 + room);
    }
}

TEST_CASE("a refusal names what was asked, what is in use and the limit", "[contract]") {
    BlockPool pool({.bytes = 10000});
    Held held(pool, 64, 2);
    std::string message;
    try {
        Held(pool, 1000, 11);
    } catch (const error::capacity_error& error) {
        message = error.what();
    }
    REQUIRE(message ==
            "BlockPool::acquire: count is 11 blocks of 1088 bytes with 256 bytes in use, "
            "want at most 8 under the limit of 10000 bytes");
}

TEST_CASE("memory that the system refuses is a capacity_error too", "[contract]") {
    BlockPool pool;
    Held held(pool, 64, 2);
    const std::size_t mapped = pool.mapped_bytes();
    std::vector<std::byte*> out;
    REQUIRE_THROWS_AS(pool.acquire(SIZE_MAX / 64, 1, out), error::capacity_error);
    REQUIRE(out.empty());
    REQUIRE(pool.bytes() == 2 * BlockPool::footprint(64));
    REQUIRE(pool.mapped_bytes() == mapped);
}

#if defined(__linux__)
TEST_CASE("a system that refuses halfway gets the pages back that it gave", "[contract]") {
    std::size_t address_pages = 0;
    if (!(std::ifstream("/proc/self/statm") >> address_pages)) KVCULL_SKIP("no /proc/self/statm");
    BlockPool pool;
    Held held(pool, 100000, 2);
    const std::size_t mapped = pool.mapped_bytes();
    rlimit before{};
    REQUIRE(getrlimit(RLIMIT_AS, &before) == 0);
    rlimit tight = before;
    tight.rlim_cur = address_pages * Pages::page_bytes() + 32 * mib;
    rlimit now{};  // qemu accepts a limit and forgets it
    if (setrlimit(RLIMIT_AS, &tight) != 0 || getrlimit(RLIMIT_AS, &now) != 0 ||
        now.rlim_cur != tight.rlim_cur)
        KVCULL_SKIP("the address space cannot be limited here");
    bool refused = false;
    try {
        pool.acquire(100000, 1000, held);  // many slabs, of which some fit
    } catch (const error::capacity_error&) {
        refused = true;
    }
    REQUIRE(setrlimit(RLIMIT_AS, &before) == 0);
    REQUIRE(refused);
    REQUIRE(held.size() == 2);
    REQUIRE(pool.bytes() == 2 * BlockPool::footprint(100000));
    REQUIRE(pool.mapped_bytes() == mapped);
    pool.acquire(100000, 1000, held);
}
#endif

TEST_CASE("a limit below what is in use refuses new blocks only", "[contract]") {
    BlockPool pool;
    Held blocks(pool, 64, 4);
    pool.set_limit(1);
    REQUIRE(pool.limit() == 1);
    REQUIRE(pool.bytes() == 4 * BlockPool::footprint(64));
    REQUIRE_THROWS_AS(Held(pool, 64, 1), error::capacity_error);
    pool.set_limit(5 * BlockPool::footprint(64));
    pool.acquire(64, 1, blocks);
}

TEST_CASE("a freed block is used again before new memory is mapped", "[contract]") {
    const std::size_t payload = GENERATE(std::size_t{100}, 40000);
    BlockPool pool;
    Held blocks(pool, payload, 300);
    const std::size_t mapped = pool.mapped_bytes();
    const std::set<std::byte*> before(blocks.begin(), blocks.end());
    SplitMix64 random{1};
    for (int round = 0; round < 20; ++round) {
        for (int i = 0; i < 100; ++i) {
            std::swap(blocks[random() % blocks.size()], blocks.back());
            blocks.release_last();
        }
        pool.acquire(payload, 100, blocks);
        REQUIRE(pool.mapped_bytes() == mapped);
    }
    blocks.release_last();
    pool.acquire(payload, 1, blocks);
    REQUIRE(before.count(blocks.back()) == 1);
    REQUIRE(std::set<std::byte*>(blocks.begin(), blocks.end()).size() == 300);
}

TEST_CASE("idle memory of other block sizes goes before the limit is overrun", "[property]") {
    const std::size_t limit = 8 * mib;
    BlockPool pool({.bytes = limit});
    SplitMix64 random{2};
    for (int round = 0; round < 30; ++round) {
        const std::size_t payload = 5000 + random() % 20 * 3000;
        const std::size_t size = BlockPool::footprint(payload);
        Held blocks(pool, payload, limit / size);
        for (std::byte* block : blocks) std::memset(block, 1, payload);
        CAPTURE(payload, pool.mapped_bytes());
        REQUIRE(pool.mapped_bytes() <= limit + 8 * size + Pages::page_bytes());
    }
    pool.trim();
    REQUIRE(pool.mapped_bytes() == 0);
}

TEST_CASE("a small limit maps little", "[contract]") {
    const std::size_t size = BlockPool::footprint(1000);
    BlockPool pool({.bytes = 20 * size});
    Held blocks(pool, 1000, 20);
    REQUIRE(pool.mapped_bytes() <= 20 * size + 2 * Pages::page_bytes() + 8 * size);
}

TEST_CASE("trim keeps the blocks in use bit for bit and the others usable", "[property]") {
    const std::size_t payload = GENERATE(std::size_t{64}, 1000, 4032, 20000);
    BlockPool pool;
    SplitMix64 random{payload};
    Held blocks(pool);
    for (std::size_t round = 1; round <= 4; ++round) {
        const std::size_t kept = blocks.size();
        pool.acquire(payload, 500, blocks);
        for (std::byte* block : blocks) REQUIRE(BlockPool::use_count(block) == 1);
        REQUIRE(std::set<std::byte*>(blocks.begin(), blocks.end()).size() == kept + 500);
        for (std::size_t i = kept; i < blocks.size(); ++i)
            std::memset(blocks[i], static_cast<int>(i), payload);
        std::vector<std::byte> wanted;
        blocks.release_if([&](std::size_t i) {
            const bool drop = random() % 8 != 0;
            if (!drop) wanted.push_back(blocks[i][0]);
            return drop;
        });
        pool.trim();
        for (std::size_t i = 0; i < blocks.size(); ++i) {
            REQUIRE(BlockPool::use_count(blocks[i]) == 1);
            for (std::size_t c = 0; c < payload; ++c) {
                if (blocks[i][c] != wanted[i]) FAIL("byte " << c << " of a block in use changed");
            }
        }
    }
    blocks.release();
    pool.trim();
    REQUIRE(pool.bytes() == 0);
    REQUIRE(pool.mapped_bytes() == 0);
}

TEST_CASE("resident memory falls when trim is called and stays down", "[contract]") {
    if (!resident_bytes() || !Pages(1).discard(0, Pages::page_bytes())) {
        KVCULL_SKIP("resident memory cannot be read or given back here");
    }
    // Every eighth block stays, so that no slab is free as a whole.
    const std::size_t payload = 33 * 1024, count = 2000;
    BlockPool pool;
    Held blocks(pool, payload, count);
    for (std::byte* block : blocks) std::memset(block, 1, payload);
    const std::size_t full = *resident_bytes();
    blocks.release_if([](std::size_t i) { return i % 8 != 0; });
    const std::size_t freed = (count - blocks.size()) * payload;
    pool.trim();
    const std::size_t trimmed = *resident_bytes();
    REQUIRE(trimmed + freed * 3 / 4 < full);  // a sanitizer's own memory may grow meanwhile

    // Taking and freeing a few blocks must not touch the pages of the other free ones.
    for (int i = 0; i < 1000; ++i) {
        Held few(pool, payload, 4);
        for (std::byte* block : few) std::memset(block, 2, payload);
    }
    REQUIRE(*resident_bytes() < trimmed + mib);

    blocks.release();
    pool.trim();
    REQUIRE(pool.mapped_bytes() == 0);
    REQUIRE(*resident_bytes() < trimmed);
}

TEST_CASE("four threads share one pool", "[property][threads]") {
    const std::size_t payload[2] = {200, 5000};
    BlockPool pool({.bytes = 4 * mib});
    std::atomic<int> wrong = 0;
    Held common(pool, 64, 1);
    std::byte* shared = common[0];
    const auto work = [&](std::uint64_t seed) {
        SplitMix64 random{seed};
        Held mine[2] = {Held(pool), Held(pool)};
        for (int step = 0; step < 400; ++step) {
            const std::size_t kind = random() % 2;
            Held& blocks = mine[kind];
            if (random() % 2 == 0) {
                const std::size_t before = blocks.size();
                try {
                    pool.acquire(payload[kind], 1 + random() % 30, blocks);
                } catch (const error::capacity_error&) {
                    if (blocks.size() != before) ++wrong;
                }
                for (std::size_t i = before; i < blocks.size(); ++i) {
                    std::memset(blocks[i], static_cast<int>(seed), payload[kind]);
                }
            } else {
                for (std::size_t i = random() % (blocks.size() + 1); i > 0; --i) {
                    const std::byte* block = blocks.back();
                    if (block[0] != static_cast<std::byte>(seed) || block[payload[kind] - 1] != block[0])
                        ++wrong;
                    blocks.release_last();
                }
            }
            if (step % 50 == 0) pool.trim();
            if (pool.bytes() > pool.limit()) ++wrong;
            BlockPool::retain(shared);
            pool.release(shared);
        }
    };
    std::vector<std::thread> threads;
    for (std::uint64_t seed = 1; seed <= 4; ++seed) threads.emplace_back(work, seed);
    for (std::thread& thread : threads) thread.join();
    REQUIRE(wrong == 0);
    REQUIRE(BlockPool::use_count(shared) == 1);
    common.release();
    REQUIRE(pool.bytes() == 0);
    REQUIRE(pool.peak_bytes() <= pool.limit());
    pool.trim();
    REQUIRE(pool.mapped_bytes() == 0);
}
