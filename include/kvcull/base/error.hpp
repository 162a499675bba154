#pragma once
/// One error hierarchy. Everything is thrown before anything changed, and every message names the function,
/// the argument, what was got and what was wanted.

#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>

#include "config.hpp"

namespace kvcull::inline KVCULL_ABI::error {

/// Base of all: `catch (const kvcull::error::exception&)`.
struct exception : std::runtime_error {
    using std::runtime_error::runtime_error;
};
/// A view, span or count does not fit the others.
struct shape_error : exception {
    using exception::exception;
};
/// A parameter of a policy, budget, cache or pool is out of range, or two of them exclude each other.
struct config_error : exception {
    using exception::exception;
};
/// A call out of order, or data that a policy needs and nobody gave.
struct state_error : exception {
    using exception::exception;
};
/// The pool cannot give the blocks that the call needs.
struct capacity_error : state_error {
    using state_error::state_error;
};
/// A file is truncated, malformed or foreign.
struct format_error : exception {
    using exception::exception;
};
/// The system refused a call on a file.
struct io_error : exception {
    io_error(const std::string& message, int code_) : exception(message), code(code_) {}
    int code;  ///< errno
};

}  // namespace kvcull::inline KVCULL_ABI::error

namespace kvcull::inline KVCULL_ABI::detail {

[[nodiscard]] inline std::string to_text(std::string_view text) {
    return std::string(text);
}
[[nodiscard]] inline std::string to_text(const char* text) {
    return text;
}
[[nodiscard]] inline std::string to_text(const std::string& text) {
    return text;
}
template <class Number>
requires std::is_arithmetic_v<Number>
[[nodiscard]] std::string to_text(Number number) {
    return std::to_string(number);
}

/// Text in parts, put together only when an error is thrown: checks on hot paths must not allocate. Holds
/// references: use it as an argument.
template <class... Parts>
struct Text {
    std::tuple<const Parts&...> parts;
};
template <class... Parts>
[[nodiscard]] constexpr Text<Parts...> text(const Parts&... parts) noexcept {
    return {{parts...}};
}
template <class... Parts>
[[nodiscard]] std::string to_text(const Text<Parts...>& text) {
    return std::apply([](const auto&... part) { return (std::string{} + ... + to_text(part)); }, text.parts);
}

/// "where: argument is GOT, want WANTED".
template <class Error, class Argument, class Got, class Wanted>
[[noreturn, gnu::cold, gnu::noinline]] void fail(std::string_view where, const Argument& argument,
                                                 const Got& got, const Wanted& wanted) {
    throw Error(to_text(where) + ": " + to_text(argument) + " is " + to_text(got) + ", want " +
                to_text(wanted));
}

/// Throws a shape_error unless `got == wanted`.
template <class Argument, class Got, class Wanted>
void check_size(std::string_view where, const Argument& argument, const Got& got, const Wanted& wanted) {
    if (got != wanted) [[unlikely]]
        fail<error::shape_error>(where, argument, got, wanted);
}

/// Throws `Error` with the same message form unless `good`.
template <class Error, class Argument, class Got, class Wanted>
void check(bool good, std::string_view where, const Argument& argument, const Got& got,
           const Wanted& wanted) {
    if (!good) [[unlikely]]
        fail<Error>(where, argument, got, wanted);
}

}  // namespace kvcull::inline KVCULL_ABI::detail
