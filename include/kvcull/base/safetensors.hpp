#pragma once
/// Strict reader and writer of safetensors files: golden files, gates, saved states, checkpoints.
///
/// Layout: 8 bytes little-endian header length; that many bytes of JSON, `{"name": {"dtype", "shape",
/// "data_offsets": [begin, end]}, .., "__metadata__": {"key": "value"}}`; then the data, to the last byte.
/// Whatever deviates is a format_error that says what and where: nothing in a file is trusted, and nothing in
/// a file makes the reader allocate more than a small multiple of the header's size.

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "error.hpp"
#include "safetensors_header.hpp"
#include "types.hpp"

namespace kvcull::inline KVCULL_ABI {

static_assert(std::endian::native == std::endian::little, "numbers of a file are used where they lie");

/// A named array in row-major order. It does not own its bytes.
struct Tensor {
    std::string name;
    ElementType dtype = ElementType::f32;
    std::vector<std::size_t> shape;  ///< empty for a scalar
    std::span<const std::byte> bytes;

    /// For the writer: a tensor over the caller's numbers.
    template <class T>
    [[nodiscard]] static Tensor of(std::string name, std::vector<std::size_t> shape,
                                   std::span<const T> values) {
        return {std::move(name), element_type_of<T>(), std::move(shape), std::as_bytes(values)};
    }
    /// Count of numbers.
    [[nodiscard]] std::size_t size() const noexcept { return bytes.size() / size_of(dtype); }

    /// The numbers where they lie. BOOL is read as std::uint8_t.
    /// @throws format_error if `T` is not the dtype or the bytes are not aligned for it (files need not align
    ///         their tensors: to_vector() serves those too).
    template <class T>
    [[nodiscard]] std::span<const T> as() const {
        check_type<T>("Tensor::as");
        const auto address = reinterpret_cast<std::uintptr_t>(bytes.data());
        detail::check<error::format_error>(address % alignof(T) == 0, "Tensor::as",
                                           "address of '" + name + "' modulo " + std::to_string(alignof(T)),
                                           address % alignof(T), 0);
        return {reinterpret_cast<const T*>(bytes.data()), size()};
    }
    /// A copy of the numbers, wherever they lie.
    /// @throws format_error if `T` is not the dtype.
    template <class T>
    [[nodiscard]] std::vector<T> to_vector() const {
        check_type<T>("Tensor::to_vector");
        std::vector<T> copy(size());
        if (!bytes.empty()) std::memcpy(copy.data(), bytes.data(), bytes.size());
        return copy;
    }

  private:
    template <class T>
    void check_type(std::string_view where) const {
        constexpr ElementType want = element_type_of<T>();
        const bool same = dtype == want || (dtype == ElementType::boolean && want == ElementType::u8);
        detail::check<error::format_error>(same, where, "dtype of '" + name + "'",
                                           std::string(name_of(dtype)), std::string(name_of(want)));
    }
};

namespace detail {

/// Product of the dimensions, or nothing if it does not fit (judged without the zeros, so that no order of
/// the dimensions hides an overflow).
[[nodiscard]] inline std::optional<std::size_t> element_count(std::span<const std::size_t> shape) noexcept {
    std::size_t count = 1;
    bool zero = false;
    for (const std::size_t dim : shape) {
        zero = zero || dim == 0;
        if (dim != 0 && count > std::numeric_limits<std::size_t>::max() / dim) return std::nullopt;
        if (dim != 0) count *= dim;
    }
    return zero ? 0 : count;
}

struct CloseFile {
    void operator()(std::FILE* file) const noexcept { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, CloseFile>;

[[nodiscard]] inline std::vector<std::byte> read_file(const std::string& path) {
    const File file(std::fopen(path.c_str(), "rb"));
    if (file == nullptr) throw error::format_error(path + ": cannot be opened");
    constexpr std::size_t least = std::size_t{1} << 16U, most = std::size_t{1} << 20U;
    std::vector<std::byte> bytes;
    for (std::size_t size = 0;;) {
        const std::size_t chunk = std::clamp(size, least, most);
        bytes.resize(size + chunk);
        const std::size_t got = std::fread(bytes.data() + size, 1, chunk, file.get());
        size += got;
        if (got < chunk) {
            bytes.resize(size);
            break;
        }
    }
    if (std::ferror(file.get()) != 0) throw error::format_error(path + ": cannot be read");
    return bytes;
}

}  // namespace detail

/// A parsed file. Copies share the bytes.
class SafeTensors {
  public:
    using Metadata = std::map<std::string, std::string>;
    /// As the format's reference implementation.
    static constexpr std::size_t max_header_bytes = 100'000'000;

    /// Parses bytes of the caller (a memory map, say) that must outlive this object and its tensors.
    /// @param source  what to call the bytes in messages
    /// @throws format_error
    explicit SafeTensors(std::span<const std::byte> bytes, std::string_view source = "safetensors") {
        parse(bytes, source);
    }
    /// Takes the bytes over.
    explicit SafeTensors(std::vector<std::byte>&& bytes, std::string_view source = "safetensors")
        : owned_(std::make_shared<const std::vector<std::byte>>(std::move(bytes))) {
        parse(*owned_, source);
    }
    /// Reads and owns a whole file.
    /// @throws format_error, also if the file cannot be read
    [[nodiscard]] static SafeTensors read(const std::string& path) {
        return SafeTensors(detail::read_file(path), path);
    }

    [[nodiscard]] const Metadata& metadata() const noexcept { return metadata_; }
    /// In the order of the header.
    [[nodiscard]] const std::vector<Tensor>& tensors() const noexcept { return tensors_; }
    [[nodiscard]] std::vector<std::string> names() const {
        std::vector<std::string> list;
        for (const Tensor& tensor : tensors_) list.push_back(tensor.name);
        return list;
    }
    [[nodiscard]] bool contains(std::string_view name) const noexcept { return index_.contains(name); }
    /// @throws format_error that lists the names closest to a missing one
    [[nodiscard]] const Tensor& tensor(std::string_view name) const {
        const auto found = index_.find(name);
        if (found == index_.end()) fail_missing(name);
        return tensors_[found->second];
    }

    /// The bytes of a file. The same input gives the same bytes. Tensors lie in order of falling element size
    /// and then as given, so that each is aligned for its type.
    /// @throws shape_error if a tensor's bytes do not fit its shape; format_error for a name that no reader
    ///         would take back (twice, "__metadata__", not UTF-8)
    [[nodiscard]] static std::vector<std::byte> serialize(const Metadata& metadata,
                                                          std::span<const Tensor> tensors) {
        std::vector<std::byte> bytes;
        emit(metadata, tensors,
             [&](std::span<const std::byte> part) { bytes.insert(bytes.end(), part.begin(), part.end()); });
        return bytes;
    }
    /// Writes those bytes to a file, replacing it.
    /// @throws as serialize(), before the file is touched; format_error if it cannot be written
    static void write(const std::string& path, const Metadata& metadata, std::span<const Tensor> tensors) {
        detail::File file;
        bool good = true;
        emit(metadata, tensors, [&](std::span<const std::byte> part) {
            if (file == nullptr) file.reset(std::fopen(path.c_str(), "wb"));
            if (file == nullptr) throw error::format_error(path + ": cannot be opened for writing");
            if (!part.empty())
                good = std::fwrite(part.data(), 1, part.size(), file.get()) == part.size() && good;
        });
        good = std::fclose(file.release()) == 0 && good;
        if (!good) throw error::format_error(path + ": cannot be written to the end");
    }

  private:
    void parse(std::span<const std::byte> bytes, std::string_view source) {
        source_ = source;
        const auto fail = [&](const std::string& what) { throw error::format_error(source_ + ": " + what); };
        const auto number = [](std::size_t value) { return std::to_string(value); };
        std::uint64_t length = 0;
        if (bytes.size() < sizeof(length))
            fail(number(bytes.size()) + " bytes are too few for a header length");
        std::memcpy(&length, bytes.data(), sizeof(length));
        if (length > max_header_bytes) fail("header length " + number(length) + " is beyond 100000000");
        if (length > bytes.size() - sizeof(length))
            fail("header length is " + number(length) + ", but only " +
                 number(bytes.size() - sizeof(length)) + " bytes follow");
        const auto* text = reinterpret_cast<const char*>(bytes.data() + sizeof(length));
        detail::HeaderParser header(source_, {text, static_cast<std::size_t>(length)});
        header.parse();
        const auto data = bytes.subspan(sizeof(length) + static_cast<std::size_t>(length));

        tensors_.reserve(header.entries.size());
        for (auto& entry : header.entries) {
            const std::string where = "tensor '" + entry.name + "': ";
            if (entry.end > data.size())
                fail(where + "data_offsets end at " + number(entry.end) + ", the data at " +
                     number(data.size()));
            const auto count = detail::element_count(entry.shape);
            const std::size_t size = size_of(entry.dtype);
            if (!count || *count > std::numeric_limits<std::size_t>::max() / size)
                fail(where + "the size of its shape overflows");
            if (*count * size != entry.end - entry.begin)
                fail(where + "has " + number(entry.end - entry.begin) + " bytes, its shape wants " +
                     number(*count * size));
            if (!index_.emplace(entry.name, tensors_.size()).second) fail(where + "appears twice");
            tensors_.push_back({std::move(entry.name), entry.dtype, std::move(entry.shape),
                                data.subspan(entry.begin, entry.end - entry.begin)});
        }
        check_covered(data, fail);
        metadata_ = std::move(header.metadata);
    }

    /// Every byte of the data belongs to exactly one tensor.
    template <class Fail>
    void check_covered(std::span<const std::byte> data, Fail&& fail) const {
        std::vector<const Tensor*> order;
        for (const Tensor& tensor : tensors_) order.push_back(&tensor);
        const auto begin = [&](const Tensor* tensor) {
            return static_cast<std::size_t>(tensor->bytes.data() - data.data());
        };
        std::sort(order.begin(), order.end(), [&](const Tensor* a, const Tensor* b) {
            return std::pair(begin(a), a->bytes.size()) < std::pair(begin(b), b->bytes.size());
        });
        std::size_t end = 0;
        for (const Tensor* tensor : order) {
            if (begin(tensor) != end)
                fail("tensor '" + tensor->name + "' begins at data byte " + std::to_string(begin(tensor)) +
                     (begin(tensor) < end ? ": it overlaps the one" : ": a hole lies after the one") +
                     " that ends at " + std::to_string(end));
            end += tensor->bytes.size();
        }
        if (end != data.size())
            fail(std::to_string(data.size() - end) + " bytes at the end belong to no tensor");
    }

    [[noreturn, gnu::cold, gnu::noinline]] void fail_missing(std::string_view name) const {
        const auto likeness = [&](const std::string& other) {
            const std::size_t shorter = std::min(name.size(), other.size());
            std::size_t front = 0, back = 0;
            while (front < shorter && name[front] == other[front]) ++front;
            while (back < shorter - front && name[name.size() - 1 - back] == other[other.size() - 1 - back])
                ++back;
            return front + back;
        };
        std::vector<std::pair<std::size_t, std::string>> near;
        for (const Tensor& tensor : tensors_) near.emplace_back(likeness(tensor.name), tensor.name);
        std::stable_sort(near.begin(), near.end(),
                         [](const auto& a, const auto& b) { return a.first > b.first; });
        std::string text =
            source_ + ": no tensor '" + std::string(name) + "' among its " + std::to_string(tensors_.size());
        for (std::size_t i = 0; i < std::min<std::size_t>(near.size(), 8); ++i)
            text += (i == 0 ? "; the closest: '" : "', '") + near[i].second;
        throw error::format_error(near.empty() ? text : text + "'");
    }

    /// Calls `put` with the parts of a file, the header first, after everything has been checked.
    template <class Put>
    static void emit(const Metadata& metadata, std::span<const Tensor> tensors, Put&& put) {
        std::vector<const Tensor*> order;
        for (const Tensor& tensor : tensors) order.push_back(&tensor);
        std::stable_sort(order.begin(), order.end(), [](const Tensor* a, const Tensor* b) {
            return size_of(a->dtype) > size_of(b->dtype);
        });
        std::string text = "{";
        const auto member = [&](std::string_view key) {
            if (text.back() != '{') text += ',';
            detail::quote(text, key);
            text += ':';
        };
        if (!metadata.empty()) {
            member("__metadata__");
            text += '{';
            for (const auto& [key, value] : metadata) {
                member(key);
                detail::quote(text, value);
            }
            text += '}';
        }
        std::size_t at = 0;
        std::set<std::string_view> names{"__metadata__"};
        for (const Tensor* tensor : order) {
            const auto count = detail::element_count(tensor->shape);
            if (!count || *count > std::numeric_limits<std::size_t>::max() / size_of(tensor->dtype))
                throw error::shape_error("SafeTensors::write: the size of '" + tensor->name + "' overflows");
            detail::check_size("SafeTensors::write", "bytes of '" + tensor->name + "'", tensor->bytes.size(),
                               *count * size_of(tensor->dtype));
            if (!names.insert(tensor->name).second)
                throw error::format_error("SafeTensors::write: name '" + tensor->name + "' is taken");
            member(tensor->name);
            text += "{\"dtype\":\"" + std::string(name_of(tensor->dtype)) + "\",\"shape\":[";
            for (std::size_t i = 0; i < tensor->shape.size(); ++i)
                text.append(i == 0 ? "" : ",").append(std::to_string(tensor->shape[i]));
            text += "],\"data_offsets\":[" + std::to_string(at) + ',';
            at += tensor->bytes.size();
            text += std::to_string(at) + "]}";
        }
        text += '}';
        text.append((8 - text.size() % 8) % 8, ' ');
        detail::check<error::format_error>(text.size() <= max_header_bytes, "SafeTensors::write",
                                           "header length", text.size(), "at most 100000000");
        const std::uint64_t length = text.size();
        put(std::as_bytes(std::span(&length, 1)));
        put(std::as_bytes(std::span(text)));
        for (const Tensor* tensor : order) put(tensor->bytes);
    }

    std::string source_;
    std::shared_ptr<const std::vector<std::byte>> owned_;
    std::vector<Tensor> tensors_;
    std::map<std::string, std::size_t, std::less<>> index_;
    Metadata metadata_;
};

}  // namespace kvcull::inline KVCULL_ABI
