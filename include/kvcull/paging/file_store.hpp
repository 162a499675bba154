#pragma once
/// A store in a file: checksummed records, which a crash at any call leaves readable. POSIX systems only.

#if __has_include(<unistd.h>) && __has_include(<sys/stat.h>)

#    include <algorithm>
#    include <array>
#    include <cstddef>
#    include <cstdint>
#    include <cstring>
#    include <exception>
#    include <optional>
#    include <span>
#    include <string>
#    include <type_traits>
#    include <unordered_map>
#    include <utility>
#    include <vector>

#    include "../base/config.hpp"
#    include "../base/crc32c.hpp"
#    include "../base/error.hpp"
#    include "../base/posix_file.hpp"
#    include "memory_store.hpp"
#    include "page_table.hpp"
#    include "tier.hpp"

namespace kvcull::inline KVCULL_ABI {

namespace detail {

/// What stands at the head of a file and of each of its records, twice, in the machine's byte order. The
/// copies are written first to last: a call that stops halfway spoils the first and leaves the second as it
/// was, or spoils the second when the first is done. So the first copy that is whole says what holds.
struct RecordHeader {
    enum class Kind : std::uint32_t { file = 1, free = 2, page = 3 };
    static constexpr std::uint64_t file_magic = 0x73706C6C7563766BU;  // "kvcullps" where bytes go up
    static constexpr std::uint32_t file_version = 1;
    static constexpr std::size_t copy_bytes = 64, copies_bytes = 2 * copy_bytes;
    using Copies = std::array<std::byte, copies_bytes>;

    std::uint64_t magic = file_magic;
    std::uint32_t version = file_version;
    Kind kind = Kind::free;
    std::uint64_t page = 0;        // in the file's header: how many records there are
    std::uint64_t generation = 0;  // of a page's records the largest holds
    std::uint64_t payload_bytes = 0;
    std::uint32_t payload_checksum = 0;
    std::uint32_t header_checksum = 0;  // of all before it

    [[nodiscard]] std::uint32_t checksum() const noexcept {
        return crc32c(std::as_bytes(std::span(this, 1)).first(offsetof(RecordHeader, header_checksum)));
    }
    [[nodiscard]] Copies copies() const noexcept {
        RecordHeader sealed = *this;
        sealed.header_checksum = checksum();
        Copies bytes{};
        std::memcpy(bytes.data(), &sealed, sizeof sealed);
        std::memcpy(bytes.data() + copy_bytes, &sealed, sizeof sealed);
        return bytes;
    }
    /// What the copies say; nothing if none is whole.
    [[nodiscard]] static std::optional<RecordHeader> from(const Copies& bytes) noexcept {
        for (const std::size_t at : {std::size_t{0}, copy_bytes}) {
            RecordHeader header;
            std::memcpy(&header, bytes.data() + at, sizeof header);
            if (header.magic == file_magic && header.header_checksum == header.checksum()) return header;
        }
        return std::nullopt;
    }
};
static_assert(std::has_unique_object_representations_v<RecordHeader> &&
              sizeof(RecordHeader) <= RecordHeader::copy_bytes);

}  // namespace detail

struct FileStoreOptions {
    /// What a call did has reached the device when it returns: two fsyncs per page written or erased, and one
    /// per record that the file grows by. Else it outlives the process, but not a loss of power. The name of
    /// a new file is the directory's to sync.
    bool sync = false;
};

/// Pages in one file of records of one size. A page goes to a record that is free, its header follows, and
/// only then does the record of its old bytes become free: whatever call fails, and wherever the process
/// ends, the file holds every page whose `write` returned. A page whose `write` or `erase` threw is as before
/// for this store; who opens the file next may find that the call took effect, wholly or not at all.
///
/// Layout: a block of 4096 bytes with the file's header; then per record a block with its header and the
/// page, rounded up to whole blocks. Headers and pages carry a CRC-32C. One store per file at a time.
/// Cost: a read is one system call, a write three, and two more where the file grows; the index of pages is
/// in memory.
template <class Io = PosixIo>
class FileStore {
  public:
    static constexpr std::size_t block = 4096;

    /// Creates the file, or takes the pages that it holds: one read per record, of the header alone.
    /// @throws io_error if a system call fails; format_error if the file is foreign, cut short, of another
    /// version or page size, or both copies of a header are damaged: it is then left as it was.
    FileStore(std::string path, Frames frames, FileStoreOptions options = {}, Io io = {})
        : frames_(std::move(frames)),
          options_(options),
          file_("FileStore", std::move(path), O_RDWR | O_CREAT, std::move(io)),
          record_bytes_(block + (std::uint64_t{frames_.page_bytes()} + block - 1) / block * block) {
        scan(open_header());
    }

    /// One read, checked. @throws state_error if the page is not in the file; shape_error if there is no such
    /// frame; io_error; format_error if the bytes are not those that were written. What the frame then holds
    /// is unspecified.
    void read(page_t page, slot_t frame) {
        const auto found = index_.find(page);
        detail::check<error::state_error>(found != index_.end(), "FileStore::read", "page", page,
                                          "a page that was written");
        const auto to = frames_[frame];
        const std::size_t got = file_.read(to, start(found->second.record) + block, name(page));
        if (got != to.size()) damaged(name(page), "cut short");
        if (detail::crc32c(to) != found->second.checksum) damaged(name(page), "unlike its checksum");
    }
    /// @throws shape_error if there is no such frame; io_error (a full disk is ENOSPC); std::bad_alloc. The
    /// page's old bytes stay then.
    void write(page_t page, slot_t frame) {
        const std::span<const std::byte> from = frames_[frame];
        tidy();
        if (free_.empty()) grow();
        const std::uint64_t record = free_.back();
        const auto [entry, is_new] = index_.try_emplace(page);
        const Place place{record, detail::crc32c(from)};
        try {
            file_.write(from, start(record) + block, name(page));
            sync(page);
            free_.pop_back();
            stale_.push_back({record, page});  // until all went well, its header is in doubt
            put_header(record, {.kind = Kind::page,
                                .page = page,
                                .generation = generation_++,
                                .payload_bytes = from.size(),
                                .payload_checksum = place.checksum});
            sync(page);
        } catch (...) {
            if (is_new) index_.erase(entry);
            throw;
        }
        stale_.pop_back();
        const Place old = std::exchange(entry->second, place);
        if (!is_new) stale_.push_back({old.record, page});
        tidy();
    }
    /// Its record becomes free. No-op if the page is not in the file. @throws io_error.
    void erase(page_t page) {
        // Older copies first: the next to open the file must not take one for the page.
        for (std::size_t i = stale_.size(); i-- > 0;)
            if (stale_[i].page == page) make_free(i);
        const auto found = index_.find(page);
        if (found == index_.end()) return;
        sync(page);
        put_header(found->second.record, {});
        sync(page);
        free_.push_back(found->second.record);
        index_.erase(found);
    }

    [[nodiscard]] std::span<std::byte> frame(slot_t frame) const { return frames_[frame]; }
    [[nodiscard]] bool contains(page_t page) const { return index_.contains(page); }
    /// Those in the file, ascending.
    [[nodiscard]] std::vector<page_t> pages() const { return detail::ascending_keys(index_); }
    /// Number of pages in the file.
    [[nodiscard]] std::size_t size() const noexcept { return index_.size(); }
    /// Number of records in the file, free ones included.
    [[nodiscard]] std::uint64_t records() const noexcept { return records_; }
    [[nodiscard]] const std::string& path() const noexcept { return file_.path(); }

  private:
    using Header = detail::RecordHeader;
    using Kind = Header::Kind;
    struct Place {
        std::uint64_t record = 0;
        std::uint32_t checksum = 0;
    };
    struct Stale {
        std::uint64_t record = 0;
        page_t page = 0;  // whose bytes the file may say that it holds
    };

    [[nodiscard]] std::uint64_t start(std::uint64_t record) const noexcept {
        return block + record * record_bytes_;
    }
    [[nodiscard]] static std::string name(page_t page) { return "page " + std::to_string(page); }
    [[noreturn, gnu::cold]] void damaged(const std::string& what, const std::string& how) const {
        throw error::format_error("FileStore: " + what + " in " + file_.path() + " is " + how);
    }
    void sync(page_t page) {
        if (options_.sync) file_.sync(name(page));
    }
    void put_header(std::uint64_t record, const Header& header) {
        file_.write(
            header.copies(), start(record),
            header.kind == Kind::page ? name(header.page) : "the header of record " + std::to_string(record));
    }

    /// One more free record at the end: its header's block, whole, so that the disk has given it before a
    /// page needs it, and then the number of records, so that a file that is cut short later shows it.
    void grow() {
        reserve(records_ + 1);
        const std::string what = "the header of record " + std::to_string(records_);
        file_.write(first_block({}), start(records_), what);
        if (options_.sync) file_.sync(what);
        file_.write(file_header(records_ + 1).copies(), 0, header_name);
        free_.push_back(records_++);
    }
    /// Room for all records in both lists, so that nothing allocates between two system calls.
    void reserve(std::uint64_t records) {
        const auto count = static_cast<std::size_t>(records);
        if (free_.capacity() < count) free_.reserve(2 * count);
        if (stale_.capacity() < count) stale_.reserve(2 * count);
    }
    void make_free(std::size_t i) {
        put_header(stale_[i].record, {});
        free_.push_back(stale_[i].record);
        stale_[i] = stale_.back();
        stale_.pop_back();
    }
    /// Frees what is stale. If that fails nothing is lost: it is tried again.
    void tidy() {
        try {
            while (!stale_.empty()) make_free(stale_.size() - 1);
        } catch (const std::exception&) {
        }
    }

    [[nodiscard]] Header file_header(std::uint64_t records) const noexcept {
        return {.kind = Kind::file, .page = records, .payload_bytes = frames_.page_bytes()};
    }
    [[nodiscard]] static std::array<std::byte, block> first_block(const Header& header) noexcept {
        std::array<std::byte, block> bytes{};
        std::ranges::copy(header.copies(), bytes.begin());
        return bytes;
    }
    /// @return how many records there are.
    std::uint64_t open_header() {
        const auto fresh = first_block(file_header(0));
        std::array<std::byte, block> here{};
        const std::size_t got = file_.read(here, 0, header_name);
        if (got < block) {  // new, or its creation was cut short
            if (!std::equal(here.begin(), here.begin() + static_cast<std::ptrdiff_t>(got), fresh.begin()))
                damaged(header_name, "cut short or foreign");
            file_.write(fresh, 0, header_name);
            if (options_.sync) file_.sync(header_name);
            return 0;
        }
        Header::Copies copies{};
        std::copy_n(here.begin(), copies.size(), copies.begin());
        const auto found = Header::from(copies);
        if (!found || found->kind != Kind::file) damaged(header_name, "damaged or foreign");
        check_version(header_name, *found);
        return found->page;
    }
    void check_version(const std::string& what, const Header& header) const {
        if (header.version != Header::file_version)
            damaged(what, "of version " + std::to_string(header.version) + ", want " +
                              std::to_string(Header::file_version));
        if (header.payload_bytes != frames_.page_bytes())
            damaged(what, "for pages of " + std::to_string(header.payload_bytes) + " bytes, want " +
                              std::to_string(frames_.page_bytes()));
    }
    /// Finds the newest record of each page; then finishes what a crash left half done.
    void scan(std::uint64_t records) {
        const std::uint64_t bytes = file_.size();
        const auto check_end = [&](std::uint64_t end) {
            if (bytes < end) damaged("the file", "cut short");
        };
        if (records > 0) check_end(records < bytes / block ? start(records - 1) + block : bytes + 1);
        std::unordered_map<page_t, std::uint64_t> generations;
        std::vector<std::pair<std::uint64_t, Header>> repairs;
        for (; records_ < records; ++records_) {
            reserve(records_ + 1);
            const std::string what = "the header of record " + std::to_string(records_);
            Header::Copies copies{};
            file_.read(copies, start(records_), what);
            const auto header = Header::from(copies);
            if (!header || (header->kind != Kind::free && header->kind != Kind::page))
                damaged(what, "damaged");
            if (copies != header->copies()) repairs.emplace_back(records_, *header);
            if (header->kind == Kind::free) {
                free_.push_back(records_);
                continue;
            }
            check_version(what, *header);
            check_end(start(records_) + block + header->payload_bytes);
            generation_ = std::max(generation_, header->generation + 1);
            Place other{records_, header->payload_checksum};
            const auto [entry, is_new] = index_.try_emplace(header->page, other);
            auto& newest = generations[header->page];
            if (header->generation > newest) std::swap(entry->second, other);
            if (!is_new) stale_.push_back({other.record, header->page});
            newest = std::max(newest, header->generation);
        }
        std::ranges::reverse(free_);  // the first are used first
        for (const auto& [record, header] : repairs) put_header(record, header);
        while (!stale_.empty()) make_free(stale_.size() - 1);
    }

    static constexpr const char* header_name = "the file's header";
    Frames frames_;
    FileStoreOptions options_;
    detail::PosixFile<Io> file_;
    std::uint64_t record_bytes_;
    std::uint64_t records_ = 0, generation_ = 1;
    std::unordered_map<page_t, Place> index_;
    std::vector<std::uint64_t> free_;  // the file says so of each
    std::vector<Stale> stale_;         // not free by what the file says, and not in the index
};
static_assert(HoldsPages<FileStore<>> && ShowsFrames<FileStore<>>);

}  // namespace kvcull::inline KVCULL_ABI

#endif
