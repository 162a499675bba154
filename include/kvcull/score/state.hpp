#pragma once
/// Per-row state of a policy. A state lists its arrays once, in `arrays()`; growth, compaction and byte
/// counts derive from that list, so statistics cannot stay behind when rows move. What else it remembers
/// (numbers, vectors, things with `parts()`) it lists in `rest()`, if caches of the policy are to be saved.

#include <algorithm>
#include <cstddef>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

#include "../base/types.hpp"
#include "../views.hpp"

namespace kvcull::inline KVCULL_ABI {

/// `width` numbers for every cached row of one KV head. New rows start at zero.
template <class T>
class RowArray {
  public:
    RowArray() = default;
    explicit RowArray(std::size_t width) noexcept : width_(width) {}

    [[nodiscard]] std::size_t rows() const noexcept { return values_.size() / width_; }
    [[nodiscard]] std::size_t width() const noexcept { return width_; }
    [[nodiscard]] std::span<T> values() noexcept { return values_; }
    [[nodiscard]] std::span<const T> values() const noexcept { return values_; }
    [[nodiscard]] T& operator[](std::size_t row) noexcept { return values_[row * width_]; }
    [[nodiscard]] const T& operator[](std::size_t row) const noexcept { return values_[row * width_]; }
    [[nodiscard]] std::size_t bytes() const noexcept { return values_.capacity() * sizeof(T); }

    void reserve(std::size_t rows) { values_.reserve(rows * width_); }
    void shrink() { values_.shrink_to_fit(); }
    void resize(std::size_t rows) { values_.resize(rows * width_, T{}); }
    void apply(std::span<const Move> moves, std::size_t rows) noexcept {
        for (const Move& move : moves)
            for (std::size_t i = 0; i < width_; ++i)
                values_[static_cast<std::size_t>(move.to) * width_ + i] =
                    values_[static_cast<std::size_t>(move.from) * width_ + i];
        values_.resize(rows * width_);
    }

  private:
    std::size_t width_ = 1;
    std::vector<T> values_;
};

/// A number for every cached row of one KV head in each of several planes, such as one per query head of the
/// group; every plane is contiguous. None until `set_planes`.
template <class T>
class RowPlanes {
  public:
    [[nodiscard]] std::size_t planes() const noexcept { return planes_; }
    [[nodiscard]] std::span<T> operator[](std::size_t plane) noexcept {
        return std::span(values_).subspan(plane * stride_, rows_);
    }
    [[nodiscard]] std::span<const T> operator[](std::size_t plane) const noexcept {
        return std::span(values_).subspan(plane * stride_, rows_);
    }
    /// [planes, rows]
    [[nodiscard]] MatrixView<const T> view() const noexcept {
        return {values_.data(), planes_, rows_, stride_};
    }
    /// `count` planes of `rows` zeros.
    void set_planes(std::size_t count, std::size_t rows) {
        values_.clear();
        planes_ = count;
        rows_ = stride_ = 0;
        reserve(reserved_);
        resize(rows);
    }
    /// All values, plane after plane: a copy.
    [[nodiscard]] std::vector<T> values() const {
        std::vector<T> all;
        for (std::size_t plane = 0; plane < planes_; ++plane)
            all.insert(all.end(), (*this)[plane].begin(), (*this)[plane].end());
        return all;
    }
    [[nodiscard]] std::size_t bytes() const noexcept { return values_.capacity() * sizeof(T); }

    void reserve(std::size_t rows) {
        reserved_ = std::max(reserved_, rows);
        if (planes_ > 0 && rows > stride_) spread(rows);
    }
    void shrink() {
        reserved_ = 0;
        if (stride_ > rows_) spread(rows_);
    }
    void resize(std::size_t rows) {
        if (planes_ == 0) return;
        if (rows > stride_) spread(std::max(rows, stride_ + stride_ / 2));
        for (std::size_t plane = 0; rows > rows_ && plane < planes_; ++plane)
            std::fill_n(values_.data() + plane * stride_ + rows_, rows - rows_, T{});
        rows_ = rows;
    }
    void apply(std::span<const Move> moves, std::size_t rows) noexcept {
        for (std::size_t plane = 0; plane < planes_; ++plane)
            for (const Move& move : moves)
                (*this)[plane][static_cast<std::size_t>(move.to)] =
                    (*this)[plane][static_cast<std::size_t>(move.from)];
        rows_ = std::min(rows_, rows);
    }

  private:
    /// Room for `stride` rows in every plane.
    void spread(std::size_t stride) {
        std::vector<T> values(planes_ * stride);
        for (std::size_t plane = 0; plane < planes_; ++plane)
            std::copy((*this)[plane].begin(), (*this)[plane].end(),
                      values.begin() + static_cast<std::ptrdiff_t>(plane * stride));
        values_ = std::move(values);
        stride_ = stride;
    }

    std::vector<T> values_;
    std::size_t planes_ = 0, rows_ = 0, stride_ = 0;  // values from one plane to the next
    std::size_t reserved_ = 0;                        // rows that planes to come must hold without growing
};

/// State of a policy that remembers nothing.
struct NoState {
    [[nodiscard]] static std::tuple<> arrays() noexcept { return {}; }
};

namespace detail {
template <class State, class Visit>
void for_each_array(State& state, Visit&& visit) {
    std::apply([&](auto&... array) { (visit(array), ...); }, state.arrays());
}
}  // namespace detail

/// Gives every array `rows` rows; rows that are new hold zeros.
template <class State>
void resize_state(State& state, std::size_t rows) {
    detail::for_each_array(state, [&](auto& array) { array.resize(rows); });
}
template <class State>
void reserve_state(State& state, std::size_t rows) {
    detail::for_each_array(state, [&](auto& array) { array.reserve(rows); });
}
/// Gives memory that no row uses back.
template <class State>
void shrink_state(State& state) {
    detail::for_each_array(state, [](auto& array) { array.shrink(); });
}
/// The cache moved its rows: the state follows.
template <class State>
void move_state(State& state, std::span<const Move> moves, std::size_t rows) noexcept {
    detail::for_each_array(state, [&](auto& array) { array.apply(moves, rows); });
}
/// Bytes of the per-row arrays.
template <class State>
[[nodiscard]] std::size_t state_bytes(const State& state) {
    std::size_t bytes = 0;
    // `arrays()` lists references and so is not const; nothing is changed through them here.
    detail::for_each_array(const_cast<State&>(state), [&](auto& array) { bytes += array.bytes(); });
    return bytes;
}

}  // namespace kvcull::inline KVCULL_ABI
