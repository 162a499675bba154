#include "kvcull/cache/storage.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "kvcull/base/memory.hpp"
#include "support/catch.hpp"

using namespace kvcull;

namespace {

static_assert(std::is_copy_constructible_v<Storage> && !std::is_copy_assignable_v<Storage>);
static_assert(std::is_nothrow_move_constructible_v<Storage> && std::is_nothrow_move_assignable_v<Storage>);

float random_float(SplitMix64& random) {
    return static_cast<float>(random.uniform() * 8 - 4);
}

/// A row as it must come out of the cache.
std::vector<std::uint32_t> stored_bits(std::span<const float> row, DType dtype) {
    std::vector<std::byte> stored(row_bytes(dtype, row.size()));
    simd::narrow(simd::kernels_for(simd::Isa::scalar), dtype, row.data(), row.size(), stored.data());
    std::vector<float> wide(row.size());
    RowsView(stored.data(), dtype, 1, row.size(), 0).widen(0, wide);
    std::vector<std::uint32_t> bits;
    for (const float x : wide) bits.push_back(std::bit_cast<std::uint32_t>(x));
    return bits;
}

/// What a Storage holds, as plain vectors: the meaning of every operation.
struct Model {
    struct Row {
        std::vector<std::uint32_t> k, v;  // bits of the widened elements
        position_t position;
    };
    std::vector<std::vector<Row>> heads;

    void apply(std::size_t head, std::span<const Move> moves, std::size_t rows) {
        for (const Move& move : moves) {
            heads[head][static_cast<std::size_t>(move.to)] =
                Row(heads[head][static_cast<std::size_t>(move.from)]);
        }
        heads[head].resize(rows);
    }
};

bool same_row(const RowsView& rows, std::size_t index, const std::vector<std::uint32_t>& wanted) {
    std::vector<float> got(rows.dim());
    rows.widen(index, got);
    return std::memcmp(got.data(), wanted.data(), wanted.size() * sizeof(float)) == 0;
}

/// Number of heads of `storage` that differ from the model. Counts, so that threads may call it too.
std::size_t differences(const Storage& storage, const Model& model) {
    std::size_t wrong = storage.heads() == model.heads.size() ? 0 : 1;
    for (std::size_t head = 0; head < model.heads.size(); ++head) {
        const auto& wanted = model.heads[head];
        const HeadView view = storage.view(head);
        bool good = storage.rows(head) == wanted.size() && view.rows() == wanted.size() &&
                    view.v.rows() == wanted.size() && view.position.size() == wanted.size() &&
                    view.k.dim() == storage.layout().key_dim && view.v.dim() == storage.layout().value_dim;
        for (std::size_t row = 0; good && row < wanted.size(); ++row) {
            good = same_row(view.k, row, wanted[row].k) && same_row(view.v, row, wanted[row].v) &&
                   view.position[row] == wanted[row].position;
        }
        wrong += good ? 0 : 1;
    }
    return wrong;
}

/// Storage and model side by side: every change is made to both.
struct Pair {
    Storage storage;
    Model model;

    Pair(std::size_t heads, RowLayout layout, BlockPool& pool)
        : storage(heads, layout, pool), model{std::vector<std::vector<Model::Row>>(heads)} {}

    /// Takes exactly the spares that `blocks_needed` asks for, so that an underestimate trips an assertion.
    void reserve(std::size_t head, std::size_t rows, bool rewrite) {
        const std::size_t needed = storage.blocks_needed(head, rows, rewrite);
        storage.release_spares(needed);
        storage.reserve_spares(needed);
    }
    void append(std::size_t head, std::size_t count, SplitMix64& random) {
        const RowLayout& layout = storage.layout();
        const std::size_t k_stride =
            layout.key_dim + random() % 2 * 3;  // dense rows and rows inside a larger buffer
        const std::size_t v_stride = layout.value_dim + random() % 2 * 5;
        std::vector<float> k(count * k_stride), v(count * v_stride);
        std::vector<position_t> positions(count);
        for (float& x : k) x = random_float(random);
        for (float& x : v) x = random_float(random);
        for (std::size_t row = 0; row < count; ++row) {
            positions[row] = static_cast<position_t>(random() >> 1U);
            Model::Row wanted{stored_bits({&k[row * k_stride], layout.key_dim}, layout.dtype),
                              stored_bits({&v[row * v_stride], layout.value_dim}, layout.dtype),
                              positions[row]};
            model.heads[head].push_back(std::move(wanted));
        }
        storage.append(head, count, k.data(), k_stride, v.data(), v_stride, positions.data());
    }
    void apply(std::size_t head, const std::vector<Move>& moves, std::size_t rows) {
        storage.apply(head, moves, rows);
        model.apply(head, moves, rows);
    }
    void truncate(std::size_t head, std::size_t rows) {
        storage.truncate(head, rows);
        model.heads[head].resize(rows);
    }
};

/// Moves that close the gaps of a random set of kept rows, ascending or from the tail; `kept` is what stays.
std::vector<Move> compaction(std::size_t rows, SplitMix64& random, std::size_t& kept) {
    std::vector<index_t> keep;
    const std::uint64_t odds = 1 + random() % 8;
    for (std::size_t row = 0; row < rows; ++row) {
        if (random() % odds == 0) keep.push_back(static_cast<index_t>(row));
    }
    kept = keep.size();
    std::vector<Move> moves;
    if (random() % 2 == 0) {
        for (std::size_t to = 0; to < kept; ++to) {
            if (keep[to] != static_cast<index_t>(to)) moves.push_back({keep[to], static_cast<index_t>(to)});
        }
    } else {
        std::set<index_t> gaps;
        for (std::size_t to = 0; to < kept; ++to) gaps.insert(static_cast<index_t>(to));
        for (const index_t row : keep) gaps.erase(row);
        for (auto tail = keep.rbegin(); !gaps.empty(); ++tail) {
            moves.push_back({*tail, *gaps.begin()});
            gaps.erase(gaps.begin());
        }
    }
    return moves;
}
/// Any moves at all, runs in both directions and with overlap among them.
std::vector<Move> scramble(std::size_t rows, SplitMix64& random) {
    std::vector<Move> moves;
    for (std::size_t i = random() % 6; i > 0 && rows > 0; --i) {
        std::size_t from = random() % rows, to = random() % rows;
        const std::size_t near = to / 2 + from / 2;
        if (random() % 2 == 0) to = std::min(near + random() % 4, rows - 1);
        for (std::size_t run = random() % 20 + 1; run > 0 && from < rows && to < rows; --run, ++from, ++to) {
            moves.push_back({static_cast<index_t>(from), static_cast<index_t>(to)});
        }
    }
    return moves;
}

std::size_t distinct_bytes(const std::vector<std::unique_ptr<Pair>>& all) {
    std::vector<const std::byte*> blocks;
    for (const auto& pair : all) pair->storage.collect_blocks(blocks);
    const std::set<const std::byte*> distinct(blocks.begin(), blocks.end());
    return all.empty() ? 0 : distinct.size() * all[0]->storage.layout().block_bytes();
}

}  // namespace

TEST_CASE("the parts of a block are aligned and do not overlap", "[property]") {
    for (const DType dtype : all_dtypes) {
        for (const std::size_t rows : {1U, 3U, 16U, 64U, 4096U}) {
            for (const std::size_t dim : {1U, 80U, 257U}) {
                const RowLayout layout{
                    .key_dim = dim, .value_dim = dim + 3, .dtype = dtype, .block_rows = rows};
                REQUIRE(layout.value_offset() % 64 == 0);
                REQUIRE(layout.position_offset() % 64 == 0);
                REQUIRE(layout.value_offset() >= layout.key_offset() + rows * row_bytes(dtype, dim));
                REQUIRE(layout.position_offset() >= layout.value_offset() + rows * row_bytes(dtype, dim + 3));
                REQUIRE(layout.payload_bytes() == layout.position_offset() + rows * 8);
                REQUIRE(layout.block_bytes() >= layout.payload_bytes() + BlockPool::header_bytes);
                REQUIRE(layout.row_bytes() == row_bytes(dtype, dim) + row_bytes(dtype, dim + 3) + 8);
                REQUIRE(layout.blocks_for(0) == 0);
                REQUIRE(layout.blocks_for(rows) == 1);
                REQUIRE(layout.blocks_for(rows + 1) == 2);
            }
        }
    }
}

TEST_CASE("a layout that cannot be is refused by name", "[contract]") {
    BlockPool pool;
    const auto make = [&](RowLayout layout) { Storage(1, layout, pool); };
    REQUIRE_THROWS_AS(make({.key_dim = 0, .value_dim = 1}), error::config_error);
    REQUIRE_THROWS_AS(make({.key_dim = 1, .value_dim = 65537}), error::config_error);
    REQUIRE_THROWS_AS(make({.key_dim = 1, .value_dim = 1, .block_rows = 0}), error::config_error);
    REQUIRE_THROWS_AS(make({.key_dim = 1, .value_dim = 1, .block_rows = 4097}), error::config_error);
    std::string message;
    try {
        make({.key_dim = 4, .value_dim = SIZE_MAX});
    } catch (const error::config_error& error) {
        message = error.what();
    }
    REQUIRE(message == "Storage: value_dim is " + std::to_string(SIZE_MAX) + ", want 1 .. 65536");
    REQUIRE_NOTHROW(make({.key_dim = 65536, .value_dim = 65536, .block_rows = 4096}));
    REQUIRE(Storage(0, {.key_dim = 1, .value_dim = 1}, pool).bytes() == 0);
}

TEST_CASE("storage behaves like plain vectors under random appends, moves, forks and cuts", "[property]") {
    const std::size_t block_rows = GENERATE(std::size_t{1}, 16, 64);
    const auto dims =
        GENERATE(std::pair<std::size_t, std::size_t>{1, 3}, std::pair<std::size_t, std::size_t>{80, 64},
                 std::pair<std::size_t, std::size_t>{257, 1});
    const DType dtype = GENERATE(DType::f32, DType::f16, DType::bf16, DType::int8, DType::int4);
    const RowLayout layout{
        .key_dim = dims.first, .value_dim = dims.second, .dtype = dtype, .block_rows = block_rows};
    CAPTURE(block_rows, dims.first, dims.second, name_of(dtype));
    const std::size_t heads = 3;
    BlockPool pool({.block_rows = block_rows});
    SplitMix64 random{block_rows + dims.first};
    {
        std::vector<std::unique_ptr<Pair>> all;
        all.push_back(std::make_unique<Pair>(heads, layout, pool));
        for (int step = 0; step < 300; ++step) {
            Pair& pair = *all[random() % all.size()];
            const std::size_t head = random() % heads, rows = pair.storage.rows(head);
            switch (random() % 8) {
                case 0:
                case 1:
                case 2: {
                    const std::size_t count = random() % (random() % 4 == 0 ? 2 * block_rows + 9 : 4);
                    pair.reserve(head, count, false);
                    pair.append(head, count, random);
                    break;
                }
                case 3: {  // append and evict under one reservation, as a decode step does
                    const std::size_t count = random() % 5;
                    pair.reserve(head, count, true);
                    pair.append(head, count, random);
                    std::size_t kept = 0;
                    const auto moves = compaction(rows + count, random, kept);
                    pair.apply(head, moves, kept);
                    break;
                }
                case 4: {
                    const auto moves = scramble(rows, random);
                    pair.reserve(head, 0, true);
                    pair.apply(head, moves, rows - random() % (rows / 4 + 1));
                    break;
                }
                case 5:
                    pair.truncate(head, rows - random() % (rows / 4 + 1));
                    break;
                case 6:
                    if (all.size() < 5) all.push_back(std::make_unique<Pair>(pair));
                    break;
                default:
                    if (all.size() > 2 && random() % 2 == 0) {
                        all.erase(all.begin() + static_cast<std::ptrdiff_t>(random() % all.size()));
                    } else {  // roll back to another state
                        const Pair& other = *all[random() % all.size()];
                        pair.storage = Storage(other.storage);
                        pair.model = other.model;
                    }
            }
            for (const auto& each : all) {
                if (differences(each->storage, each->model) != 0) FAIL("rows differ after step " << step);
            }
            REQUIRE(pool.bytes() == distinct_bytes(all));
        }
    }
    REQUIRE(pool.bytes() == 0);
}

TEST_CASE("a fork shares every block until one side writes, and then only that block is copied",
          "[contract]") {
    const RowLayout layout{.key_dim = 8, .value_dim = 8, .dtype = DType::f16, .block_rows = 4};
    BlockPool pool({.block_rows = 4});
    SplitMix64 random{5};
    {
        Pair a(2, layout, pool);
        a.storage.reserve_spares(6);
        a.append(0, 10, random);  // blocks of 4, 4 and 2 rows
        a.append(1, 8, random);   // two full blocks
        REQUIRE(a.storage.spares() == 1);
        Pair b = a;
        REQUIRE(b.storage.spares() == 0);
        REQUIRE(pool.bytes() == 6 * layout.block_bytes());
        REQUIRE(a.storage.bytes() == 6 * layout.block_bytes());
        REQUIRE(b.storage.bytes() == 5 * layout.block_bytes());

        // Growth and the shared tail on append, every shared block on a rewrite, nothing for doing nothing.
        REQUIRE(b.storage.blocks_needed(0, 0, false) == 0);
        REQUIRE(b.storage.blocks_needed(0, 2, false) == 1);
        REQUIRE(b.storage.blocks_needed(0, 3, false) == 2);
        REQUIRE(b.storage.blocks_needed(1, 1, false) == 1);  // the tail block is full: nothing to copy
        REQUIRE(b.storage.blocks_needed(0, 0, true) == 3);
        REQUIRE(b.storage.blocks_needed(1, 9, true) == 5);

        b.storage.reserve_spares(1);
        b.append(0, 2, random);
        REQUIRE(b.storage.spares() == 0);
        REQUIRE(b.storage.blocks_needed(0, 0, true) == 2);
        REQUIRE(differences(a.storage, a.model) == 0);
        REQUIRE(differences(b.storage, b.model) == 0);

        // Row 9 goes to slot 1: the first block is copied, the second stays shared, the third loses its use.
        b.reserve(0, 0, true);
        b.apply(0, {{9, 1}}, 8);
        REQUIRE(b.storage.blocks_needed(0, 0, true) == 1);
        REQUIRE(differences(a.storage, a.model) == 0);
        REQUIRE(differences(b.storage, b.model) == 0);
        b.storage.release_spares(0);
        REQUIRE(pool.bytes() == 7 * layout.block_bytes());

        a.truncate(0, 0);
        a.truncate(1, 0);
        REQUIRE(b.storage.blocks_needed(0, 0, true) == 0);  // alone again
        REQUIRE(differences(b.storage, b.model) == 0);
    }
    REQUIRE(pool.bytes() == 0);
}

TEST_CASE("bytes moved are the bytes of the rows that moved", "[contract]") {
    const RowLayout layout{.key_dim = 5, .value_dim = 7, .dtype = DType::bf16, .block_rows = 4};
    BlockPool pool({.block_rows = 4});
    SplitMix64 random{6};
    Pair a(1, layout, pool);
    a.reserve(0, 11, false);
    a.append(0, 11, random);
    Pair b = a;
    b.reserve(0, 0, true);
    b.apply(0, {{3, 3}, {10, 0}, {9, 4}},
            9);  // a move onto itself is none; copies of shared blocks do not count
    REQUIRE(b.storage.bytes_moved() == 2 * layout.row_bytes());
    REQUIRE(a.storage.bytes_moved() == 0);
    b.apply(0, {{1, 0}, {2, 1}, {3, 2}, {4, 3}, {5, 4}}, 5);
    REQUIRE(b.storage.bytes_moved() == 7 * layout.row_bytes());
    REQUIRE(Storage(b.storage).bytes_moved() == 7 * layout.row_bytes());
    REQUIRE(differences(b.storage, b.model) == 0);
}

TEST_CASE("NaN payloads and signed zeros move bit for bit", "[property]") {
    const RowLayout layout{.key_dim = 2, .value_dim = 1, .dtype = DType::f32, .block_rows = 4};
    BlockPool pool;
    Storage storage(1, layout, pool);
    storage.reserve_spares(2);
    std::vector<float> k(12), v(6);
    for (std::size_t i = 0; i < 12; ++i)
        k[i] = std::bit_cast<float>(0x7F800001U + static_cast<std::uint32_t>(i));
    for (std::size_t i = 0; i < 6; ++i) v[i] = std::bit_cast<float>(i % 2 == 0 ? 0x80000000U : 0xFFC00123U);
    const std::vector<position_t> positions{INT64_MAX, INT64_MIN, -1, 0, 1, 2};
    storage.append(0, 6, k.data(), 2, v.data(), 1, positions.data());
    const std::vector<Move> moves{{5, 0}, {1, 3}};
    storage.apply(0, moves, 4);
    const HeadView view = storage.view(0);
    REQUIRE(std::memcmp(view.k.row(0), &k[10], 8) == 0);
    REQUIRE(std::memcmp(view.k.row(3), &k[2], 8) == 0);
    REQUIRE(std::memcmp(view.v.row(3), &v[1], 4) == 0);
    REQUIRE(view.position[3] == INT64_MIN);
}

TEST_CASE("rows that come as columns are stored like rows", "[property]") {
    constexpr std::size_t rows = 11, key_dim = 3, value_dim = 5, capacity = 16;
    std::vector<std::uint16_t> k(key_dim * capacity), v(value_dim * capacity);
    for (std::size_t i = 0; i < k.size(); ++i) k[i] = static_cast<std::uint16_t>(i);
    for (std::size_t i = 0; i < v.size(); ++i) v[i] = static_cast<std::uint16_t>(0x8000U + i);
    std::vector<position_t> positions(rows);
    for (std::size_t j = 0; j < rows; ++j) positions[j] = static_cast<position_t>(2 * j);
    BlockPool pool({.bytes = 1 << 20, .block_rows = 4});
    Storage storage(1, {key_dim, value_dim, DType::f16, 4}, pool);
    storage.reserve_spares(storage.blocks_needed(0, rows, false));
    storage.reserve_rows(rows);
    storage.append(0, {RowsView::columns(k.data(), DType::f16, rows, key_dim, capacity),
                       RowsView::columns(v.data(), DType::f16, rows, value_dim, capacity),
                       std::span<const position_t>(positions)});
    const HeadView stored = storage.view(0);
    for (std::size_t j = 0; j < rows; ++j) {
        std::uint16_t key[key_dim], value[value_dim];
        std::memcpy(key, stored.k.row(j), sizeof key);
        std::memcpy(value, stored.v.row(j), sizeof value);
        for (std::size_t c = 0; c < key_dim; ++c) REQUIRE(key[c] == k[c * capacity + j]);
        for (std::size_t c = 0; c < value_dim; ++c) REQUIRE(value[c] == v[c * capacity + j]);
        REQUIRE(stored.position[j] == positions[j]);
    }
}

TEST_CASE("a pool that runs out at any block leaves the storage as it was", "[contract]") {
    const RowLayout layout{.key_dim = 16, .value_dim = 16, .dtype = DType::f32, .block_rows = 16};
    BlockPool pool({.block_rows = 16});
    SplitMix64 random{7};
    {
        Pair a(2, layout, pool);
        a.reserve(0, 40, false);
        a.append(0, 40, random);
        Pair fork = a;
        const std::size_t needed = fork.storage.blocks_needed(0, 100, true);
        REQUIRE(needed == 6 + 3);
        const std::size_t before = pool.bytes();
        for (std::size_t room = 0; room < needed; ++room) {
            CAPTURE(room);
            pool.set_limit(before + room * layout.block_bytes());
            REQUIRE_THROWS_AS(fork.storage.reserve_spares(needed), error::capacity_error);
            REQUIRE(fork.storage.spares() == 0);
            REQUIRE(pool.bytes() == before);
            REQUIRE(differences(fork.storage, fork.model) == 0);
        }
        pool.set_limit(before + needed * layout.block_bytes());
        fork.storage.reserve_spares(2);
        fork.storage.reserve_spares(needed);  // takes the rest only
        REQUIRE(pool.bytes() == before + needed * layout.block_bytes());
        fork.storage.reserve_spares(needed - 1);  // at least that many are there: nothing to do
        REQUIRE(fork.storage.spares() == needed);
        fork.append(0, 100, random);
        std::size_t kept = 0;
        const auto moves = compaction(140, random, kept);
        fork.apply(0, moves, kept);
        REQUIRE(differences(fork.storage, fork.model) == 0);
        REQUIRE(differences(a.storage, a.model) == 0);
        fork.storage.release_spares(0);
        REQUIRE(fork.storage.spares() == 0);
    }
    REQUIRE(pool.bytes() == 0);
}

TEST_CASE("a moved storage takes rows and spares along, the other one is empty", "[contract]") {
    const RowLayout layout{.key_dim = 4, .value_dim = 4, .dtype = DType::f32, .block_rows = 2};
    BlockPool pool({.block_rows = 2});
    SplitMix64 random{8};
    {
        Pair a(1, layout, pool);
        a.storage.reserve_spares(4);
        a.append(0, 5, random);
        Storage moved(std::move(a.storage));
        REQUIRE(a.storage.heads() == 0);
        REQUIRE(a.storage.bytes() == 0);
        REQUIRE(moved.spares() == 1);
        REQUIRE(differences(moved, a.model) == 0);

        Pair target(1, layout, pool);
        target.storage.reserve_spares(7);
        target.storage = std::move(moved);
        REQUIRE(pool.bytes() == 4 * layout.block_bytes());  // what the target held is free
        REQUIRE(differences(target.storage, a.model) == 0);
    }
    REQUIRE(pool.bytes() == 0);
}

TEST_CASE("steady decoding neither maps memory nor grows", "[property]") {
    const RowLayout layout{.key_dim = 32, .value_dim = 32, .dtype = DType::f16, .block_rows = 16};
    const std::size_t heads = 4, budget = 100;
    BlockPool pool({.block_rows = 16});
    SplitMix64 random{9};
    Storage storage(heads, layout, pool);
    storage.reserve_rows(budget + 1);
    const std::vector<float> row(32, 1.0F);
    std::size_t mapped = 0, bytes = 0;
    for (position_t step = 0; step < 2000; ++step) {
        std::size_t needed = 0;
        for (std::size_t head = 0; head < heads; ++head) needed += storage.blocks_needed(head, 1, true);
        storage.reserve_spares(needed);
        for (std::size_t head = 0; head < heads; ++head) {
            storage.append(head, 1, row.data(), 32, row.data(), 32, &step);
            const std::size_t rows = storage.rows(head);
            if (rows <= budget) continue;
            const Move fill{static_cast<index_t>(rows - 1), static_cast<index_t>(random() % budget)};
            storage.apply(head, {&fill, 1}, budget);
        }
        storage.release_spares(0);
        if (step == 200) {
            mapped = pool.mapped_bytes();
            bytes = storage.bytes();
        }
    }
    REQUIRE(pool.mapped_bytes() == mapped);
    REQUIRE(storage.bytes() == bytes);
    REQUIRE(pool.bytes() == bytes);
    REQUIRE(storage.bytes() == heads * layout.blocks_for(budget) * layout.block_bytes());
}

TEST_CASE("threads fork one prompt and evict in their forks at once", "[property][threads]") {
    const RowLayout layout{.key_dim = 24, .value_dim = 8, .dtype = DType::f16, .block_rows = 8};
    const std::size_t heads = 2;
    BlockPool pool({.block_rows = 8});
    SplitMix64 random{10};
    std::atomic<std::size_t> wrong = 0;
    {
        Pair prompt(heads, layout, pool);
        for (std::size_t head = 0; head < heads; ++head) {
            prompt.reserve(head, 60, false);
            prompt.append(head, 60, random);
        }
        const auto work = [&](std::uint64_t seed) {
            SplitMix64 mine{seed};
            for (int round = 0; round < 6; ++round) {
                Pair fork = prompt;
                std::optional<Pair> mark;
                for (int step = 0; step < 12; ++step) {
                    const std::size_t head = mine() % heads, count = mine() % 12;
                    fork.reserve(head, count, true);
                    fork.append(head, count, mine);
                    std::size_t kept = 0;
                    const auto moves = compaction(fork.storage.rows(head), mine, kept);
                    fork.apply(head, moves, kept);
                    if (step == 4) mark.emplace(fork);
                }
                wrong += differences(fork.storage, fork.model) + differences(mark->storage, mark->model) +
                         differences(prompt.storage, prompt.model);
            }
        };
        std::vector<std::thread> threads;
        for (std::uint64_t seed = 1; seed <= 4; ++seed) threads.emplace_back(work, seed);
        for (std::thread& thread : threads) thread.join();
        REQUIRE(wrong == 0);
        REQUIRE(pool.bytes() == prompt.storage.bytes());
        for (std::size_t head = 0; head < heads; ++head) {
            REQUIRE(prompt.storage.blocks_needed(head, 0, true) == 0);  // nobody shares its blocks any more
        }
    }
    REQUIRE(pool.bytes() == 0);
}
