#pragma once
/// A file as memory, read-only: weights are paged in as they are read, and two processes share them.

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <filesystem>
#include <span>
#include <system_error>
#include <utility>

namespace tiny_llama {

/// Owns one mapping. Moves keep the address, so spans into it stay valid.
class MappedFile {
  public:
    /// @throws std::system_error that names the file
    explicit MappedFile(const std::filesystem::path& path) {
        const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
        if (file < 0) fail(path);
        struct stat status {};
        const bool known = ::fstat(file, &status) == 0;
        size_ = known ? static_cast<std::size_t>(status.st_size) : 0;
        if (size_ > 0) data_ = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
        const int error = errno;
        ::close(file);  // the mapping lives on without it
        errno = error;
        if (!known || data_ == MAP_FAILED) fail(path);
    }
    MappedFile(MappedFile&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
    MappedFile& operator=(MappedFile&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        return *this;
    }
    ~MappedFile() {
        if (data_ != nullptr) ::munmap(data_, size_);
    }

    [[nodiscard]] std::span<const std::byte> bytes() const noexcept {
        return {static_cast<const std::byte*>(data_), size_};
    }

  private:
    [[noreturn]] static void fail(const std::filesystem::path& path) {
        throw std::system_error(errno, std::generic_category(), path.string());
    }

    void* data_ = nullptr;
    std::size_t size_ = 0;
};

}  // namespace tiny_llama
