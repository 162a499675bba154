#pragma once
/// The text of the error that a call must throw.

#include <exception>
#include <string>
#include <typeinfo>

namespace kvcull::test {

/// The message if `call` throws exactly `Error`, else what happened instead.
template <class Error, class Call>
std::string failure(Call&& call) {
    try {
        call();
    } catch (const std::exception& error) {
        if (typeid(error) == typeid(Error)) return error.what();
        return std::string("another error: ") + error.what();
    }
    return "no error";
}

}  // namespace kvcull::test
