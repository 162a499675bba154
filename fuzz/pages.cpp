/// Files of pages. An input holds the headers and pages of one without what fills their blocks; it is offered
/// as it is, and with every checksum made right. A file that is taken goes on: what is written to it and
/// erased is so for the next to open it.

#include <array>
#include <cstdlib>
#include <set>

#include "fuzz.hpp"
#include "kvcull/paging/file_store.hpp"

using kvcull::FileStore;
using kvcull::Frames;
using kvcull::page_t;
using Header = kvcull::detail::RecordHeader;

namespace {

constexpr std::size_t page_bytes = 16, record_bytes = Header::copies_bytes + page_bytes;

void seal(std::span<std::byte> packed) {
    for (std::size_t at = 0; at + Header::copies_bytes <= packed.size();
         at += at == 0 ? Header::copies_bytes : record_bytes) {
        const auto page = packed.subspan(at + Header::copies_bytes);
        for (const std::size_t copy : {at, at + Header::copy_bytes}) {
            Header header;
            std::memcpy(&header, &packed[copy], sizeof header);
            if (page.size() >= page_bytes)
                header.payload_checksum = kvcull::detail::crc32c(page.first(page_bytes));
            header.header_checksum = header.checksum();
            std::memcpy(&packed[copy], &header, sizeof header);
        }
    }
}

/// Whole headers and pages get a block each; one that is cut ends the file.
std::vector<std::byte> spread(std::span<const std::byte> packed) {
    std::vector<std::byte> file;
    for (std::size_t part = 0; !packed.empty(); ++part) {
        const std::size_t whole = part == 0 || part % 2 == 1 ? Header::copies_bytes : page_bytes,
                          here = std::min(whole, packed.size()), end = file.size() + FileStore<>::block;
        file.insert(file.end(), packed.begin(), packed.begin() + static_cast<std::ptrdiff_t>(here));
        if (here == whole) file.resize(end);
        packed = packed.subspan(here);
    }
    return file;
}

void go_on(const fuzz::TemporaryFile& file) {
    constexpr page_t mine = 7;
    constexpr auto bytes = [](std::size_t i) { return std::byte(3 * i + 1); };
    std::set<page_t> pages;
    {
        FileStore<> store(file.path(), Frames(1, page_bytes));
        for (const page_t page : store.pages()) {
            fuzz::offer([&] { store.read(page, 0); });
            pages.insert(page);
        }
        for (std::size_t i = 0; i < page_bytes; ++i) store.frame(0)[i] = bytes(i);
        store.write(mine, 0);
        pages.insert(mine);
        const page_t last = *pages.rbegin();
        if (last != mine) store.erase(last);
        if (last != mine) pages.erase(last);
    }
    FileStore<> again(file.path(), Frames(1, page_bytes));
    if (!std::ranges::equal(again.pages(), pages)) std::abort();
    again.read(mine, 0);
    for (std::size_t i = 0; i < page_bytes; ++i)
        if (again.frame(0)[i] != bytes(i)) std::abort();
}

}  // namespace

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    static const fuzz::TemporaryFile file("pages");
    const auto bytes = fuzz::as_bytes(data, size);
    std::vector<std::byte> packed(bytes.begin(), bytes.end());
    const auto take = [&] {
        file.write(spread(packed));
        go_on(file);
    };
    fuzz::offer(take);
    seal(packed);
    return fuzz::offer(take);
}
