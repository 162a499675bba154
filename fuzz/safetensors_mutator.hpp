#pragma once
/// For targets that read a safetensors file: including this makes libFuzzer mutate it as one.

#include "fuzz.hpp"

std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t most, unsigned seed) {
    return fuzz::mutate_safetensors(data, size, most, seed);
}
