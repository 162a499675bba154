/// A stored episode of a conversation whose other episode is whole: as it is, and with its checksum made
/// right, as if another program had written it. The conversation goes on with it, or it is refused.

#include "kvcull/cache/episodes.hpp"

#include "safetensors_mutator.hpp"
#include "stored_episodes.hpp"

using namespace kvcull;

namespace {

MemoryBytes built() {
    fuzz::Talk talk;
    talk.episodes.build(talk.history, talk.segments);
    return talk.store;
}

void go_on(std::span<const std::byte> stored) {
    static const MemoryBytes store = built();
    fuzz::Talk talk;
    talk.store = store;
    talk.store.put(0, stored);
    talk.episodes.reopen(talk.history, talk.segments, fuzz::Talk::topics);
    for (std::size_t e = 0; e < fuzz::Talk::topics; ++e) (void)talk.episodes.prompt(e);
    try {
        for (const std::size_t topic : {0U, 0U, 1U, 0U}) talk.say(topic);
    } catch (const error::state_error&) {  // numbers that the policy could not have left behind
    }
}

}  // namespace

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const std::span<const std::byte> bytes = fuzz::as_bytes(data, size);
    fuzz::offer([&] { go_on(bytes); });
    return fuzz::offer([&] {
        const SafeTensors file(bytes);
        SafeTensors::Metadata metadata = file.metadata();
        metadata["checksum"] = detail::checksum(metadata, file.tensors());
        go_on(SafeTensors::serialize(metadata, file.tensors()));
    });
}
