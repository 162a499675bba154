/// Saved caches of every policy that can be saved. A file whose checksum is wrong is refused; what another
/// program might have written with a right one is taken or refused, and a cache that took it goes on.

#include "kvcull/cache/saved.hpp"

#include <array>

#include "kvcull/policies.hpp"
#include "safetensors_mutator.hpp"
#include "saved_shape.hpp"

using namespace kvcull;

namespace {

template <class P>
void offer(const SafeTensors& file, std::span<const std::byte> bytes, P policy) {
    KVCache<P> cache(fuzz::saved_shape, std::move(policy), Budget{.tokens = fuzz::saved_budget});
    fuzz::offer([&] { load(cache, bytes); });
    fuzz::offer([&] {
        load(cache, file);
        try {
            fuzz::decode(cache, 8);
        } catch (const error::state_error&) {  // numbers that the policy could not have left behind
        }
    });
}

}  // namespace

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const std::span<const std::byte> bytes = fuzz::as_bytes(data, size);
    return fuzz::offer([&] {
        const SafeTensors file(bytes);
        fuzz::for_every_saved_policy([&](auto policy) { offer(file, bytes, policy); });
    });
}
