#pragma once
/// The numbers of a policy's state, part by part, so that they can be written and read back.

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../score/state.hpp"
#include "kv_cache.hpp"

namespace kvcull::inline KVCULL_ABI {

namespace detail {

/// Lists all that it holds.
template <class T>
concept HasParts = requires(T& thing) {
    thing.parts();
};
/// May hold numbers that contradict each other.
template <class T>
concept CanBeWrong = requires(const T& thing) {
    { thing.consistent() } -> std::same_as<bool>;
};
/// Remembers more than numbers per row, and lists that too.
template <class State>
concept HasRest = requires(State& state) {
    state.rest();
};

template <class State>
inline constexpr std::size_t array_bytes = 0;
template <class State>
requires(std::tuple_size_v<decltype(std::declval<State&>().arrays())> >
         0) inline constexpr std::size_t array_bytes<State> = []<class... Arrays>(std::tuple<Arrays&...>*) {
    return (sizeof(Arrays) + ...);
}(static_cast<decltype(std::declval<State&>().arrays())*>(nullptr));

/// A part as numbers in a row; a truth value is a byte.
template <class T>
[[nodiscard]] std::vector<T> numbers_of(const RowArray<T>& array) {
    return {array.values().begin(), array.values().end()};
}
template <class T>
[[nodiscard]] std::vector<T> numbers_of(const RowPlanes<T>& planes) {
    return planes.values();
}
template <class T>
[[nodiscard]] std::vector<T> numbers_of(const std::vector<T>& numbers) {
    return numbers;
}
template <class T>
requires std::is_arithmetic_v<T>
[[nodiscard]] auto numbers_of(T number) {
    using Byte = std::conditional_t<std::same_as<T, bool>, std::uint8_t, T>;
    return std::vector<Byte>{static_cast<Byte>(number)};
}

/// How many numbers a part like this one has over `rows` rows.
template <class T>
[[nodiscard]] std::size_t count_of(const RowArray<T>& array, std::size_t rows) noexcept {
    return rows * array.width();
}
template <class T>
[[nodiscard]] std::size_t count_of(const RowPlanes<T>& planes, std::size_t rows) noexcept {
    return rows * planes.planes();
}
template <class T>
[[nodiscard]] std::size_t count_of(const std::vector<T>& numbers, std::size_t /*rows*/) noexcept {
    return numbers.size();
}
template <class T>
requires std::is_arithmetic_v<T>
[[nodiscard]] std::size_t count_of(T /*number*/, std::size_t /*rows*/) noexcept {
    return 1;
}

/// Makes a part of `count_of` numbers what they say.
template <class T>
void assign(RowArray<T>& array, std::size_t rows, std::span<const T> numbers) {
    array.resize(rows);
    std::copy(numbers.begin(), numbers.end(), array.values().begin());
}
template <class T>
void assign(RowPlanes<T>& planes, std::size_t rows, std::span<const T> numbers) {
    planes.resize(rows);
    for (std::size_t plane = 0; plane < planes.planes(); ++plane)
        std::copy_n(numbers.begin() + static_cast<std::ptrdiff_t>(plane * rows), rows, planes[plane].begin());
}
template <class T>
void assign(std::vector<T>& all, std::size_t /*rows*/, std::span<const T> numbers) {
    std::copy(numbers.begin(), numbers.end(), all.begin());
}
template <class T, class Number>
requires std::is_arithmetic_v<T>
void assign(T& number, std::size_t /*rows*/, std::span<const Number> numbers) {
    number = static_cast<T>(numbers.front());
}

/// Calls `visit` for every part of a list, and for the parts of those that have some.
template <class... Parts, class Visit>
void for_each_part(std::tuple<Parts&...> parts, Visit& visit) {
    const auto show = [&]<class Part>(Part& part) {
        if constexpr (HasParts<Part>)
            for_each_part(part.parts(), visit);
        else
            visit(part);
    };
    std::apply([&](Parts&... each) { (show(each), ...); }, parts);
}
/// Calls `visit(part)` for all of a state, per-row arrays first, in an order that never changes.
template <class State, class Visit>
void for_each_part(State& state, Visit&& visit) {
    if constexpr (std::tuple_size_v < decltype(state.arrays()) >> 0) for_each_part(state.arrays(), visit);
    if constexpr (HasRest<State>) for_each_part(state.rest(), visit);
}
/// Whether no number of a state contradicts another.
template <class State>
[[nodiscard]] bool consistent(State& state) {
    bool good = true;
    if constexpr (HasRest<State>)
        std::apply(
            [&]<class... Parts>(Parts&... parts) {
                const auto check = [&]<class Part>(const Part& part) {
                    if constexpr (CanBeWrong<Part>) good = good && part.consistent();
                };
                (check(parts), ...);
            },
            state.rest());
    return good;
}

/// A state as policy and shape make it once it has seen tokens: what is read back must have its sizes.
template <class P>
[[nodiscard]] typename P::State state_in_use(const CacheShape& shape, const P& policy) {
    if constexpr (std::is_empty_v<typename P::State> || SideInput<P>) {
        return {};
    } else {
        CacheShape one = shape;
        one.layers = 1;
        one.traits = {};
        KVCache<P> cache(one, policy,
                         Budget{.tokens = std::size_t{1} << 20U});  // more than any parameter wants
        const std::vector<float> zeros(std::max(shape.q_heads, shape.kv_heads) *
                                       std::max(shape.head_dim, shape.values()));
        std::vector<float> out(shape.q_heads * shape.values());
        const auto heads = [&](std::size_t count, std::size_t dim) {
            return head_major(zeros.data(), count, 1, dim);
        };
        const auto step = [&] {
            if (shape.latent)
                cache.append(0, heads(shape.kv_heads, shape.head_dim), {});
            else
                cache.append(0, heads(shape.kv_heads, shape.head_dim), heads(shape.kv_heads, shape.values()));
            cache.attend(0, heads(shape.q_heads, shape.head_dim),
                         head_major(out.data(), shape.q_heads, 1, shape.values()));
            cache.end_step();
        };
        cache.begin_prompt(1);
        step();
        cache.end_prompt();
        step();
        typename P::State state = cache.evictor().live().states[0];
        resize_state(state, 0);
        shrink_state(state);
        return state;
    }
}

}  // namespace detail

/// Has a state per sequence that can be written as numbers with `parts()`; nothing comes of numbers that
/// contradict each other.
template <class P>
concept SavedSequence = SequenceState<P> && requires(const typename P::Sequence& sequence) {
    sequence.numbers().parts();
    { P::Sequence::from(sequence.numbers()) } -> std::same_as<std::optional<typename P::Sequence>>;
};
/// Policies all of whose state can be written and read back, so that a cache that was loaded goes on exactly
/// like the one that was saved: it is its per-row arrays, or lists the rest as well, in `rest()`.
template <class P>
concept Savable = Policy<P> &&
    (!SequenceState<P> ||
     SavedSequence<P>)&&(std::is_empty_v<typename P::State> ||
                         sizeof(typename P::State) == detail::array_bytes<typename P::State> ||
                         detail::HasRest<typename P::State>);

}  // namespace kvcull::inline KVCULL_ABI
