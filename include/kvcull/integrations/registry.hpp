#pragma once
/// Run-time choice of a policy or a budget rule over a list that the caller writes:
/// "snapkv:window=16,pool=avg".

#include <algorithm>
#include <charconv>
#include <concepts>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../base/error.hpp"
#include "../score/concepts.hpp"
#include "../select/budget.hpp"

namespace kvcull::inline KVCULL_ABI {

namespace detail {

template <class T>
concept NamedValues = std::is_enum_v<T> && requires(T value) {
    names_of(value).size();
};

template <class T>
struct is_optional : std::false_type {};
template <class T>
struct is_optional<std::optional<T>> : std::true_type {};

inline void append_name(std::string& list, std::string_view name) {
    list += (list.empty() ? "one of " : ", ") + std::string(name);
}

/// Text to a parameter. @throws config_error that says what would do.
template <class T>
[[nodiscard]] T parse_value(std::string_view where, std::string_view key, std::string_view text) {
    const std::string got = "\"" + std::string(text) + "\"";
    if constexpr (is_optional<T>::value) {
        return parse_value<typename T::value_type>(where, key, text);
    } else if constexpr (requires { T::from_text(text); }) {
        return T::from_text(text);
    } else if constexpr (std::same_as<T, bool>) {
        if (text == "true" || text == "1") return true;
        if (text == "false" || text == "0") return false;
        fail<error::config_error>(where, key, got, "true or false");
    } else if constexpr (requires { T::parse(text).has_value(); }) {
        auto value = T::parse(text);
        check<error::config_error>(value.has_value(), where, key, got, "ids: 2+3+4");
        return *std::move(value);
    } else if constexpr (NamedValues<T>) {
        const auto names = names_of(T{});
        std::string known;
        for (std::size_t i = 0; i < names.size(); ++i) {
            if (names[i] == text) return static_cast<T>(i);
            append_name(known, names[i]);
        }
        fail<error::config_error>(where, key, got, known);
    } else {
        T value{};
        const auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), value);
        check<error::config_error>(code == std::errc{} && end == text.data() + text.size(), where, key, got,
                                   std::integral<T> ? "a whole number, not negative" : "a number");
        return value;
    }
}

/// Sets the field called `key`. @throws config_error that lists the fields.
template <class P>
void set_field(P& policy, std::string_view key, std::string_view text) {
    bool found = false;
    std::string known;
    std::apply(
        [&](const auto&... field) {
            [[maybe_unused]] const auto take = [&](const auto& one) {
                append_name(known, one.name);
                if (found || one.name != key) return;
                auto& parameter = one.of(policy);
                parameter = parse_value<std::remove_reference_t<decltype(parameter)>>(P::name, key, text);
                found = true;
            };
            (take(field), ...);
        },
        P::fields());
    check<error::config_error>(found, P::name, "parameter", "\"" + std::string(key) + "\"",
                               known.empty() ? std::string("nothing: it has no parameters") : known);
}

}  // namespace detail

/// Has a name and parameters: policies and most budget rules.
template <class P>
concept Named = std::default_initializable<P> && requires {
    { P::name } -> std::convertible_to<std::string_view>;
    P::fields();
};

/// Parameters of one policy or rule from "key=value,key=value"; what is not named keeps its default.
template <Named P>
[[nodiscard]] P parse_named(std::string_view parameters) {
    using error::config_error;
    P policy{};
    std::vector<std::string_view> keys;
    for (bool more = !parameters.empty(); more;) {
        const std::string_view item = parameters.substr(0, parameters.find(','));
        more = item.size() < parameters.size();
        parameters.remove_prefix(item.size() + (more ? 1 : 0));
        const std::size_t equal = item.find('=');
        detail::check<config_error>(equal != std::string_view::npos, P::name, "parameter",
                                    "\"" + std::string(item) + "\"", "key=value");
        const std::string_view key = keys.emplace_back(item.substr(0, equal));
        detail::check<config_error>(std::count(keys.begin(), keys.end(), key) == 1, P::name, key,
                                    "given twice", "once");
        detail::set_field(policy, key, item.substr(equal + 1));
    }
    return policy;
}

namespace detail {
template <class... Ps, class Use>
void with_named(std::string_view where, std::string_view what, std::string_view text, Use&& use) {
    const std::string_view name = text.substr(0, text.find(':'));
    const std::string_view rest =
        name.size() == text.size() ? std::string_view{} : text.substr(name.size() + 1);
    std::string known;
    bool found = false;
    const auto take = [&]<class P>(std::type_identity<P>) {
        append_name(known, P::name);
        if (found || name != P::name) return;
        found = true;
        use(parse_named<P>(rest));
    };
    (take(std::type_identity<Ps>{}), ...);
    check<error::config_error>(found, where, what, "\"" + std::string(name) + "\"", known);
}
}  // namespace detail

/// Parameters of one policy: see `parse_named`.
template <Policy P>
[[nodiscard]] P parse_policy(std::string_view parameters) {
    return parse_named<P>(parameters);
}
/// Calls `use(policy)` with the policy of the list `Ps` that `text` ("name" or "name:key=value,..") names.
/// @throws config_error for an unknown name, key or value; it lists what exists.
template <Policy... Ps, class Use>
void with_policy(std::string_view text, Use&& use) {
    detail::with_named<Ps...>("with_policy", "policy", text, use);
}
/// The same for budget rules.
template <BudgetRule... Rules, class Use>
void with_rule(std::string_view text, Use&& use) {
    detail::with_named<Rules...>("with_rule", "rule", text, use);
}

}  // namespace kvcull::inline KVCULL_ABI
