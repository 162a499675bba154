#pragma once
/// TRIM-KV's capacity loss: what keeps gates from keeping everything. O(T) memory per stream, time by the
/// pairs of tokens that still matter.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "../views.hpp"
#include "documents.hpp"

namespace kvcull::inline KVCULL_ABI::train {

/// A stream is one KV head of one layer; its soft cache size at token t is S[t] = sum_{i <= t} beta_i^(t-i).
///
///     active  mean of max(0, S - M) / max(1, t - M) over the rows of all streams where it is above 0
///     paper   mean of max(0, S - M) / (t + 1) over all rows
///     global  as active, of the sum of S over the R streams against R M and R (t - M)
///
/// t counts from the begin of the document. Counts carry no gradient; rows at or below M have none.
struct CapacityLoss {
    enum class Mode : std::uint8_t { active, paper, global };
    friend constexpr auto names_of(Mode /*any*/) noexcept {
        return std::array<std::string_view, 3>{"active", "paper", "global"};
    }

    Mode mode = Mode::active;
    double budget = 256;  // M: rows per stream, or below 1 a share of the document's length

    /// A weight that has decayed below this counts no more.
    static constexpr double vanished = 1e-9;

    /// S of one stream; log_beta[T], out[T]. Sums in double. A live token costs one multiplication per step.
    template <class T>
    static void soft_sizes(std::span<const T> log_beta, std::span<const TokenRange> documents,
                           std::span<double> out) {
        constexpr std::size_t tidy = 64;  // steps between removals of vanished tokens
        std::vector<double> weight, beta;
        for (const TokenRange& document : documents) {
            weight.clear();
            beta.clear();
            for (std::size_t t = document.begin; t < document.end; ++t) {
                double sum = 1.0;
                for (std::size_t i = 0; i < weight.size(); ++i) sum += weight[i] *= beta[i];
                out[t] = sum;
                weight.push_back(1.0);
                beta.push_back(std::exp(rate(log_beta[t])));
                if ((t - document.begin) % tidy != tidy - 1) continue;
                std::size_t live = 0;
                for (std::size_t i = 0; i < weight.size(); ++i)
                    if (weight[i] >= vanished) {
                        weight[live] = weight[i];
                        beta[live++] = beta[i];
                    }
                weight.resize(live);
                beta.resize(live);
            }
        }
    }

    /// The loss; adds `weight` times its gradient to d_log_beta[R, T] unless that is empty.
    /// @param log_beta [R, T]: all streams @param sizes  S[R, T] by `soft_sizes`
    /// @throws shape_error
    template <class T>
    double operator()(MatrixView<const T> log_beta, std::span<const TokenRange> documents,
                      std::span<const double> sizes, MatrixView<T> d_log_beta, double weight = 1.0) const {
        constexpr std::string_view where = "CapacityLoss";
        using detail::check_size;
        check_documents(where, documents, log_beta.cols);
        check_size(where, "sizes.size()", sizes.size(), log_beta.rows * log_beta.cols);
        if (!d_log_beta.empty()) {
            check_size(where, "d_log_beta.rows", d_log_beta.rows, log_beta.rows);
            check_size(where, "d_log_beta.cols", d_log_beta.cols, log_beta.cols);
        }
        detail::check<error::config_error>(budget > 0, where, "budget", budget, "above 0");
        const std::size_t streams = log_beta.rows, tokens = log_beta.cols;
        const bool joint = mode == Mode::global;
        std::vector<double> sum;  // over the streams, or of one of them
        double total = 0.0, count = 0.0;
        const auto load = [&](std::size_t stream) {
            sum.assign(sizes.begin() + static_cast<std::ptrdiff_t>(stream * tokens),
                       sizes.begin() + static_cast<std::ptrdiff_t>((stream + 1) * tokens));
            for (std::size_t other = 1; joint && other < streams; ++other)
                for (std::size_t t = 0; t < tokens; ++t) sum[t] += sizes[other * tokens + t];
        };
        const std::size_t rankings = joint ? std::min<std::size_t>(streams, 1) : streams;
        for (std::size_t stream = 0; stream < rankings; ++stream) {
            load(stream);
            for_each_row(documents, joint ? streams : 1, [&](std::size_t t, double most, double divisor) {
                if (sum[t] <= most) return;
                total += (sum[t] - most) / divisor;
                count += 1.0;
            });
        }
        if (mode == Mode::paper) count = static_cast<double>(streams * tokens);
        if (total == 0.0) return 0.0;
        std::vector<double> share(tokens);
        for (std::size_t stream = 0; stream < streams && !d_log_beta.empty(); ++stream) {
            if (stream < rankings) {
                load(stream);
                std::fill(share.begin(), share.end(), 0.0);
                for_each_row(documents, joint ? streams : 1, [&](std::size_t t, double most, double divisor) {
                    if (sum[t] > most) share[t] = weight / (divisor * count);
                });
            }
            add_gradient<T>(log_beta[stream], documents, share, d_log_beta[stream]);
        }
        return total / count;
    }

  private:
    /// -Inf as a rate that leaves nothing.
    template <class T>
    [[nodiscard]] static double rate(T log_beta) noexcept {
        return std::max(static_cast<double>(log_beta), -1e30);
    }
    /// Calls `visit(t, what S may be, what the excess is divided by)` for every row.
    template <class Visit>
    void for_each_row(std::span<const TokenRange> documents, std::size_t ranked, const Visit& visit) const {
        const auto streams = static_cast<double>(ranked);
        for (const TokenRange& document : documents) {
            const double most = budget < 1.0 ? budget * static_cast<double>(document.size()) : budget;
            for (std::size_t t = document.begin; t < document.end; ++t) {
                const auto at = static_cast<double>(t - document.begin);
                visit(t, streams * most,
                      mode == Mode::paper ? at + 1.0 : std::max(1.0, streams * (at - most)));
            }
        }
    }
    /// d[i] += sum_{t >= i} (t - i) beta_i^(t-i) share[t], by Horner from where the token vanishes: no
    /// exponentials, and all terms have one sign.
    template <class T>
    static void add_gradient(std::span<const T> log_beta, std::span<const TokenRange> documents,
                             std::span<const double> share, std::span<T> d) {
        for (const TokenRange& document : documents)
            for (std::size_t i = document.begin; i < document.end; ++i) {
                const double l = rate(log_beta[i]), beta = std::exp(l);
                const auto left = static_cast<double>(document.end - 1 - i);
                const double reach = l < 0.0 ? std::min(left, std::log(vanished) / l + 1.0) : left;
                double u = 0.0, v = 0.0;
                for (std::size_t t = i + static_cast<std::size_t>(reach) + 1; t-- > i;) {
                    v = beta * (v + u);
                    u = share[t] + beta * u;
                }
                d[i] += static_cast<T>(v);
            }
    }
};

}  // namespace kvcull::inline KVCULL_ABI::train
