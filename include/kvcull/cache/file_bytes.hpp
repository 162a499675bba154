#pragma once
/// A folder as a store of bytes: a file per number, replaced whole or not at all. POSIX systems only.

#include "../base/posix_file.hpp"

#if __has_include(<unistd.h>) && __has_include(<sys/stat.h>)

#    include <cerrno>
#    include <cstddef>
#    include <span>
#    include <string>
#    include <string_view>
#    include <utility>
#    include <vector>

#    include "../base/config.hpp"
#    include "../base/error.hpp"
#    include "byte_store.hpp"

namespace kvcull::inline KVCULL_ABI {

/// Number 7 is the file `7.safetensors`, its bytes are those that were put and nothing else: what `save` and
/// `Episodes` put is a safetensors file with a checksum of its own, so whoever loads it finds out that it was
/// cut, altered or exchanged. Other numbers' files are not touched; one store per folder at a time.
///
/// `put` writes a file beside the old one, syncs it, renames it over the old one and syncs the folder.
/// Wherever the process ends or the power fails, the old bytes are there or the new ones, and the new ones
/// once `put` has returned. One that throws has left the old bytes; the new ones only where it was the
/// folder's sync that failed. What a crash leaves beside them, `7.safetensors.new`, goes with the next put.
/// Cost: `put` two fsyncs, `get` one pass over the file.
template <class Io = PosixIo>
class FileBytes {
  public:
    /// @param folder  must exist  @throws io_error if it does not, or cannot be synced
    explicit FileBytes(std::string folder, Io io = {}) : folder_(std::move(folder)), io_(std::move(io)) {
        sync_folder();
    }

    /// @throws io_error (a full disk is ENOSPC)
    void put(std::size_t key, std::span<const std::byte> bytes) {
        const std::string path = this->path(key), fresh = path + ".new";
        try {
            File file(name, fresh, O_WRONLY | O_CREAT | O_TRUNC, io_);
            file.write(bytes, 0, "");
            file.sync("");
            if (detail::uninterrupted([&] { return io_.rename(fresh.c_str(), path.c_str()); }) < 0)
                detail::fail_io(name, "rename", "", fresh);
        } catch (...) {
            io_.unlink(fresh.c_str());
            throw;
        }
        sync_folder();
    }
    /// @throws state_error if nothing is stored under `key`; io_error
    [[nodiscard]] std::vector<std::byte> get(std::size_t key) {
        try {
            File file(name, path(key), O_RDONLY, io_);
            std::vector<std::byte> bytes(static_cast<std::size_t>(file.size()));
            bytes.resize(file.read(bytes, 0, ""));
            return bytes;
        } catch (const error::io_error& e) {
            if (e.code != ENOENT) throw;
            detail::fail<error::state_error>("FileBytes::get", "key", key,
                                             detail::text("one that was put: there is no ", path(key)));
        }
    }
    /// @throws io_error
    void erase(std::size_t key) {
        const std::string path = this->path(key);
        if (detail::uninterrupted([&] { return io_.unlink(path.c_str()); }) < 0) {
            if (errno == ENOENT) return;
            detail::fail_io(name, "unlink", "", path);
        }
        sync_folder();
    }

    [[nodiscard]] std::string path(std::size_t key) const {
        return folder_ + "/" + std::to_string(key) + ".safetensors";
    }

  private:
    using File = detail::PosixFile<Io>;
    static constexpr std::string_view name = "FileBytes";

    /// A file's name is the folder's to keep.
    void sync_folder() { File(name, folder_, O_RDONLY | O_DIRECTORY, io_).sync(""); }

    std::string folder_;
    [[no_unique_address]] Io io_;
};
static_assert(ByteStore<FileBytes<>>);

}  // namespace kvcull::inline KVCULL_ABI

#endif
