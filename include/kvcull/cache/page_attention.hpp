#pragma once
/// Attention over pages of a tier: as many at a time as there are frames, merged by log-sum-exp.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>
#include <vector>

#include "../attention/attend.hpp"
#include "../attention/softmax.hpp"
#include "../base/memory.hpp"
#include "../paging/tier.hpp"
#include "../simd/kernels.hpp"

namespace kvcull::inline KVCULL_ABI {

/// How one KV head's rows lie in a page: keys [page_tokens, head_dim], then values [page_tokens, value_dim].
struct PageLayout {
    std::size_t head_dim = 0;
    std::size_t value_dim = 0;  ///< 0: head_dim
    std::size_t page_tokens = 16;
    DType dtype = DType::f32;

    [[nodiscard]] constexpr std::size_t values() const noexcept {
        return value_dim > 0 ? value_dim : head_dim;
    }
    [[nodiscard]] constexpr std::size_t token_bytes() const noexcept {
        return row_bytes(dtype, head_dim) + row_bytes(dtype, values());
    }
    /// Where the values begin.
    [[nodiscard]] constexpr std::size_t key_bytes() const noexcept {
        return page_tokens * row_bytes(dtype, head_dim);
    }
    /// Of a page: what the frames are made for.
    [[nodiscard]] constexpr std::size_t bytes() const noexcept { return page_tokens * token_bytes(); }
    /// Pages as one run of rows. @param frames  where each lies; all but the last one are full
    [[nodiscard]] RowsView keys(std::span<const std::byte* const> frames, std::size_t rows) const noexcept {
        return {frames.data(), 0, dtype, page_tokens, rows, head_dim, elements(dtype, head_dim)};
    }
    [[nodiscard]] RowsView values(std::span<const std::byte* const> frames, std::size_t rows) const noexcept {
        return {frames.data(), key_bytes(), dtype, page_tokens, rows, values(), elements(dtype, values())};
    }
    /// Puts a token into row `row` of a page. @param k [head_dim] @param v [values()]
    void put(std::span<std::byte> frame, std::size_t row, const float* k, const float* v,
             const simd::Kernels& kernels) const noexcept {
        simd::narrow(kernels, dtype, k, head_dim, frame.data() + row * row_bytes(dtype, head_dim));
        simd::narrow(kernels, dtype, v, values(),
                     frame.data() + key_bytes() + row * row_bytes(dtype, values()));
    }
};

/// A page, and how many rows it holds.
struct PageRows {
    page_t page = 0;
    std::size_t rows = 0;
};

/// What R query rows get from the pages; n: the rows of all of them, in the order in which they are named.
struct PagedOutput {
    MatrixView<float> output;  ///< [R, d_v]; 0 where a row sees nothing
    std::span<float> lse;      ///< [R] log-sum-exp; -Inf: the row sees nothing; NaN: bad row, output NaN
    MatrixView<float> attention = {};  ///< [R, n] or empty: softmax weights; all 0 in a bad row
};

namespace detail {

/// Ends a step of a tier on every way out.
template <class Tier>
class OpenStep {
  public:
    explicit OpenStep(Tier& tier) noexcept : tier_(tier) {}
    OpenStep(const OpenStep&) = delete;
    OpenStep& operator=(const OpenStep&) = delete;
    ~OpenStep() { tier_.end_step(); }

  private:
    Tier& tier_;
};

}  // namespace detail

/// Attention over pages, with its scratch memory. Pages that fit into the frames together take one step of
/// the tier, and the result is bit for bit that of `attend` over the same pages in memory. Others come in
/// waves, those first that are in frames already, and each wave's result joins the others': the output is
/// that of one softmax over all rows, up to rounding.
class PageAttention {
  public:
    void set_kernels(const simd::Kernels& kernels) noexcept { kernels_ = &kernels; }

    /// @param tier    a `PageTier` without an open step, whose store shows its frames
    /// @param pages   each once; where one that is not full has others after it, attention runs once more
    /// @param q       [R, head_dim]
    /// @param ends    [R]: row r sees the first ends[r] of the n rows; empty: every row sees all
    /// @param rule    without a bias
    /// @return the number of waves; each page is fetched at most once. Allocates nothing once it has seen the
    /// largest case.
    /// @throws shape_error, config_error before anything changed; what `PageTier::step` throws (one frame at
    /// least must be free of pins): no step is open then, and `want` is unspecified.
    template <PageCache Cache, ShowsFrames Store, NextUse Predictor>
    std::size_t operator()(PageTier<Cache, Store, Predictor>& tier, const PageLayout& layout,
                           std::span<const PageRows> pages, MatrixView<const float> q,
                           std::span<const std::size_t> ends, const LogitRule& rule,
                           const PagedOutput& want) {
        check(layout, tier.store().frame(0).size(), pages, q, ends, rule, want);
        for (std::size_t row = 0; row < q.rows; ++row)
            std::fill(want.output[row].begin(), want.output[row].end(), 0.0F);
        std::fill(want.lse.begin(), want.lse.end(), negative_infinity());
        part_lse_.clear();
        part_of_.assign(pages.size(), 0);

        const auto& cache = tier.cache();
        const auto pinned = [&](std::size_t i) {
            return cache.contains(pages[i].page) && cache.pins(pages[i].page) > 0;
        };
        const std::size_t room = cache.slots() - cache.pinned_slots();
        order_.resize(pages.size());
        for (std::size_t i = 0; i < pages.size(); ++i) order_[i] = i;
        std::stable_partition(order_.begin(), order_.end(),
                              [&](std::size_t i) { return cache.contains(pages[i].page); });
        std::size_t waves = 0;
        for (std::size_t begin = 0, end = 0; begin < order_.size(); begin = end) {
            for (std::size_t wanted = 0; end < order_.size(); ++end) {
                wanted += pinned(order_[end]) ? 0 : 1;
                if (wanted > room && end > begin) break;
            }
            const std::span<std::size_t> wave = std::span(order_).subspan(begin, end - begin);
            std::sort(wave.begin(), wave.end());
            ids_.clear();
            for (const std::size_t i : wave) ids_.push_back(pages[i].page);
            tier.step(ids_);
            const detail::OpenStep open(tier);
            attend_wave(tier, layout, pages, wave, q, ends, rule, want);
            ++waves;
        }
        if (!want.attention.empty()) rescale(pages, want);
        return waves;
    }

  private:
    /// Also writes where each page's rows begin.
    /// @param frame  bytes of a frame
    void check(const PageLayout& layout, std::size_t frame, std::span<const PageRows> pages,
               const MatrixView<const float>& q, std::span<const std::size_t> ends, const LogitRule& rule,
               const PagedOutput& want) {
        using detail::check_size, detail::text;
        constexpr auto where = "PageAttention";
        check_size(where, "q.cols", q.cols, layout.head_dim);
        if (!ends.empty()) check_size(where, "ends.size()", ends.size(), q.rows);
        check_size(where, "want.output.rows", want.output.rows, q.rows);
        check_size(where, "want.output.cols", want.output.cols, layout.values());
        check_size(where, "want.lse.size()", want.lse.size(), q.rows);
        detail::check<error::config_error>(!rule.bias, where, "rule.bias", "given", "none");
        detail::check<error::shape_error>(frame >= layout.bytes(), where, "bytes of a frame", frame,
                                          text("at least ", layout.bytes()));
        first_.assign(1, 0);
        for (const PageRows& page : pages) {
            detail::check<error::shape_error>(page.rows <= layout.page_tokens, where,
                                              text("rows of page ", page.page), page.rows,
                                              text("at most ", layout.page_tokens));
            first_.push_back(first_.back() + page.rows);
        }
        ids_.clear();  // twice in different waves no step would see
        for (const PageRows& page : pages) ids_.push_back(page.page);
        std::sort(ids_.begin(), ids_.end());
        const auto twice = std::adjacent_find(ids_.begin(), ids_.end());
        if (twice != ids_.end()) [[unlikely]]
            detail::fail<error::config_error>(where, "page", *twice, "each page once");
        if (want.attention.empty()) return;
        check_size(where, "want.attention.rows", want.attention.rows, q.rows);
        check_size(where, "want.attention.cols", want.attention.cols, first_.back());
    }

    /// Pages in frames, in parts that are runs of rows: a part ends at a page that is not full.
    template <class Tier>
    void attend_wave(const Tier& tier, const PageLayout& layout, std::span<const PageRows> pages,
                     std::span<const std::size_t> wave, const MatrixView<const float>& q,
                     std::span<const std::size_t> ends, const LogitRule& rule, const PagedOutput& want) {
        for (std::size_t begin = 0, end = 0; begin < wave.size(); begin = end) {
            frames_.clear();
            std::size_t rows = 0;
            for (bool full = true; full && end < wave.size(); ++end) {
                const PageRows& page = pages[wave[end]];
                frames_.push_back(tier.store().frame(tier.frame(page.page)).data());
                rows += page.rows;
                full = page.rows == layout.page_tokens;
            }
            const auto part = wave.subspan(begin, end - begin);
            visible_.resize(q.rows);
            for (std::size_t row = 0; row < q.rows; ++row) {
                std::size_t seen = 0;
                for (const std::size_t i : part)
                    seen += ends.empty()
                                ? pages[i].rows
                                : std::min(std::max(ends[row], first_[i]) - first_[i], pages[i].rows);
                visible_[row] = {0, 0, seen};
            }
            const MatrixView<float> weights(weights_.get(q.rows * rows), q.rows, rows);
            const MatrixView<float> output(output_.get(q.rows * layout.values()), q.rows, layout.values());
            lse_.resize(q.rows);
            attend(*kernels_, q, layout.keys(frames_, rows), layout.values(frames_, rows), visible_, rule,
                   {.attention = weights, .lse = lse_, .output = output});
            for (std::size_t row = 0; row < q.rows; ++row)
                merge(want.output[row], want.lse[row], output[row], lse_[row]);
            if (!want.attention.empty()) keep_weights(pages, part, weights, want.attention);
        }
    }
    /// Weights within a part, until the log-sum-exp of all is known.
    void keep_weights(std::span<const PageRows> pages, std::span<const std::size_t> part,
                      const MatrixView<float>& weights, const MatrixView<float>& attention) {
        std::size_t from = 0;
        for (const std::size_t i : part) {
            for (std::size_t row = 0; row < weights.rows; ++row)
                std::copy_n(weights[row].data() + from, pages[i].rows, attention[row].data() + first_[i]);
            part_of_[i] = part_lse_.size() / weights.rows;
            from += pages[i].rows;
        }
        part_lse_.insert(part_lse_.end(), lse_.begin(), lse_.end());
    }
    void rescale(std::span<const PageRows> pages, const PagedOutput& want) const {
        const std::size_t rows = want.attention.rows;
        for (std::size_t row = 0; row < rows; ++row)
            for (std::size_t i = 0; i < pages.size(); ++i) {
                const float& part = part_lse_[part_of_[i] * rows + row];
                const bool counts = is_finite(part) && is_finite(want.lse[row]);
                const auto share = static_cast<float>(
                    counts ? std::exp(static_cast<double>(part) - static_cast<double>(want.lse[row])) : 0.0);
                for (float& weight : want.attention[row].subspan(first_[i], pages[i].rows))
                    weight = counts ? weight * share : 0.0F;
            }
    }

    const simd::Kernels* kernels_ = &simd::kernels();
    std::vector<std::size_t> first_;            // [pages + 1] first row of each
    std::vector<std::size_t> order_, part_of_;  // [pages]
    std::vector<page_t> ids_;
    std::vector<const std::byte*> frames_;
    std::vector<Visible> visible_;
    std::vector<float> lse_, part_lse_;  // [R], [parts, R]
    Scratch<float> weights_, output_;
};

}  // namespace kvcull::inline KVCULL_ABI
