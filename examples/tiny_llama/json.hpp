#pragma once
/// JSON objects read key by key, with errors that name the file, the key, what was got and what was wanted.

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <fstream>
#include <kvcull/base/error.hpp>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <type_traits>

namespace tiny_llama {

[[noreturn]] inline void fail(const std::string& where, const std::string& what) {
    throw kvcull::error::format_error(where + ": " + what);
}

/// @throws format_error if the file cannot be read or is no JSON
[[nodiscard]] inline nlohmann::json read_json(const std::filesystem::path& path) {
    std::ifstream file(path);
    if (!file) fail(path.string(), "cannot be opened");
    try {
        return nlohmann::json::parse(file);
    } catch (const nlohmann::json::exception& e) {
        fail(path.string(), e.what());
    }
}

/// A JSON object that knows where it comes from. A key whose value is null counts as absent.
class Object {
  public:
    Object(const nlohmann::json& value, std::string where) : value_(value), where_(std::move(where)) {
        if (!value.is_object()) fail(where_, "is " + shown(value) + ", want an object");
    }

    [[nodiscard]] bool has(const std::string& key) const {
        const auto found = value_.find(key);
        return found != value_.end() && !found->is_null();
    }
    /// A member of any kind. @throws format_error if it is absent
    [[nodiscard]] const nlohmann::json& at(const std::string& key) const {
        if (!has(key)) fail(where_, "'" + key + "' is missing");
        return value_.at(key);
    }
    [[nodiscard]] Object object(const std::string& key) const { return {at(key), where_ + ": " + key}; }
    /// A list. @throws format_error if it is absent or something else
    [[nodiscard]] const nlohmann::json& list(const std::string& key) const {
        if (!at(key).is_array()) wrong(key, "a list");
        return at(key);
    }
    /// Calls `use` for every object of a list.
    template <class Use>
    void each(const std::string& key, Use&& use) const {
        std::size_t i = 0;
        for (const nlohmann::json& element : list(key))
            use(Object(element, where_ + ": " + key + "[" + std::to_string(i++) + "]"));
    }
    /// A number, text or truth value. @throws format_error if it is absent or of another type
    template <class T>
    [[nodiscard]] T get(const std::string& key) const {
        const nlohmann::json& member = at(key);
        if (!is<T>(member)) wrong(key, want<T>());
        return member.get<T>();
    }
    template <class T>
    [[nodiscard]] T get(const std::string& key, T otherwise) const {
        return has(key) ? get<T>(key) : otherwise;
    }
    [[noreturn]] void wrong(const std::string& key, const std::string& wanted) const {
        fail(where_, "'" + key + "' is " + shown(at(key)) + ", want " + wanted);
    }
    /// Of an element of a list.
    [[noreturn]] void wrong_at(const std::string& key, std::size_t index, const std::string& wanted) const {
        fail(where_, "'" + key + "[" + std::to_string(index) + "]' is " + shown(at(key).at(index)) +
                         ", want " + wanted);
    }

  private:
    /// Enough of a value to know it by. Lists and objects may be nested deeper than the stack is.
    [[nodiscard]] static std::string shown(const nlohmann::json& value) {
        constexpr std::size_t most = 80;
        if (std::any_of(value.begin(), value.end(), [](const auto& part) { return part.is_structured(); }))
            return value.is_object() ? "an object" : "a list of " + std::to_string(value.size());
        const std::string text = value.dump();
        return text.size() <= most ? text : text.substr(0, most) + "..";
    }
    template <class T>
    [[nodiscard]] static bool is(const nlohmann::json& value) {
        if constexpr (std::is_same_v<T, bool>) return value.is_boolean();
        if constexpr (std::is_same_v<T, std::string>) return value.is_string();
        if constexpr (std::is_same_v<T, double>) return value.is_number();
        if constexpr (std::is_same_v<T, std::size_t>) return value.is_number_unsigned();
    }
    template <class T>
    [[nodiscard]] static constexpr const char* want() {
        if constexpr (std::is_same_v<T, bool>) return "true or false";
        if constexpr (std::is_same_v<T, std::string>) return "a string";
        if constexpr (std::is_same_v<T, double>) return "a number";
        if constexpr (std::is_same_v<T, std::size_t>) return "an integer that is not negative";
    }

    const nlohmann::json& value_;
    std::string where_;
};

}  // namespace tiny_llama
