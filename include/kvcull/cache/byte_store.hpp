#pragma once
/// Where things sleep as bytes, under a number each.

#include <concepts>
#include <cstddef>
#include <map>
#include <span>
#include <vector>

#include "../base/error.hpp"

namespace kvcull::inline KVCULL_ABI {

/// `put` replaces what is there by all of the bytes. One that throws leaves what was there, or has replaced
/// it all the same: never a mixture. `get` throws where there is nothing; `erase` does not mind.
template <class S>
concept ByteStore = requires(S& store, std::size_t key, std::span<const std::byte> bytes) {
    store.put(key, bytes);
    { store.get(key) } -> std::same_as<std::vector<std::byte>>;
    store.erase(key);
};

/// In memory.
class MemoryBytes {
  public:
    void put(std::size_t key, std::span<const std::byte> bytes) {
        std::vector<std::byte> copy(bytes.begin(), bytes.end());
        bytes_[key].swap(copy);
    }
    /// @throws state_error if nothing is stored under `key`
    [[nodiscard]] std::vector<std::byte> get(std::size_t key) const {
        const auto found = bytes_.find(key);
        detail::check<error::state_error>(found != bytes_.end(), "MemoryBytes::get", "key", key,
                                          "one that was put");
        return found->second;
    }
    void erase(std::size_t key) noexcept { bytes_.erase(key); }

    [[nodiscard]] std::size_t size() const noexcept { return bytes_.size(); }

  private:
    std::map<std::size_t, std::vector<std::byte>> bytes_;
};
static_assert(ByteStore<MemoryBytes>);

}  // namespace kvcull::inline KVCULL_ABI
