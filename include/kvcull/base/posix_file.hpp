#pragma once
/// Files by system calls, which another type may stand in for. POSIX systems only.

#if __has_include(<unistd.h>) && __has_include(<sys/stat.h>)

#    include <fcntl.h>
#    include <sys/stat.h>
#    include <sys/types.h>
#    include <unistd.h>

#    include <cerrno>
#    include <cstddef>
#    include <cstdint>
#    include <cstdio>
#    include <span>
#    include <string>
#    include <string_view>
#    include <system_error>
#    include <utility>

#    include "config.hpp"
#    include "error.hpp"

namespace kvcull::inline KVCULL_ABI {

/// The system calls of what keeps things in files, each as POSIX has it. Another type with these members puts
/// failures in.
struct PosixIo {
    static int open(const char* path, int flags) noexcept { return ::open(path, flags | O_CLOEXEC, 0666); }
    static int close(int file) noexcept { return ::close(file); }
    static ::ssize_t pread(int file, void* to, std::size_t bytes, ::off_t at) noexcept {
        return ::pread(file, to, bytes, at);
    }
    static ::ssize_t pwrite(int file, const void* from, std::size_t bytes, ::off_t at) noexcept {
        return ::pwrite(file, from, bytes, at);
    }
    static int fsync(int file) noexcept { return ::fsync(file); }
    /// Bytes of the file, or -1.
    static ::off_t size(int file) noexcept {
        struct ::stat status {};
        return ::fstat(file, &status) == 0 ? status.st_size : -1;
    }
    static int rename(const char* from, const char* to) noexcept { return std::rename(from, to); }
    static int unlink(const char* path) noexcept { return ::unlink(path); }
};

namespace detail {

/// A call again until no signal interrupts it.
template <class Call>
[[nodiscard]] auto uninterrupted(const Call& call) {
    for (;;)
        if (const auto result = call(); result >= 0 || errno != EINTR) return result;
}
/// "who: call of what in path: why", by errno.
[[noreturn, gnu::cold, gnu::noinline]] inline void fail_io(std::string_view who, const char* call,
                                                           const std::string& what, const std::string& path) {
    const int code = errno;
    throw error::io_error(to_text(text(who, ": ", call, what.empty() ? "" : " of ", what, " in ", path, ": ",
                                       std::generic_category().message(code))),
                          code);
}

/// An open file: whole transfers, whatever the system makes of them.
template <class Io>
class PosixFile {
  public:
    /// @param who  names the owner in errors, a literal
    PosixFile(std::string_view who, std::string path, int flags, Io io)
        : io_(std::move(io)), who_(who), path_(std::move(path)) {
        file_ = uninterrupted([&] { return io_.open(path_.c_str(), flags); });
        if (file_ < 0) fail("open", "");
    }
    PosixFile(const PosixFile&) = delete;
    PosixFile(PosixFile&& other) noexcept
        : io_(std::move(other.io_)),
          who_(other.who_),
          path_(std::move(other.path_)),
          file_(std::exchange(other.file_, -1)) {}
    PosixFile& operator=(const PosixFile&) = delete;
    PosixFile& operator=(PosixFile&& other) noexcept {
        std::swap(io_, other.io_);
        std::swap(who_, other.who_);
        std::swap(path_, other.path_);
        std::swap(file_, other.file_);
        return *this;
    }
    ~PosixFile() {
        if (file_ >= 0) io_.close(file_);
    }

    /// @return bytes read: fewer than asked for only where the file ends.
    std::size_t read(std::span<std::byte> to, std::uint64_t at, const std::string& what) {
        std::size_t done = 0;
        while (done < to.size()) {
            const auto got = uninterrupted(
                [&] { return io_.pread(file_, to.data() + done, to.size() - done, offset(at + done)); });
            if (got < 0) fail("pread", what);
            if (got == 0) break;
            done += static_cast<std::size_t>(got);
        }
        return done;
    }
    void write(std::span<const std::byte> from, std::uint64_t at, const std::string& what) {
        while (!from.empty()) {
            const auto put =
                uninterrupted([&] { return io_.pwrite(file_, from.data(), from.size(), offset(at)); });
            if (put == 0) errno = EIO;  // no progress, and no reason given
            if (put <= 0) fail("pwrite", what);
            from = from.subspan(static_cast<std::size_t>(put));
            at += static_cast<std::uint64_t>(put);
        }
    }
    void sync(const std::string& what) {
        if (uninterrupted([&] { return io_.fsync(file_); }) < 0) fail("fsync", what);
    }
    [[nodiscard]] std::uint64_t size() {
        const auto bytes = uninterrupted([&] { return io_.size(file_); });
        if (bytes < 0) fail("fstat", "");
        return static_cast<std::uint64_t>(bytes);
    }
    [[nodiscard]] const std::string& path() const noexcept { return path_; }

  private:
    static_assert(sizeof(::off_t) >= 8, "compile with _FILE_OFFSET_BITS=64");
    [[nodiscard]] static ::off_t offset(std::uint64_t at) noexcept { return static_cast<::off_t>(at); }
    [[noreturn]] void fail(const char* call, const std::string& what) const {
        fail_io(who_, call, what, path_);
    }

    [[no_unique_address]] Io io_;
    std::string_view who_;
    std::string path_;
    int file_ = -1;
};

}  // namespace detail

}  // namespace kvcull::inline KVCULL_ABI

#endif
