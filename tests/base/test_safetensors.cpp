#include "kvcull/base/safetensors.hpp"

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "support/catch.hpp"

namespace {

using kvcull::ElementType;
using kvcull::SafeTensors;
using kvcull::Tensor;
using kvcull::error::format_error;
using kvcull::error::shape_error;

using Bytes = std::vector<std::byte>;

/// A file by hand: header text as given, then `data` bytes 0, 1, 2, ...
Bytes file_of(const std::string& header, std::size_t data = 0) {
    Bytes bytes(8 + header.size() + data);
    const std::uint64_t length = header.size();
    std::memcpy(bytes.data(), &length, 8);
    std::memcpy(bytes.data() + 8, header.data(), header.size());
    for (std::size_t i = 0; i < data; ++i) bytes[8 + header.size() + i] = static_cast<std::byte>(i);
    return bytes;
}
std::string entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
    return '"' + name + R"(":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" +
           offsets + '}';
}
/// What the reader says about a file, or "" if it takes it.
std::string complaint(const Bytes& bytes) {
    try {
        const SafeTensors file{bytes, "x"};
        return "";
    } catch (const format_error& e) {
        return e.what();
    }
}
std::string complaint(const std::string& header, std::size_t data = 0) {
    return complaint(file_of(header, data));
}
auto says(const std::string& text) {
    return contains_text(text);
}

/// One tensor of several types, a scalar, an empty one, metadata that needs escapes.
struct Sample {
    std::vector<double> f64{1.5, -2.5};
    std::vector<float> f32{1, 2, 3, 4, 5, 6};
    std::vector<std::int64_t> i64{-7};
    std::vector<std::uint8_t> u8{1, 2, 3};
    std::vector<kvcull::float16> f16{{0x3C00}, {0xC000}, {0x7C00}};
    SafeTensors::Metadata metadata{{"quote\"\\", "line\nand \x01 and \xC3\xA4"}, {"empty", ""}};
    std::vector<Tensor> tensors;

    Sample() {
        tensors = {Tensor::of("bytes", {3}, std::span<const std::uint8_t>(u8)),
                   Tensor::of("half", {3, 1}, std::span<const kvcull::float16>(f16)),
                   Tensor::of("matrix", {2, 3}, std::span<const float>(f32)),
                   Tensor::of("none", {0, 4}, std::span<const float>()),
                   Tensor::of("scalar", {}, std::span<const std::int64_t>(i64)),
                   Tensor::of("wide", {2}, std::span<const double>(f64))};
    }
    [[nodiscard]] Bytes bytes() const { return SafeTensors::serialize(metadata, tensors); }
};

struct TemporaryFile {
    std::string path;
    explicit TemporaryFile(const std::string& name)
        : path((std::filesystem::temp_directory_path() / ("kvcull_test_safetensors_" + name)).string()) {
        std::filesystem::remove(path);
    }
    TemporaryFile(const TemporaryFile&) = delete;
    TemporaryFile& operator=(const TemporaryFile&) = delete;
    ~TemporaryFile() { std::filesystem::remove(path); }
};

TEST_CASE("a written file is read back as it was, and every tensor is aligned for its type",
          "[base][property]") {
    const Sample sample;
    const TemporaryFile path("round_trip");
    SafeTensors::write(path.path, sample.metadata, sample.tensors);
    const SafeTensors file = SafeTensors::read(path.path);

    CHECK(file.metadata() == sample.metadata);
    CHECK(file.names() == std::vector<std::string>{"scalar", "wide", "matrix", "none", "half", "bytes"});
    for (const Tensor& tensor : sample.tensors) {
        CAPTURE(tensor.name);
        const Tensor& back = file.tensor(tensor.name);
        CHECK(back.dtype == tensor.dtype);
        CHECK(back.shape == tensor.shape);
        CHECK(std::equal(back.bytes.begin(), back.bytes.end(), tensor.bytes.begin(), tensor.bytes.end()));
    }
    CHECK(file.tensor("matrix").as<float>()[5] == 6.0F);
    CHECK(file.tensor("wide").as<double>()[1] == -2.5);
    CHECK(file.tensor("scalar").as<std::int64_t>()[0] == -7);
    CHECK(file.tensor("half").as<kvcull::float16>()[1].bits == 0xC000);
    CHECK(file.tensor("none").as<float>().empty());
    CHECK(file.tensor("bytes").to_vector<std::uint8_t>() == sample.u8);
    CHECK(file.contains("bytes"));
    CHECK_FALSE(file.contains("byte"));
}

TEST_CASE("a file keeps its bytes alive in copies and after moves", "[base][contract]") {
    const Sample sample;
    const TemporaryFile path("copies");
    SafeTensors::write(path.path, sample.metadata, sample.tensors);
    std::optional<SafeTensors> first(SafeTensors::read(path.path));
    const SafeTensors copy = *first;
    const SafeTensors moved = std::move(*first);
    first.reset();
    CHECK(copy.tensor("wide").to_vector<double>() == sample.f64);
    CHECK(moved.tensor("wide").to_vector<double>() == sample.f64);
}

TEST_CASE("writing is deterministic, the header is padded to 8 bytes, and write gives what serialize gives",
          "[base][property]") {
    Sample sample;
    for (std::size_t pad = 0; pad < 9; ++pad) {
        sample.metadata["pad"] = std::string(pad, 'x');
        const Bytes bytes = sample.bytes();
        CHECK(bytes == sample.bytes());
        std::uint64_t length = 0;
        std::memcpy(&length, bytes.data(), 8);
        CHECK(length % 8 == 0);
        const TemporaryFile path("bytes");
        SafeTensors::write(path.path, sample.metadata, sample.tensors);
        CHECK(kvcull::detail::read_file(path.path) == bytes);
    }
    CHECK(SafeTensors(SafeTensors::serialize({}, {})).tensors().empty());
}

TEST_CASE("a file is read whole, however it falls into the steps of reading", "[base][property]") {
    const TemporaryFile path("steps");
    for (const std::size_t size :
         {std::size_t{0}, std::size_t{1} << 16U, (std::size_t{1} << 16U) + 1, std::size_t{400'001}}) {
        Bytes bytes(size);
        for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<std::byte>(i % 251);
        std::ofstream(path.path, std::ios::binary)
            .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(size));
        CHECK(kvcull::detail::read_file(path.path) == bytes);
    }
}

TEST_CASE("the writer refuses what no reader would take, and leaves the file alone", "[base][contract]") {
    const TemporaryFile path("refused");
    const std::vector<float> two{1, 2};
    const auto tensor = [&](const std::string& name, std::vector<std::size_t> shape) {
        return Tensor::of(name, std::move(shape), std::span<const float>(two));
    };
    const auto write = [&](const std::vector<Tensor>& tensors, const SafeTensors::Metadata& metadata = {}) {
        SafeTensors::write(path.path, metadata, tensors);
    };
    CHECK_THROWS_AS(write({tensor("a", {3})}), shape_error);
    CHECK_THROWS_AS(write({tensor("a", {})}), shape_error);
    CHECK_THROWS_AS(write({tensor("a", {std::size_t{1} << 62U, 4})}), shape_error);
    CHECK_THROWS_AS(write({tensor("a", {2}), tensor("a", {2})}), format_error);
    CHECK_THROWS_AS(write({tensor("__metadata__", {2})}), format_error);
    CHECK_THROWS_AS(write({tensor("\xFF", {2})}), format_error);
    CHECK_THROWS_AS(write({}, {{"a", "\xC0\x80"}}), format_error);
    CHECK_FALSE(std::filesystem::exists(path.path));
    CHECK_THROWS_AS(SafeTensors::write("/nonexistent/folder/file", {}, {}), format_error);
}

TEST_CASE("as() checks the type and the alignment; to_vector() copies from any address", "[base][contract]") {
    const SafeTensors file(
        file_of("{" + entry("b", "BOOL", "[1]", "[0,1]") + "," + entry("f", "F32", "[2]", "[1,9]") + "}", 9));
    CHECK_THROWS_WITH(file.tensor("f").as<double>(), says("'f' is F32, want F64"));
    CHECK_THROWS_WITH(file.tensor("f").as<std::int32_t>(), says("want I32"));
    CHECK_THROWS_AS(file.tensor("f").as<float>(), format_error);
    CHECK_THROWS_AS(file.tensor("f").to_vector<std::uint32_t>(), format_error);
    CHECK(file.tensor("f").to_vector<float>().size() == 2);
    CHECK(file.tensor("b").as<std::uint8_t>().size() == 1);
    CHECK_THROWS_AS(file.tensor("b").as<std::int8_t>(), format_error);
}

TEST_CASE("a missing tensor is an error that lists the closest names", "[base][contract]") {
    const SafeTensors file(file_of("{" + entry("layers.0.q_proj.weight", "F32", "[1]", "[0,4]") + "," +
                                       entry("lm_head", "F32", "[1]", "[4,8]") + "}",
                                   8),
                           "model.safetensors");
    CHECK_THROWS_WITH(file.tensor("layers.0.k_proj.weight"),
                      says("model.safetensors") && says("no tensor 'layers.0.k_proj.weight' among its 2") &&
                          says("closest: 'layers.0.q_proj.weight', 'lm_head'"));
    CHECK_THROWS_AS(SafeTensors(file_of("{}")).tensor("a"), format_error);
}

TEST_CASE("offsets must cover the data once: no hole, no overlap, nothing behind the end",
          "[base][contract]") {
    const auto two = [](const std::string& a, const std::string& b) {
        return "{" + entry("a", "U8", "[2]", a) + "," + entry("b", "U8", "[2]", b) + "}";
    };
    CHECK(complaint(two("[0,2]", "[2,4]"), 4).empty());
    CHECK(complaint(two("[2,4]", "[0,2]"), 4).empty());
    CHECK_THAT(complaint(two("[0,2]", "[1,3]"), 3), says("'b'") && says("overlaps"));
    CHECK_THAT(complaint(two("[0,2]", "[0,2]"), 2), says("overlaps"));
    CHECK_THAT(complaint(two("[0,2]", "[3,5]"), 5), says("hole"));
    CHECK_THAT(complaint(two("[1,3]", "[3,5]"), 5), says("hole"));
    CHECK_THAT(complaint(two("[0,2]", "[2,4]"), 5), says("1 bytes at the end belong to no tensor"));
    CHECK_THAT(complaint(two("[0,2]", "[2,4]"), 3), says("data_offsets end at 4, the data at 3"));
    CHECK_THAT(complaint(two("[0,2]", "[4,2]"), 4), says("not [begin, end]"));
    CHECK_THAT(complaint(two("[0,2]", "[2]"), 4), says("not [begin, end]"));
    CHECK_THAT(complaint("{}", 1), says("belong to no tensor"));
    const std::string once = entry("a", "U8", "[2]", "[0,2]"), again = entry("a", "U8", "[2]", "[2,4]");
    CHECK_THAT(complaint("{" + once + "," + again + "}", 4), says("tensor 'a': appears twice"));

    const auto with_empty = [](const std::string& at) {
        return "{" + entry("a", "U8", "[2]", "[0,2]") + "," + entry("b", "F32", "[0]", at) + "}";
    };
    CHECK(complaint(with_empty("[0,0]"), 2).empty());
    CHECK(complaint(with_empty("[2,2]"), 2).empty());
    CHECK_THAT(complaint(with_empty("[1,1]"), 2), says("overlaps"));
    CHECK_THAT(complaint(with_empty("[3,3]"), 2), says("data_offsets end at 3"));
}

TEST_CASE("shapes must fit the bytes, and sizes that overflow do not wrap around", "[base][contract]") {
    const auto shaped = [](const std::string& shape, const std::string& offsets = "[0,4]") {
        return complaint("{" + entry("a", "F32", shape, offsets) + "}", offsets == "[0,0]" ? 0 : 4);
    };
    CHECK(shaped("[1]").empty());
    CHECK(shaped("[]").empty());
    CHECK(shaped("[1,1,1]").empty());
    CHECK(shaped("[7,0]", "[0,0]").empty());
    CHECK_THAT(shaped("[2]"), says("has 4 bytes, its shape wants 8"));
    CHECK_THAT(shaped("[0]"), says("its shape wants 0"));
    CHECK_THAT(shaped("[4294967296,4294967296]", "[0,0]"), says("overflows"));
    CHECK_THAT(shaped("[4611686018427387904]", "[0,0]"), says("overflows"));
    CHECK_THAT(shaped("[4611686018427387905]"), says("overflows"));
    CHECK_THAT(shaped("[0,4294967296,4294967296]", "[0,0]"), says("overflows"));
    CHECK_THAT(shaped("[4294967296,4294967296,0]", "[0,0]"), says("overflows"));
    CHECK_THAT(shaped("[1]", "[0,18446744073709551615]"), says("data_offsets end at"));
}

TEST_CASE("a length that does not fit the file is an error", "[base][contract]") {
    CHECK_THAT(complaint(Bytes{}), says("0 bytes are too few"));
    CHECK_THAT(complaint(Bytes(7)), says("7 bytes are too few"));
    CHECK_THAT(complaint(Bytes(8)), says("does not begin with '{'"));
    Bytes bytes = file_of("{}");
    bytes[0] = std::byte{3};
    CHECK_THAT(complaint(bytes), says("header length is 3, but only 2 bytes follow"));
    for (std::size_t i = 0; i < 8; ++i) bytes[i] = std::byte{0xFF};
    CHECK_THAT(complaint(bytes), says("beyond 100000000"));
}

TEST_CASE("files that cannot be read are format errors", "[base][contract]") {
    CHECK_THROWS_AS(SafeTensors::read("/nonexistent/file"), format_error);
    CHECK_THROWS_AS(SafeTensors::read(std::filesystem::temp_directory_path().string()), format_error);
    const TemporaryFile path("named");
    std::fclose(std::fopen(path.path.c_str(), "wb"));
    CHECK_THROWS_WITH(SafeTensors::read(path.path), says(path.path));
}

TEST_CASE("a file cut anywhere is refused", "[base][property]") {
    const Bytes whole = Sample().bytes();
    REQUIRE(complaint(whole).empty());
    for (std::size_t size = 0; size < whole.size(); ++size) {
        CAPTURE(size);
        // a copy of exactly this size, so that a sanitizer sees a read past its end
        CHECK_FALSE(
            complaint(Bytes(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size))).empty());
    }
    Bytes longer = whole;
    longer.push_back(std::byte{0});
    CHECK_FALSE(complaint(longer).empty());
}

TEST_CASE("a file with any byte changed to any value is refused or read whole", "[base][property]") {
    const std::vector<float> numbers{1, 2};
    const std::vector<std::uint8_t> flags{1};
    const std::vector<Tensor> tensors{Tensor::of("a", {2}, std::span<const float>(numbers)),
                                      Tensor::of("b", {1}, std::span<const std::uint8_t>(flags))};
    const Bytes whole = SafeTensors::serialize({{"k", "v"}}, tensors);
    std::size_t taken = 0, refused = 0;
    for (std::size_t at = 0; at < whole.size(); ++at) {
        Bytes bytes = whole;
        for (unsigned value = 0; value < 256; ++value) {
            bytes[at] = static_cast<std::byte>(value);
            try {
                const SafeTensors file(bytes);
                ++taken;
                std::size_t total = 0;
                for (const Tensor& tensor : file.tensors()) {
                    REQUIRE(tensor.bytes.data() + tensor.bytes.size() <= bytes.data() + bytes.size());
                    total += tensor.bytes.size();
                }
                REQUIRE(total <= bytes.size());
            } catch (const format_error&) {
                ++refused;
            }
        }
    }
    CHECK(taken > 256 * 9);  // the 9 bytes of data may be anything
    CHECK(refused > taken);
}

TEST_CASE("the golden files are read", "[base][golden]") {
    const char* const elsewhere = std::getenv("KVCULL_GOLDEN_DIR");
    const std::filesystem::path folder = elsewhere != nullptr ? elsewhere : KVCULL_TESTS_DIR "/data/golden";
    if (!std::filesystem::exists(folder)) KVCULL_SKIP("no folder " << folder.string());
    std::size_t files = 0;
    for (const auto& item : std::filesystem::recursive_directory_iterator(folder)) {
        if (item.path().extension() != ".safetensors") continue;
        CAPTURE(item.path().string());
        const SafeTensors file = SafeTensors::read(item.path().string());
        CHECK(file.metadata().contains("method"));
        CHECK_FALSE(file.tensors().empty());
        ++files;
    }
    CHECK(files > 0);
}

}  // namespace
