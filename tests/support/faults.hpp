#pragma once
/// System calls that fail, stop halfway, or are the last of the process.

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

#include "kvcull/base/posix_file.hpp"

namespace kvcull::test {

/// What goes wrong, and when. Calls are counted from 1.
struct Faults {
    std::size_t calls = 0, fail_at = 0;  // 0: never
    std::size_t partial = 0;             // bytes that the failing pwrite still moves
    bool last = false;                   // no later call does anything either
    int code = EIO;
    std::size_t at_most = SIZE_MAX;   // bytes per transfer
    bool interrupted = false;         // every other call is
    std::uint64_t room = UINT64_MAX;  // bytes of the disk
    std::map<std::string, std::size_t> seen{};
    std::string order{};  // of the calls, a space before each

    /// Whether this call fails, errno set.
    bool fails(const char* call) {
        ++calls;
        ++seen[call];
        order.append(" ").append(call);
        const bool now = calls == fail_at || (last && fail_at > 0 && calls > fail_at);
        if (now) errno = code;
        if (!now && interrupted && calls % 2 == 1) {
            errno = EINTR;
            return true;
        }
        return now;
    }
};
struct FaultyIo {
    Faults* faults;

    [[nodiscard]] int open(const char* path, int flags) const {
        return faults->fails("open") ? -1 : PosixIo::open(path, flags);
    }
    int close(int file) const { return PosixIo::close(file); }
    ::ssize_t pread(int file, void* to, std::size_t bytes, ::off_t at) const {
        if (faults->fails("pread")) return -1;
        return PosixIo::pread(file, to, std::min(bytes, faults->at_most), at);
    }
    ::ssize_t pwrite(int file, const void* from, std::size_t bytes, ::off_t at) const {
        if (faults->fails("pwrite")) {
            const int code = errno;
            if (faults->calls == faults->fail_at && faults->partial > 0)
                (void)PosixIo::pwrite(file, from, std::min(bytes, faults->partial), at);
            errno = code;
            return -1;
        }
        const auto begin = static_cast<std::uint64_t>(at);
        if (begin >= faults->room) {
            errno = ENOSPC;
            return -1;
        }
        const auto fits =
            static_cast<std::size_t>(std::min<std::uint64_t>({bytes, faults->at_most, faults->room - begin}));
        return PosixIo::pwrite(file, from, fits, at);
    }
    [[nodiscard]] int fsync(int) const { return faults->fails("fsync") ? -1 : 0; }  // waits for no device
    [[nodiscard]] ::off_t size(int file) const { return faults->fails("fstat") ? -1 : PosixIo::size(file); }
    [[nodiscard]] int rename(const char* from, const char* to) const {
        return faults->fails("rename") ? -1 : PosixIo::rename(from, to);
    }
    int unlink(const char* path) const { return faults->fails("unlink") ? -1 : PosixIo::unlink(path); }
};

}  // namespace kvcull::test
