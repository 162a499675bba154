#pragma once
/// Rows of many KV heads, each of its own length, in blocks that forks share until one of them writes.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../attention/columns.hpp"
#include "../base/config.hpp"
#include "../base/error.hpp"
#include "../base/types.hpp"
#include "../simd/kernels.hpp"
#include "../views.hpp"
#include "blocks.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Where the parts of a row lie in a block: K rows, V rows, positions, each part dense and 64-byte aligned.
struct RowLayout {
    std::size_t key_dim = 0, value_dim = 0;
    DType dtype = DType::f32;
    std::size_t block_rows = 64;
    bool latent = false;  // a value is the front of its key: no values are stored

    [[nodiscard]] constexpr std::size_t key_bytes() const noexcept {
        return kvcull::row_bytes(dtype, key_dim);
    }
    [[nodiscard]] constexpr std::size_t value_bytes() const noexcept {
        return latent ? 0 : kvcull::row_bytes(dtype, value_dim);
    }
    /// K, V and position of one row.
    [[nodiscard]] constexpr std::size_t row_bytes() const noexcept {
        return key_bytes() + value_bytes() + sizeof(position_t);
    }
    [[nodiscard]] constexpr std::size_t key_offset() const noexcept { return 0; }
    [[nodiscard]] constexpr std::size_t value_offset() const noexcept {
        return aligned(block_rows * key_bytes());
    }
    [[nodiscard]] constexpr std::size_t position_offset() const noexcept {
        return aligned(value_offset() + block_rows * value_bytes());
    }
    [[nodiscard]] constexpr std::size_t payload_bytes() const noexcept {
        return position_offset() + block_rows * sizeof(position_t);
    }
    /// What a block takes from the pool: payload, padding and header.
    [[nodiscard]] constexpr std::size_t block_bytes() const noexcept {
        return BlockPool::footprint(payload_bytes());
    }
    /// Blocks that `rows` rows take.
    [[nodiscard]] constexpr std::size_t blocks_for(std::size_t rows) const noexcept {
        return rows / block_rows + (rows % block_rows != 0 ? 1 : 0);
    }

  private:
    [[nodiscard]] static constexpr std::size_t aligned(std::size_t bytes) noexcept {
        return (bytes + 63) / 64 * 64;
    }
};

/// `heads` tables of blocks. All that can fail happens in the constructors and in the `reserve_*` calls; what
/// changes rows afterwards takes its blocks from the spares, so a step that reserved enough cannot fail
/// halfway. A copy shares all blocks and costs no row; whoever writes to a shared block first takes a spare
/// and copies it. One thread at a time changes an object, different heads included; several may read or copy
/// it while nobody does, and objects that share blocks may work in parallel.
class Storage {
  public:
    static constexpr std::size_t max_dim = 65536;

    /// @throws config_error if a dimension is not in 1 .. 65536 or `block_rows` not in 1 .. 4096.
    Storage(std::size_t heads, RowLayout layout, BlockPool& pool)
        : layout_(checked(layout)), kernels_(&simd::kernels()), pool_(&pool), tables_(heads) {}
    /// Shares the blocks of all heads; spares stay with the original.
    Storage(const Storage& other)
        : layout_(other.layout_),
          kernels_(other.kernels_),
          pool_(other.pool_),
          tables_(other.tables_),
          bytes_moved_(other.bytes_moved_) {
        mark_shared(other);
        for (const Table& table : tables_) {
            for (std::byte* block : table.blocks) BlockPool::retain(block);
        }
    }
    Storage(Storage&& other) noexcept
        : layout_(other.layout_),
          kernels_(other.kernels_),
          pool_(other.pool_),
          tables_(std::move(other.tables_)),
          spares_(std::move(other.spares_)),
          bytes_moved_(other.bytes_moved_),
          shares_(other.shares()) {}
    Storage& operator=(const Storage&) = delete;  // say `a = Storage(b)`: the copy may throw
    Storage& operator=(Storage&& other) noexcept {
        Storage taken(std::move(other));
        std::swap(layout_, taken.layout_);
        std::swap(kernels_, taken.kernels_);
        std::swap(pool_, taken.pool_);
        tables_.swap(taken.tables_);
        spares_.swap(taken.spares_);
        std::swap(bytes_moved_, taken.bytes_moved_);
        shares_.store(taken.shares(), std::memory_order_relaxed);
        return *this;
    }
    ~Storage() {
        for (std::size_t head = 0; head < tables_.size(); ++head) truncate(head, 0);
        release_spares(0);
    }

    [[nodiscard]] const RowLayout& layout() const noexcept { return layout_; }
    [[nodiscard]] std::size_t heads() const noexcept { return tables_.size(); }
    [[nodiscard]] std::size_t rows(std::size_t head) const noexcept { return tables_[head].rows; }

    /// Rows of one head. Valid until the next change of that head.
    [[nodiscard]] HeadView view(std::size_t head) const noexcept {
        const Table& table = tables_[head];
        const std::byte* const* blocks = table.blocks.data();
        const auto part = [&](std::size_t offset, std::size_t dim, std::size_t stored_dim) {
            return RowsView(blocks, offset, layout_.dtype, layout_.block_rows, table.rows, dim,
                            elements(layout_.dtype, stored_dim));
        };
        return {part(layout_.key_offset(), layout_.key_dim, layout_.key_dim),
                layout_.latent ? part(layout_.key_offset(), layout_.value_dim, layout_.key_dim)
                               : part(layout_.value_offset(), layout_.value_dim, layout_.value_dim),
                PositionsView(blocks, layout_.position_offset(), layout_.block_rows, table.rows)};
    }

    /// Most spares that appending `rows` rows to `head` can take, and, with `rewrite`, an `apply` after it
    /// too: growth and every shared block that would be written. Cost: O(1), with `rewrite` O(blocks of the
    /// head).
    [[nodiscard]] std::size_t blocks_needed(std::size_t head, std::size_t rows, bool rewrite) const noexcept {
        const Table& table = tables_[head];
        std::size_t count = layout_.blocks_for(table.rows + rows) - table.blocks.size();
        if (rewrite) {
            count += shared_blocks(table);
        } else if (rows > 0 && table.rows % layout_.block_rows != 0) {
            count += BlockPool::use_count(table.blocks.back()) > 1 ? 1 : 0;
        }
        return count;
    }
    /// Spares that `apply` of these moves takes: every shared block that it writes. Cost: O(moves).
    [[nodiscard]] std::size_t blocks_copied(std::size_t head, std::span<const Move> moves) const noexcept {
        std::size_t count = 0, last = layout_.blocks_for(rows(head));  // none
        if (!shares()) return 0;
        for (const Move& move : moves) {
            const std::size_t block = static_cast<std::size_t>(move.to) / layout_.block_rows;
            if (move.from == move.to || block == last) continue;
            last = block;
            count += BlockPool::use_count(tables_[head].blocks[block]) > 1 ? 1 : 0;
        }
        return count;
    }
    /// Fewest spares that come back when `head`, `rows` rows longer, is cut to `after` rows while freed
    /// blocks are kept. Cost: O(blocks of the head).
    [[nodiscard]] std::size_t blocks_freed(std::size_t head, std::size_t rows,
                                           std::size_t after) const noexcept {
        const Table& table = tables_[head];
        const std::size_t dropped =
            layout_.blocks_for(table.rows + rows) - layout_.blocks_for(std::min(after, table.rows + rows));
        return dropped - std::min(dropped, shared_blocks(table));
    }
    /// While on, blocks that lose their last row become spares instead of going back to the pool: what one
    /// layer evicts, the next one may use.
    void keep_freed(bool on) noexcept { keep_freed_ = on; }
    /// Makes sure that at least `count` spares are at hand.
    /// @throws capacity_error if the pool cannot give them; nothing has changed then.
    void reserve_spares(std::size_t count) {
        std::size_t blocks = 0;
        for (const Table& table : tables_) blocks += table.blocks.size();
        if (spares_.capacity() < count + blocks) spares_.reserve(2 * (count + blocks));
        if (count > spares_.size()) pool_->acquire(layout_.payload_bytes(), count - spares_.size(), spares_);
    }
    /// Gives all but `keep` spares back to the pool.
    void release_spares(std::size_t keep) noexcept {
        while (spares_.size() > keep) {
            pool_->release(spares_.back());
            spares_.pop_back();
        }
    }
    [[nodiscard]] std::size_t spares() const noexcept { return spares_.size(); }
    /// Whether blocks may be shared with another storage.
    [[nodiscard]] bool shares() const noexcept { return shares_.load(std::memory_order_relaxed); }
    /// Makes room in every table for `rows` rows (8 bytes per block), so that no append up to there
    /// allocates. An append beyond it may call the allocator, whose failure would end the program: reserve
    /// first.
    /// @throws std::bad_alloc; rows and spares are then unchanged.
    void reserve_rows(std::size_t rows) {
        const std::size_t blocks = layout_.blocks_for(rows);
        for (Table& table : tables_) {
            if (blocks > table.blocks.capacity()) {
                table.blocks.reserve(std::max(blocks, 2 * table.blocks.capacity()));
            }
        }
    }

    /// Appends `count` rows to `head`, converted to the element type of the layout (round to nearest even).
    /// @param k  `[count, key_dim]`, rows `k_stride` elements apart; `v` likewise `[count, value_dim]`, not
    /// read if values are latent.
    /// @param positions  `[count]`.
    void append(std::size_t head, std::size_t count, const float* k, std::size_t k_stride, const float* v,
                std::size_t v_stride, const position_t* positions) noexcept {
        Table& table = tables_[head];
        const std::size_t block_rows = layout_.block_rows;
        if (count > 0 && table.rows % block_rows != 0) own(table, table.rows / block_rows);
        for (std::size_t done = 0; done < count;) {
            const std::size_t slot = table.rows % block_rows;
            if (slot == 0) table.blocks.push_back(take_spare());
            std::byte* block = table.blocks.back();
            const std::size_t n = std::min(count - done, block_rows - slot);
            write(k + done * k_stride, k_stride, layout_.key_dim, n,
                  block + layout_.key_offset() + slot * layout_.key_bytes());
            if (!layout_.latent)
                write(v + done * v_stride, v_stride, layout_.value_dim, n,
                      block + layout_.value_offset() + slot * layout_.value_bytes());
            std::memcpy(block + layout_.position_offset() + slot * sizeof(position_t), positions + done,
                        n * sizeof(position_t));
            table.rows += n;
            done += n;
        }
    }

    /// Appends rows of the layout's dimensions and element type, bit for bit.
    void append(std::size_t head, const HeadView& rows) noexcept {
        Table& table = tables_[head];
        const std::size_t block_rows = layout_.block_rows;
        if (rows.rows() > 0 && table.rows % block_rows != 0) own(table, table.rows / block_rows);
        for (std::size_t j = 0; j < rows.rows(); ++j, ++table.rows) {
            const std::size_t slot = table.rows % block_rows;
            if (slot == 0) table.blocks.push_back(take_spare());
            std::byte* block = table.blocks.back();
            const position_t position = rows.position[j];
            detail::copy_rows(rows.k, {rows.k.row(j), j, 1},
                              block + layout_.key_offset() + slot * layout_.key_bytes());
            if (!layout_.latent)
                detail::copy_rows(rows.v, {rows.v.row(j), j, 1},
                                  block + layout_.value_offset() + slot * layout_.value_bytes());
            std::memcpy(block + layout_.position_offset() + slot * sizeof(position_t), &position,
                        sizeof(position_t));
        }
    }

    /// Copies rows (K, V and position, bit for bit) in the order of `moves`, then cuts `head` to `new_rows`
    /// rows; blocks that hold no row any more go back to the pool. Neighbouring moves are copied as one run.
    void apply(std::size_t head, std::span<const Move> moves, std::size_t new_rows) noexcept {
        Table& table = tables_[head];
        const std::size_t block_rows = layout_.block_rows;
        for (std::size_t i = 0; i < moves.size();) {
            const std::size_t from = static_cast<std::size_t>(moves[i].from);
            const std::size_t to = static_cast<std::size_t>(moves[i].to);
            KVCULL_ASSERT(from < table.rows && to < table.rows);
            const std::size_t run = run_length(moves.subspan(i), from, to);
            i += run;
            if (from == to) continue;
            own(table, to / block_rows);
            copy_rows(table.blocks[from / block_rows], from % block_rows, table.blocks[to / block_rows],
                      to % block_rows, run);
            bytes_moved_ += run * layout_.row_bytes();
        }
        truncate(head, new_rows);
    }

    /// Drops all rows of `head` from `rows` on; blocks that hold no row any more go back to the pool (or to
    /// the spares, see `keep_freed`).
    void truncate(std::size_t head, std::size_t rows) noexcept {
        Table& table = tables_[head];
        KVCULL_ASSERT(rows <= table.rows);
        table.rows = rows;
        const std::size_t blocks = layout_.blocks_for(rows);
        while (table.blocks.size() > blocks) {
            std::byte* block = table.blocks.back();
            table.blocks.pop_back();
            if (keep_freed_ && BlockPool::use_count(block) == 1 && spares_.size() < spares_.capacity())
                spares_.push_back(block);
            else
                pool_->release(block);
        }
    }

    /// Back to what `past`, an earlier copy of this object, holds. Spares and room in the tables stay.
    /// @throws std::bad_alloc; nothing has changed then.
    void rewind(const Storage& past) {
        std::vector<Table> tables(past.tables_);
        mark_shared(past);
        for (std::size_t head = 0; head < tables.size(); ++head)
            tables[head].blocks.reserve(tables_[head].blocks.capacity());
        for (const Table& table : tables) {
            for (std::byte* block : table.blocks) BlockPool::retain(block);
        }
        for (std::size_t head = 0; head < tables_.size(); ++head) truncate(head, 0);
        tables_.swap(tables);
        bytes_moved_ = past.bytes_moved_;
    }

    /// Bytes of the blocks in the tables and of the spares, headers included. Shared blocks count in full.
    [[nodiscard]] std::size_t bytes() const noexcept {
        std::size_t blocks = spares_.size();
        for (const Table& table : tables_) blocks += table.blocks.size();
        return blocks * layout_.block_bytes();
    }
    /// Appends the blocks that `bytes()` counts, each once, for counting distinct blocks over several
    /// objects.
    void collect_blocks(std::vector<const std::byte*>& out) const {
        for (const Table& table : tables_) out.insert(out.end(), table.blocks.begin(), table.blocks.end());
        out.insert(out.end(), spares_.begin(), spares_.end());
    }
    /// Bytes of K, V and positions that `apply` has copied so far; copies of shared blocks do not count.
    [[nodiscard]] std::size_t bytes_moved() const noexcept { return bytes_moved_; }

  private:
    struct Table {
        std::vector<std::byte*> blocks;  // exactly those that hold rows
        std::size_t rows = 0;
    };

    [[nodiscard]] static RowLayout checked(RowLayout layout) {
        const auto in_range = [](std::string_view what, std::size_t value, std::size_t most) {
            detail::check<error::config_error>(value >= 1 && value <= most, "Storage", what, value,
                                               "1 .. " + std::to_string(most));
        };
        in_range("key_dim", layout.key_dim, max_dim);
        in_range("value_dim", layout.value_dim, layout.latent ? layout.key_dim : max_dim);
        in_range("block_rows", layout.block_rows, BlockPool::max_block_rows);
        return layout;
    }

    void mark_shared(const Storage& other) noexcept {
        shares_.store(true, std::memory_order_relaxed);
        other.shares_.store(true, std::memory_order_relaxed);
    }
    /// Use counts lie a block apart, a cache line each: they are looked at only if there was ever a copy.
    [[nodiscard]] std::size_t shared_blocks(const Table& table) const noexcept {
        std::size_t count = 0;
        if (shares())
            for (const std::byte* block : table.blocks) count += BlockPool::use_count(block) > 1 ? 1 : 0;
        return count;
    }
    [[nodiscard]] std::byte* take_spare() noexcept {
        KVCULL_ASSERT(!spares_.empty() && "reserve_spares(blocks_needed(..)) comes before a change");
        std::byte* block = spares_.back();
        spares_.pop_back();
        return block;
    }

    /// Makes block `index` of `table` writable: a shared one is replaced by a copy of its rows.
    void own(Table& table, std::size_t index) noexcept {
        std::byte* shared = table.blocks[index];
        if (BlockPool::use_count(shared) == 1) return;
        std::byte* copy = take_spare();
        copy_rows(shared, 0, copy, 0, std::min(layout_.block_rows, table.rows - index * layout_.block_rows));
        table.blocks[index] = copy;
        pool_->release(shared);
    }

    /// Leading moves that may be done as one memmove: both sides ascend row by row within one block each, and
    /// no row is read after the run wrote to it, so that the result is that of moving row by row.
    [[nodiscard]] std::size_t run_length(std::span<const Move> moves, std::size_t from,
                                         std::size_t to) const noexcept {
        const std::size_t block_rows = layout_.block_rows;
        std::size_t most =
            std::min({moves.size(), block_rows - from % block_rows, block_rows - to % block_rows});
        if (from < to) most = std::min(most, to - from);
        std::size_t run = 1;
        while (run < most && static_cast<std::size_t>(moves[run].from) == from + run &&
               static_cast<std::size_t>(moves[run].to) == to + run) {
            ++run;
        }
        return run;
    }

    void copy_rows(const std::byte* source, std::size_t from, std::byte* target, std::size_t to,
                   std::size_t count) const noexcept {
        const auto part = [&](std::size_t offset, std::size_t bytes) {
            std::memmove(target + offset + to * bytes, source + offset + from * bytes, count * bytes);
        };
        part(layout_.key_offset(), layout_.key_bytes());
        part(layout_.value_offset(), layout_.value_bytes());
        part(layout_.position_offset(), sizeof(position_t));
    }

    void write(const float* source, std::size_t stride, std::size_t dim, std::size_t count,
               std::byte* target) const noexcept {
        // Dense rows are one long run, if the last element of a row is full.
        if (stride == dim && dim % channels_of(layout_.dtype) == 0) {
            dim *= count;
            count = 1;
        }
        for (std::size_t row = 0; row < count; ++row)
            simd::narrow(*kernels_, layout_.dtype, source + row * stride, dim,
                         target + row * kvcull::row_bytes(layout_.dtype, dim));
    }

    RowLayout layout_;
    const simd::Kernels* kernels_;  // taken where a bad KVCULL_ISA may still throw
    BlockPool* pool_;
    std::vector<Table> tables_;
    std::vector<std::byte*> spares_;
    std::size_t bytes_moved_ = 0;
    // Blocks may have other owners. A copy tells its original too, and several threads may copy one original.
    mutable std::atomic<bool> shares_ = false;
    bool keep_freed_ = false;
};

}  // namespace kvcull::inline KVCULL_ABI
