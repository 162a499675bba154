#pragma once
/// A cache as bytes: a safetensors file of rows, positions, lengths and per-row state, with a checksum.

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../base/error.hpp"
#include "../base/safetensors.hpp"
#include "saved_state.hpp"

namespace kvcull::inline KVCULL_ABI {

namespace detail {

/// Every word goes in by steps that can be undone, so a change within 8 aligned bytes never goes unseen.
class Checksum {
  public:
    void add(std::span<const std::byte> bytes) noexcept {
        add(bytes.size());
        for (std::size_t at = 0; at < bytes.size(); at += sizeof(std::uint64_t)) {
            std::uint64_t word = 0;
            std::memcpy(&word, bytes.data() + at, std::min(sizeof word, bytes.size() - at));
            add(word);
        }
    }
    void add(std::string_view text) noexcept { add(std::as_bytes(std::span(text))); }
    void add(std::uint64_t word) noexcept {
        state_ = (state_ ^ word) * 0x9E3779B97F4A7C15U;
        state_ ^= state_ >> 29U;
    }
    [[nodiscard]] std::uint64_t value() const noexcept { return state_; }

  private:
    std::uint64_t state_ = 0;
};

/// Of all that the bytes of a cache say, in whatever order the tensors lie.
[[nodiscard]] inline std::string checksum(const SafeTensors::Metadata& metadata,
                                          std::span<const Tensor> tensors) {
    Checksum words;
    for (const auto& [key, value] : metadata)
        if (key != "checksum") {
            words.add(key);
            words.add(value);
        }
    std::uint64_t sum = words.value();
    for (const Tensor& tensor : tensors) {
        Checksum own;
        own.add(tensor.name);
        own.add(name_of(tensor.dtype));
        for (const std::size_t size : tensor.shape) own.add(size);
        own.add(tensor.bytes);
        sum += own.value();
    }
    return std::to_string(sum);
}

/// How a file holds rows: as numbers, those of int8 and int4 as the bytes of their groups.
[[nodiscard]] constexpr ElementType element_type(DType type) noexcept {
    constexpr std::array<ElementType, all_dtypes.size()> types{
        ElementType::f32, ElementType::f16, ElementType::bf16, ElementType::u8, ElementType::u8};
    return types[static_cast<std::size_t>(type)];
}
[[nodiscard]] constexpr std::size_t columns(DType type, std::size_t dim) noexcept {
    return row_bytes(type, dim) / size_of(element_type(type));
}
[[nodiscard]] inline SafeTensors::Metadata describe(const CacheShape& shape, std::string_view policy) {
    std::string windows, spared;
    for (std::size_t layer = 0; layer < shape.layers; ++layer) {
        windows.append(layer == 0 ? "" : " ").append(std::to_string(shape.layer(layer).window));
        if (!shape.layer(layer).evicts)
            spared.append(spared.empty() ? "" : " ").append(std::to_string(layer));
    }
    const auto number = [](float x) {  // the shortest text that reads as the same float
        std::array<char, 32> digits;
        return std::string(digits.data(), std::to_chars(digits.data(), digits.data() + digits.size(), x).ptr);
    };
    return {{"format", "kvcull cache"},
            {"version", "1"},
            {"policy", std::string(policy)},
            {"layers", std::to_string(shape.layers)},
            {"q_heads", std::to_string(shape.q_heads)},
            {"kv_heads", std::to_string(shape.kv_heads)},
            {"head_dim", std::to_string(shape.head_dim)},
            {"value_dim", std::to_string(shape.values())},
            {"latent", shape.latent ? "true" : "false"},
            {"windows", windows},
            {"spared_layers", spared},
            {"scale", number(shape.logit_scale())},
            {"softcap", number(shape.softcap)},
            {"dtype", std::string(name_of(shape.dtype))}};
}

[[nodiscard]] inline std::string layer_name(std::size_t layer, std::string_view part) {
    return "layer." + std::to_string(layer) + "." + std::string(part);
}

[[nodiscard]] inline std::string state_name(std::size_t layer, std::size_t head, std::size_t array) {
    return layer_name(layer, "head." + std::to_string(head) + ".state." + std::to_string(array));
}

[[nodiscard]] inline std::string sequence_name(std::size_t part) {
    return "sequence." + std::to_string(part);
}

/// Tensors with the bytes that they show.
class TensorList {
  public:
    explicit TensorList(std::span<const Tensor> others) : tensors_(others.begin(), others.end()) {}

    void add(std::string name, ElementType type, std::vector<std::size_t> shape,
             std::vector<std::byte> bytes) {
        bytes_.push_back(std::move(bytes));  // moving a vector of bytes moves none of them
        tensors_.push_back({std::move(name), type, std::move(shape), bytes_.back()});
    }
    template <class T>
    void add(std::string name, const std::vector<T>& numbers) {
        const auto bytes = std::as_bytes(std::span(numbers));
        add(std::move(name), element_type_of<T>(), {numbers.size()}, {bytes.begin(), bytes.end()});
    }
    template <class Count>
    void add_counts(std::string name, const std::vector<Count>& counts) {
        add(std::move(name), std::vector<std::int64_t>(counts.begin(), counts.end()));
    }
    [[nodiscard]] std::span<const Tensor> all() const noexcept { return tensors_; }

  private:
    std::vector<Tensor> tensors_;
    std::vector<std::vector<std::byte>> bytes_;
};

/// The tensors of saved bytes, each of the type and size that the cache wants.
class SavedTensors {
  public:
    explicit SavedTensors(const SafeTensors& file) : file_(file) {}

    template <class T>
    [[nodiscard]] std::vector<T> numbers(const std::string& name) const {
        return file_.tensor(name).to_vector<T>();
    }
    template <class T>
    [[nodiscard]] std::vector<T> numbers(const std::string& name, std::size_t count) const {
        check<error::format_error>(file_.tensor(name).size() == count, "load", text("size of '", name, "'"),
                                   file_.tensor(name).size(), count);
        return numbers<T>(name);
    }
    template <class Count>
    [[nodiscard]] std::vector<Count> counts(const std::string& name, std::size_t count) const {
        const auto numbers = this->numbers<std::int64_t>(name, count);
        return {numbers.begin(), numbers.end()};
    }
    /// Rows of `dim` channels of the cache's type.
    [[nodiscard]] const std::byte* rows(const std::string& name, DType dtype, std::size_t rows,
                                        std::size_t dim) const {
        const Tensor& tensor = file_.tensor(name);
        const ElementType type = element_type(dtype);
        const std::size_t size = rows * columns(dtype, dim);
        check<error::format_error>(tensor.dtype == type, "load", text("type of '", name, "'"),
                                   name_of(tensor.dtype), name_of(type));
        check<error::format_error>(tensor.size() == size, "load", text("size of '", name, "'"), tensor.size(),
                                   size);
        return tensor.bytes.data();
    }

    /// The numbers of a sequence's state, whatever their sizes.
    template <class Numbers>
    void read_sequence(Numbers& numbers) const {
        std::size_t part = 0;
        const auto read = [&]<class Part>(Part& one) {
            using Number = typename decltype(numbers_of(one))::value_type;
            const std::string name = sequence_name(part++);
            if constexpr (std::is_arithmetic_v<Part>)
                one = static_cast<Part>(this->numbers<Number>(name, 1).front());
            else
                one = this->numbers<Number>(name);
        };
        for_each_part(numbers.parts(), read);
    }
    /// A state with the sizes of `in_use`, or, of a head that nothing was shown of, of a new one.
    template <class State>
    [[nodiscard]] State state(std::size_t layer, std::size_t head, std::size_t rows, State in_use) const {
        const auto name = [&](std::size_t part) { return state_name(layer, head, part); };
        const auto fits = [&](State& like) {
            bool all = true;
            std::size_t part = 0;
            for_each_part(like, [&](const auto& one) {
                all = all && file_.tensor(name(part++)).size() == count_of(one, rows);
            });
            return all;
        };
        std::size_t part = 0;
        const auto read = [&](auto& one) {
            using Number = typename decltype(numbers_of(one))::value_type;
            const std::vector<Number> numbers = this->numbers<Number>(name(part++), count_of(one, rows));
            assign(one, rows, std::span<const Number>(numbers));
        };
        if (State unseen{}; !fits(in_use) && fits(unseen)) {
            for_each_array(unseen, read);
            return unseen;
        }
        for_each_part(in_use, read);
        check<error::format_error>(consistent(in_use), "load",
                                   text("state of layer ", layer, ", head ", head), "inconsistent",
                                   "one that this policy leaves behind");
        return in_use;
    }

    /// Ranges as `pin` leaves them behind: apart from one another, with room in every head.
    [[nodiscard]] std::vector<PositionRange> pinned(std::span<const std::size_t> sizes) const {
        const auto ends = numbers<position_t>("pinned");
        std::vector<PositionRange> ranges;
        for (std::size_t i = 0; i + 1 < ends.size(); i += 2) ranges.push_back({ends[i], ends[i + 1]});
        std::vector<PositionRange> ascending = ranges;
        std::sort(ascending.begin(), ascending.end(),
                  [](const PositionRange& a, const PositionRange& b) { return a.begin < b.begin; });
        position_t free = 0;
        std::size_t total = 0;
        bool apart = ends.size() % 2 == 0;
        for (const PositionRange& range : ascending) {
            apart = apart && range.begin >= free && range.begin < range.end;
            total += apart ? range.size() : 0;
            free = range.end;
        }
        check<error::format_error>(apart, "load", "pinned", "ranges that overlap or end before they begin",
                                   "ranges that are apart");
        for (const std::size_t size : sizes)
            check<error::format_error>(total <= size, "load", "pinned", total,
                                       text("at most the budget ", size));
        return ranges;
    }

  private:
    const SafeTensors& file_;
};

}  // namespace detail

/// The cache between two steps, as the bytes of a safetensors file: per layer `head_len` [kv_heads],
/// `position` [sum], `k` [sum, head_dim], `v` [sum, value_dim] unless values are latent (rows in slot order,
/// heads one after the other) and the policy's state, part by part. Marks and pool are not part of it.
/// `extra`: tensors of the caller's.
/// @throws state_error inside a step; format_error if a name of `extra` is taken
template <Savable P, BudgetRule Rule>
[[nodiscard]] std::vector<std::byte> save(const KVCache<P, Rule>& cache, std::span<const Tensor> extra = {}) {
    const Live<P>& live = cache.evictor().live();
    const CacheShape& shape = cache.shape();
    detail::check<error::state_error>(live.call_tokens == 0, "save", "call", "inside a step",
                                      "after end_step");
    detail::TensorList tensors(extra);
    tensors.add_counts("live",
                       std::vector{live.seen, static_cast<std::size_t>(live.reach.next), live.prompt_end,
                                   static_cast<std::size_t>(live.phase), std::size_t{live.resolved},
                                   std::size_t{live.hold}, live.reach.unbroken});
    tensors.add_counts("sizes", live.sizes);
    tensors.add_counts("layer_sizes", live.layer_sizes);
    tensors.add_counts("since", live.since);
    tensors.add_counts("decided", live.decided);
    tensors.add("gone", live.gone);
    std::vector<position_t> pinned;
    for (const PositionRange& range : live.pinned) pinned.insert(pinned.end(), {range.begin, range.end});
    tensors.add("pinned", pinned);
    if constexpr (SequenceState<P>) {
        auto sequence = live.sequence.numbers();
        std::size_t part = 0;
        const auto add = [&](const auto& one) {
            tensors.add(detail::sequence_name(part++), detail::numbers_of(one));
        };
        detail::for_each_part(sequence.parts(), add);
    }
    for (std::size_t layer = 0; layer < shape.layers; ++layer) {
        std::vector<std::size_t> lengths;
        std::vector<position_t> positions;
        std::vector<std::byte> keys, values;
        const auto add_rows = [](std::vector<std::byte>& all, const RowsView& rows) {
            rows.for_each_run(0, rows.rows(), [&](const RowsView::Run& run) {
                all.insert(all.end(), run.data, run.data + run.rows * rows.row_bytes());
            });
        };
        for (std::size_t h = 0; h < shape.kv_heads; ++h) {
            const HeadView head = cache.view(layer, h);
            lengths.push_back(head.rows());
            head.position.for_each_run([&](std::size_t, std::span<const position_t> run) {
                positions.insert(positions.end(), run.begin(), run.end());
            });
            add_rows(keys, head.k);
            if (!shape.latent) add_rows(values, head.v);
            std::size_t number = 0;
            // The lists are of references and so not const; nothing is changed through them here.
            detail::for_each_part(const_cast<typename P::State&>(live.states[layer * shape.kv_heads + h]),
                                  [&](const auto& part) {
                                      tensors.add(detail::state_name(layer, h, number++),
                                                  detail::numbers_of(part));
                                  });
        }
        const std::size_t rows = positions.size();
        const ElementType type = detail::element_type(shape.dtype);
        tensors.add_counts(detail::layer_name(layer, "head_len"), lengths);
        tensors.add(detail::layer_name(layer, "position"), positions);
        tensors.add(detail::layer_name(layer, "k"), type,
                    {rows, detail::columns(shape.dtype, shape.head_dim)}, std::move(keys));
        if (!shape.latent)
            tensors.add(detail::layer_name(layer, "v"), type,
                        {rows, detail::columns(shape.dtype, shape.values())}, std::move(values));
    }
    SafeTensors::Metadata metadata = detail::describe(shape, P::name);
    metadata["checksum"] = detail::checksum(metadata, tensors.all());
    return SafeTensors::serialize(metadata, tensors.all());
}

/// Saved bytes, checked: they are whole, and of a cache of this shape and policy.
/// @throws format_error
template <Policy P, BudgetRule Rule>
[[nodiscard]] SafeTensors open_saved(const KVCache<P, Rule>& cache, std::span<const std::byte> bytes) {
    SafeTensors file(bytes, "load");
    const auto entry = [&](const std::string& key) {
        const auto found = file.metadata().find(key);
        return found == file.metadata().end() ? std::string("missing") : found->second;
    };
    for (const auto& [key, wanted] : detail::describe(cache.shape(), P::name))
        detail::check<error::format_error>(entry(key) == wanted, "load", key, entry(key), wanted);
    const std::string sum = detail::checksum(file.metadata(), file.tensors());
    detail::check<error::format_error>(entry("checksum") == sum, "load", "checksum", entry("checksum"), sum);
    return file;
}

/// Makes `cache` what was saved, bit for bit; budget sizes per head come along. What it held goes.
/// @throws format_error for bytes that are cut, altered or of another cache; capacity_error. The cache is
/// then as it was.
template <Savable P, BudgetRule Rule>
void load(KVCache<P, Rule>& cache, const SafeTensors& file) {
    using error::format_error;
    const detail::SavedTensors saved(file);
    const CacheShape& shape = cache.shape();
    Live<P> live(shape);
    const auto numbers = saved.counts<std::size_t>("live", 7);
    live.seen = numbers[0];
    live.reach = live.call_reach = {static_cast<position_t>(numbers[1]), numbers[6]};
    live.prompt_end = numbers[2];
    detail::check<format_error>(live.reach.next >= 0 && numbers[3] <= 1, "load", "phase", numbers[3],
                                "0 or 1");
    live.phase = static_cast<Phase>(numbers[3]);
    live.resolved = numbers[4] != 0;
    live.hold = numbers[5] != 0;
    const std::size_t most = std::min(live.seen, numbers[1]);
    detail::check<format_error>(live.reach.unbroken <= most, "load", "tokens without a gap",
                                live.reach.unbroken, detail::text("at most ", most));
    live.sizes = saved.counts<std::size_t>("sizes", shape.heads());
    live.layer_sizes = saved.counts<std::size_t>("layer_sizes", shape.layers);
    live.since = saved.counts<std::size_t>("since", shape.layers);
    live.decided = saved.counts<std::uint8_t>("decided", shape.layers);
    live.gone = saved.numbers<position_t>("gone", shape.layers);
    live.pinned = saved.pinned(live.sizes);

    if constexpr (SequenceState<P>) {
        auto sequence = live.sequence.numbers();
        saved.read_sequence(sequence);
        auto whole = P::Sequence::from(sequence);
        detail::check<format_error>(whole.has_value(), "load", "state of the sequence", "inconsistent",
                                    "one that this policy leaves behind");
        live.sequence = *std::move(whole);
    }

    const typename P::State in_use = detail::state_in_use(shape, cache.policy());
    std::vector<std::vector<position_t>> positions(shape.layers);
    std::vector<HeadView> views;
    for (std::size_t layer = 0; layer < shape.layers; ++layer) {
        const auto lengths = saved.counts<std::size_t>(detail::layer_name(layer, "head_len"), shape.kv_heads);
        positions[layer] = saved.numbers<position_t>(detail::layer_name(layer, "position"));
        const std::size_t total = positions[layer].size();
        const std::byte* k = saved.rows(detail::layer_name(layer, "k"), shape.dtype, total, shape.head_dim);
        // Latent values are the front of their keys.
        const std::byte* v =
            shape.latent ? k : saved.rows(detail::layer_name(layer, "v"), shape.dtype, total, shape.values());
        const DType dtype = shape.dtype;
        const std::size_t key_stride = elements(dtype, shape.head_dim),
                          value_stride = shape.latent ? key_stride : elements(dtype, shape.values());
        std::size_t first = 0;
        for (std::size_t h = 0; h < shape.kv_heads; ++h) {
            const std::size_t rows = lengths[h];
            detail::check<format_error>(rows <= total - first, "load", detail::text("rows of head ", h), rows,
                                        detail::text("at most the ", total - first, " left of ", total));
            const std::span<const position_t> own = std::span(positions[layer]).subspan(first, rows);
            std::vector<position_t> sorted(own.begin(), own.end());
            std::sort(sorted.begin(), sorted.end());
            detail::check<format_error>(
                rows == 0 || (sorted.front() >= 0 && sorted.back() < live.reach.next &&
                              std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end()),
                "load", detail::text("positions of head ", h), "out of range or repeated",
                detail::text("each once, below ", live.reach.next));
            detail::check<format_error>(
                shape.layer(layer).window == 0 || std::equal(own.begin(), own.end(), sorted.begin()), "load",
                detail::text("positions of head ", h), "not ascending", "ascending in a layer with a window");
            const std::size_t size = size_of(dtype);
            views.push_back({{k + first * key_stride * size, dtype, rows, shape.head_dim, key_stride},
                             {v + first * value_stride * size, dtype, rows, shape.values(), value_stride},
                             own});
            const std::size_t index = layer * shape.kv_heads + h;
            live.rows[index] = rows;
            live.states[index] = saved.state(layer, h, rows, in_use);
            first += rows;
        }
        detail::check<format_error>(first == total, "load", detail::text("rows of layer ", layer), first,
                                    total);
    }
    cache.restore(std::move(live), {views, shape.kv_heads});
}
/// The same from bytes. @throws format_error also if they are cut, altered or of another cache
template <Savable P, BudgetRule Rule>
void load(KVCache<P, Rule>& cache, std::span<const std::byte> bytes) {
    load(cache, open_saved(cache, bytes));
}

}  // namespace kvcull::inline KVCULL_ABI
