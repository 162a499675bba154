#pragma once
/// The machine's two limits, measured: how fast memory can be read and how many multiply-adds it does. Plain
/// loops in the instruction set and on the threads of the case that is compared with them, over its memory.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "clock.hpp"
#include "kvcull/simd/kernels.hpp"

#if KVCULL_X86
#    include <immintrin.h>
#endif

namespace kvcull::bench {

/// One loop each: `read` goes once over `count` 64-byte lines; `multiply_add` does `rounds` times `per_round`
/// of them, on more independent sums than latency times throughput asks for.
namespace limits::scalar {
inline constexpr std::size_t per_round = 48;

inline std::uint64_t read(const std::uint64_t* x, std::size_t count) {
    std::uint64_t sum[8] = {};
    for (std::size_t i = 0; i < 8 * count; i += 8)
        for (std::size_t lane = 0; lane < 8; ++lane) sum[lane] ^= x[i + lane];
    for (std::size_t lane = 1; lane < 8; ++lane) sum[0] ^= sum[lane];
    return sum[0];
}
inline float multiply_add(std::size_t rounds) {
    float sum[per_round];
    for (std::size_t lane = 0; lane < per_round; ++lane) sum[lane] = static_cast<float>(lane);
    volatile float given = 0.999F;  // so that nothing is computed before the program runs
    const float factor = given, term = 1.0F - given;
    for (std::size_t i = 0; i < rounds; ++i)
        for (std::size_t lane = 0; lane < per_round; ++lane) sum[lane] = sum[lane] * factor + term;
    for (std::size_t lane = 1; lane < per_round; ++lane) sum[0] += sum[lane];
    return sum[0];
}
}  // namespace limits::scalar

#if KVCULL_X86
}  // namespace kvcull::bench

KVCULL_TARGET_BEGIN("avx2,fma")
namespace kvcull::bench::limits::avx2 {
inline constexpr std::size_t per_round = 96;

inline std::uint64_t read(const std::uint64_t* x, std::size_t count) {
    __m256i sum[4];
    for (__m256i& lane : sum) lane = _mm256_setzero_si256();
    for (std::size_t i = 0; i + 1 < count; i += 2)
#    pragma GCC unroll 4
        for (std::size_t lane = 0; lane < 4; ++lane)
            sum[lane] = _mm256_xor_si256(
                sum[lane], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 8 * i + 4 * lane)));
    alignas(32) std::uint64_t word[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(word),
                       _mm256_xor_si256(_mm256_xor_si256(sum[0], sum[1]), _mm256_xor_si256(sum[2], sum[3])));
    return word[0] ^ word[1] ^ word[2] ^ word[3];
}
inline float multiply_add(std::size_t rounds) {
    volatile float given = 0.999F;
    const __m256 factor = _mm256_set1_ps(given), term = _mm256_set1_ps(1.0F - given);
    __m256 sum[12];
    for (__m256& lane : sum) lane = term;
    for (std::size_t i = 0; i < rounds; ++i)
#    pragma GCC unroll 12
        for (__m256& lane : sum) lane = _mm256_fmadd_ps(lane, factor, term);
    alignas(32) float number[8];
    for (std::size_t lane = 1; lane < 12; ++lane) sum[0] = sum[0] + sum[lane];
    _mm256_store_ps(number, sum[0]);
    return number[0];
}
}  // namespace kvcull::bench::limits::avx2
KVCULL_TARGET_END

KVCULL_TARGET_BEGIN("avx512f")
namespace kvcull::bench::limits::avx512 {
inline constexpr std::size_t per_round = 192;

inline std::uint64_t read(const std::uint64_t* x, std::size_t count) {
    __m512i sum[4];
    for (__m512i& lane : sum) lane = _mm512_set1_epi32(0);
    for (std::size_t i = 0; i + 3 < count; i += 4)
#    pragma GCC unroll 4
        for (std::size_t lane = 0; lane < 4; ++lane)
            sum[lane] = _mm512_xor_si512(sum[lane], _mm512_loadu_si512(x + 8 * (i + lane)));
    alignas(64) std::uint64_t word[8];
    _mm512_store_si512(word,
                       _mm512_xor_si512(_mm512_xor_si512(sum[0], sum[1]), _mm512_xor_si512(sum[2], sum[3])));
    return word[0] ^ word[1] ^ word[2] ^ word[3] ^ word[4] ^ word[5] ^ word[6] ^ word[7];
}
inline float multiply_add(std::size_t rounds) {
    volatile float given = 0.999F;
    const __m512 factor = _mm512_set1_ps(given), term = _mm512_set1_ps(1.0F - given);
    __m512 sum[12];
    for (__m512& lane : sum) lane = term;
    for (std::size_t i = 0; i < rounds; ++i)
#    pragma GCC unroll 12
        for (__m512& lane : sum) lane = _mm512_fmadd_ps(lane, factor, term);
    alignas(64) float number[16];
    for (std::size_t lane = 1; lane < 12; ++lane) sum[0] = sum[0] + sum[lane];
    _mm512_store_ps(number, sum[0]);
    return number[0];
}
}  // namespace kvcull::bench::limits::avx512
KVCULL_TARGET_END

namespace kvcull::bench {
#endif

/// The loops of one instruction set.
struct Limits {
    std::uint64_t (*read)(const std::uint64_t*, std::size_t);
    float (*multiply_add)(std::size_t);
    std::size_t per_round;
};
[[nodiscard]] inline Limits limits_of(std::string_view isa) {
#if KVCULL_X86
    if (isa == "avx512")
        return {limits::avx512::read, limits::avx512::multiply_add, limits::avx512::per_round};
    if (isa == "avx2") return {limits::avx2::read, limits::avx2::multiply_add, limits::avx2::per_round};
#endif
    return {limits::scalar::read, limits::scalar::multiply_add, limits::scalar::per_round};
}

/// Measures, each time it is asked, what a case of so many bytes and multiply-adds would take at the limits.
class Roofline {
  public:
    Roofline(std::string_view isa, Team& team) : limits_(limits_of(isa)), team_(&team) {}

    /// Time to read `memory` once, each thread its part.
    Time read(std::span<const std::byte> memory) {
        const std::size_t part = memory.size() / 64 / team_->threads();
        return team_->run([&](std::size_t thread) {
            sink_ =
                limits_.read(reinterpret_cast<const std::uint64_t*>(memory.data()) + 8 * thread * part, part);
        });
    }
    /// Time for `count` multiply-adds over all threads, from a sample of about a millisecond.
    Time multiply_adds(double count) {
        constexpr std::size_t rounds = 200000;
        const Time sample = team_->run([&](std::size_t) {
            const float sum = limits_.multiply_add(rounds);
            sink_ = static_cast<std::uint64_t>(sum);
        });
        const double done = static_cast<double>(rounds * limits_.per_round * team_->threads());
        return {sample.wall * count / done, sample.busy * count / done};
    }

  private:
    Limits limits_;
    Team* team_;
    std::atomic<std::uint64_t> sink_ = 0;
};

}  // namespace kvcull::bench
