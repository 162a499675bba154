#pragma once
/// Aligned scratch memory and the library's one random generator.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "config.hpp"

namespace kvcull::inline KVCULL_ABI {

/// 64-byte aligned array of trivial values that are not initialised. Grows only; contents do not survive
/// growth: it is scratch space that is written before it is read.
template <class T>
class Scratch {
    static_assert(std::is_trivially_copyable_v<T>);

  public:
    static constexpr std::size_t alignment = 64;

    Scratch() = default;
    Scratch(const Scratch&) noexcept {}  // scratch holds no value worth copying
    Scratch& operator=(const Scratch&) noexcept { return *this; }
    Scratch(Scratch&& other) noexcept
        : data_(std::move(other.data_)), capacity_(std::exchange(other.capacity_, 0)) {}
    Scratch& operator=(Scratch&& other) noexcept {
        data_ = std::move(other.data_);
        capacity_ = std::exchange(other.capacity_, 0);
        return *this;
    }
    ~Scratch() = default;

    /// Room for `count` values. Allocates only if more than ever before are asked for.
    T* get(std::size_t count) {
        if (count > capacity_) {
            data_.reset(static_cast<T*>(::operator new (count * sizeof(T), std::align_val_t{alignment})));
            capacity_ = count;
        }
        return data_.get();
    }
    [[nodiscard]] T* data() noexcept { return data_.get(); }
    [[nodiscard]] std::size_t bytes() const noexcept { return capacity_ * sizeof(T); }

  private:
    struct Delete {
        void operator()(T* data) const noexcept { ::operator delete (data, std::align_val_t{alignment}); }
    };
    std::unique_ptr<T, Delete> data_;
    std::size_t capacity_ = 0;
};

/// SplitMix64: the same stream on every platform and standard library. A value: copying it forks the stream.
struct SplitMix64 {
    std::uint64_t state = 0;

    constexpr std::uint64_t operator()() noexcept {
        std::uint64_t z = state += 0x9E3779B97F4A7C15U;
        z = (z ^ (z >> 30U)) * 0xBF58476D1CE4E5B9U;
        z = (z ^ (z >> 27U)) * 0x94D049BB133111EBU;
        return z ^ (z >> 31U);
    }
    /// In [0, 1), 53 bits.
    constexpr double uniform() noexcept { return static_cast<double>((*this)() >> 11U) * 0x1.0p-53; }
};

}  // namespace kvcull::inline KVCULL_ABI
