#pragma once
/// The JSON header of a safetensors file: element types, a parser of exactly this subset of JSON, quoting.
/// base/safetensors.hpp is the interface.

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "error.hpp"
#include "types.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Element type of a tensor in a file.
enum class ElementType : std::uint8_t { f64, f32, f16, bf16, i64, i32, i16, i8, u64, u32, u16, u8, boolean };

namespace detail {
struct ElementInfo {
    std::string_view name;
    std::size_t size;
};
/// In the order of ElementType.
inline constexpr std::array<ElementInfo, 13> element_types{{{"F64", 8},
                                                            {"F32", 4},
                                                            {"F16", 2},
                                                            {"BF16", 2},
                                                            {"I64", 8},
                                                            {"I32", 4},
                                                            {"I16", 2},
                                                            {"I8", 1},
                                                            {"U64", 8},
                                                            {"U32", 4},
                                                            {"U16", 2},
                                                            {"U8", 1},
                                                            {"BOOL", 1}}};
}  // namespace detail

[[nodiscard]] constexpr std::size_t size_of(ElementType type) noexcept {
    return detail::element_types[static_cast<std::size_t>(type)].size;
}
/// As spelled in a file: "F32".
[[nodiscard]] constexpr std::string_view name_of(ElementType type) noexcept {
    return detail::element_types[static_cast<std::size_t>(type)].name;
}
/// The element type that a C++ type stands for.
template <class T>
[[nodiscard]] constexpr ElementType element_type_of() noexcept {
    using enum ElementType;
    if constexpr (std::is_same_v<T, double>) return f64;
    if constexpr (std::is_same_v<T, float>) return f32;
    if constexpr (std::is_same_v<T, float16>) return f16;
    if constexpr (std::is_same_v<T, bfloat16>) return bf16;
    constexpr bool integer = std::is_integral_v<T> && !std::is_same_v<T, bool>;
    static_assert(
        integer || std::is_floating_point_v<T> || std::is_same_v<T, float16> || std::is_same_v<T, bfloat16>,
        "no element type; read BOOL as std::uint8_t");
    if constexpr (integer && std::is_signed_v<T>)
        return sizeof(T) == 8 ? i64 : sizeof(T) == 4 ? i32 : sizeof(T) == 2 ? i16 : i8;
    return sizeof(T) == 8 ? u64 : sizeof(T) == 4 ? u32 : sizeof(T) == 2 ? u16 : u8;
}

namespace detail {

/// Length of the UTF-8 sequence at the start of `text`, 0 if it is malformed, overlong or a surrogate.
[[nodiscard]] constexpr std::size_t utf8_length(std::string_view text) noexcept {
    const auto byte = [&](std::size_t i) -> unsigned {
        return i < text.size() ? static_cast<unsigned char>(text[i]) : 0U;
    };
    const unsigned lead = byte(0);
    if (lead < 0x80U) return 1;
    const std::size_t length = lead >= 0xF0U ? 4 : lead >= 0xE0U ? 3 : 2;
    if (lead < 0xC2U || lead > 0xF4U) return 0;
    for (std::size_t i = 1; i < length; ++i)
        if ((byte(i) & 0xC0U) != 0x80U) return 0;
    const unsigned second = byte(1);
    const bool bad = (lead == 0xE0U && second < 0xA0U) || (lead == 0xEDU && second > 0x9FU) ||
                     (lead == 0xF0U && second < 0x90U) || (lead == 0xF4U && second > 0x8FU);
    return bad ? 0 : length;
}

/// Exactly the JSON that a safetensors header may consist of: objects nested as the layout says, strings, and
/// lists of non-negative integers. The nesting is the call graph's, so no input makes it deep.
class HeaderParser {
  public:
    struct Entry {
        std::string name;
        ElementType dtype{};
        std::vector<std::size_t> shape;
        std::size_t begin = 0, end = 0;
    };
    std::vector<Entry> entries;
    std::map<std::string, std::string> metadata;

    HeaderParser(std::string_view source, std::string_view text) : source_(source), text_(text) {}

    void parse() {
        if (text_.empty() || text_[0] != '{') fail("the header does not begin with '{'");
        bool has_metadata = false;
        members([&](std::string name) {
            if (name != "__metadata__") return tensor(std::move(name));
            if (std::exchange(has_metadata, true)) fail("'__metadata__' appears twice");
            members([&](std::string key) {
                std::string value = string();
                if (!metadata.emplace(key, std::move(value)).second)
                    fail("metadata key '" + key + "' appears twice");
            });
        });
        skip_space();
        if (at_ != text_.size()) fail("text after the header's closing brace");
    }
    [[noreturn, gnu::cold, gnu::noinline]] void fail(const std::string& what) const {
        throw error::format_error(std::string(source_) + ": " + what + " (header byte " +
                                  std::to_string(at_) + ")");
    }

  private:
    void skip_space() noexcept {
        while (at_ < text_.size() && std::string_view(" \t\n\r").find(text_[at_]) != std::string_view::npos)
            ++at_;
    }
    [[nodiscard]] bool accept(char wanted) noexcept {
        skip_space();
        if (at_ == text_.size() || text_[at_] != wanted) return false;
        ++at_;
        return true;
    }
    void expect(char wanted) {
        if (!accept(wanted)) fail(std::string("'") + wanted + "' is missing");
    }
    /// `{ "key": .., .. }`; `value(key)` reads what follows the colon.
    template <class Value>
    void members(Value&& value) {
        expect('{');
        if (accept('}')) return;
        do {
            std::string key = string();
            expect(':');
            value(std::move(key));
        } while (accept(','));
        expect('}');
    }
    void tensor(std::string name) {
        Entry entry;
        entry.name = std::move(name);
        std::vector<std::size_t> offsets;
        bool seen[3] = {};
        const auto once = [&](bool& flag, const std::string& key) {
            if (std::exchange(flag, true)) fail("tensor '" + entry.name + "': '" + key + "' appears twice");
        };
        members([&](const std::string& key) {
            if (key == "dtype") {
                once(seen[0], key);
                entry.dtype = element_type(entry.name, string());
            } else if (key == "shape") {
                once(seen[1], key);
                entry.shape = integers();
            } else if (key == "data_offsets") {
                once(seen[2], key);
                offsets = integers();
                if (offsets.size() != 2 || offsets[0] > offsets[1])
                    fail("tensor '" + entry.name + "': data_offsets are not [begin, end]");
            } else {
                fail("tensor '" + entry.name + "': unknown key '" + key + "'");
            }
        });
        if (!seen[0] || !seen[1] || !seen[2])
            fail("tensor '" + entry.name + "': dtype, shape or data_offsets is missing");
        entry.begin = offsets[0];
        entry.end = offsets[1];
        entries.push_back(std::move(entry));
    }
    [[nodiscard]] ElementType element_type(const std::string& tensor, const std::string& text) const {
        for (std::size_t i = 0; i < element_types.size(); ++i)
            if (element_types[i].name == text) return static_cast<ElementType>(i);
        fail("tensor '" + tensor + "': unknown dtype '" + text + "'");
    }
    [[nodiscard]] std::vector<std::size_t> integers() {
        std::vector<std::size_t> list;
        expect('[');
        if (accept(']')) return list;
        do list.push_back(integer());
        while (accept(','));
        expect(']');
        return list;
    }
    [[nodiscard]] std::size_t integer() {
        skip_space();
        const std::size_t first = at_;
        std::size_t value = 0;
        for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_) {
            const auto digit = static_cast<std::size_t>(text_[at_] - '0');
            if (value > (std::numeric_limits<std::size_t>::max() - digit) / 10) fail("an integer overflows");
            value = value * 10 + digit;
        }
        if (at_ == first) fail("a non-negative integer is missing");
        if (text_[first] == '0' && at_ > first + 1) fail("an integer begins with 0");
        return value;
    }
    [[nodiscard]] std::string string() {
        expect('"');
        std::string out;
        for (;;) {
            if (at_ == text_.size()) fail("a string does not end");
            const char c = text_[at_];
            if (c == '"') break;
            if (static_cast<unsigned char>(c) < 0x20U) fail("a control character in a string");
            if (c == '\\') {
                escape(out);
                continue;
            }
            const std::size_t length = utf8_length(text_.substr(at_));
            if (length == 0) fail("a string is not UTF-8");
            out.append(text_, at_, length);
            at_ += length;
        }
        ++at_;
        return out;
    }
    void escape(std::string& out) {
        constexpr std::string_view letters = "\"\\/bfnrt", meanings = "\"\\/\b\f\n\r\t";
        ++at_;
        const char c = at_ < text_.size() ? text_[at_] : '\0';
        if (c == 'u') {
            std::uint32_t code = hex4();
            if (code >= 0xD800U && code < 0xDC00U) {
                if (text_.substr(at_, 2) != "\\u") fail("a surrogate without its pair");
                ++at_;
                const std::uint32_t low = hex4();
                if (low < 0xDC00U || low > 0xDFFFU) fail("a surrogate without its pair");
                code = 0x10000U + ((code - 0xD800U) << 10U) + (low - 0xDC00U);
            } else if (code >= 0xDC00U && code <= 0xDFFFU) {
                fail("a surrogate without its pair");
            }
            append_utf8(out, code);
            return;
        }
        const std::size_t which = letters.find(c);
        if (c == '\0' || which == std::string_view::npos) fail("an unknown escape in a string");
        out += meanings[which];
        ++at_;
    }
    /// Four hexadecimal digits after the `u` at `at_`.
    [[nodiscard]] std::uint32_t hex4() {
        std::uint32_t code = 0;
        for (int i = 0; i < 4; ++i) {
            ++at_;
            const char c = at_ < text_.size() ? text_[at_] : '\0';
            const int digit = c >= '0' && c <= '9'   ? c - '0'
                              : c >= 'a' && c <= 'f' ? c - 'a' + 10
                              : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                     : -1;
            if (digit < 0) fail("\\u is not followed by four hexadecimal digits");
            code = code * 16U + static_cast<std::uint32_t>(digit);
        }
        ++at_;
        return code;
    }
    static void append_utf8(std::string& out, std::uint32_t code) {
        const auto put = [&](std::uint32_t byte) { out += static_cast<char>(byte); };
        const auto tail = [&](std::uint32_t shift) { put(0x80U | ((code >> shift) & 0x3FU)); };
        if (code < 0x80U) return put(code);
        if (code < 0x800U) {
            put(0xC0U | (code >> 6U));
        } else if (code < 0x10000U) {
            put(0xE0U | (code >> 12U));
            tail(6);
        } else {
            put(0xF0U | (code >> 18U));
            tail(12);
            tail(6);
        }
        tail(0);
    }

    std::string_view source_, text_;
    std::size_t at_ = 0;
};

/// Appends `value` as a JSON string.
inline void quote(std::string& text, std::string_view value) {
    constexpr std::string_view digits = "0123456789abcdef";
    text += '"';
    for (std::size_t at = 0; at < value.size();) {
        const std::size_t length = detail::utf8_length(value.substr(at));
        if (length == 0) throw error::format_error("safetensors: '" + std::string(value) + "' is not UTF-8");
        const auto c = static_cast<unsigned char>(value[at]);
        if (c < 0x20U)
            ((text += "\\u00") += digits[c >> 4U]) += digits[c & 15U];
        else if (c == '"' || c == '\\')
            (text += '\\') += value[at];
        else
            text += value.substr(at, length);
        at += length;
    }
    text += '"';
}

}  // namespace detail

}  // namespace kvcull::inline KVCULL_ABI
