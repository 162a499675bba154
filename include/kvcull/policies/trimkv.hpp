#pragma once
/// TRIM-KV: learned retention. A token's worth is fixed by a gate when it enters and decays with age; the
/// tokens worth least go. No attention, no queries.

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "../score/concepts.hpp"
#include "../score/gates.hpp"
#include "../score/similarity.hpp"

namespace kvcull::inline KVCULL_ABI {

/// TRIM-KV (arXiv 2512.03324) and its dynamic budget (DBTrimKV, arXiv 2605.09649). Of beta in (0, 1] per
/// token and KV head, beta^age is the worth: score = (age of the newest + distance to it) * log beta. Older
/// and younger tokens change places with time, so scores are made anew at each eviction. log beta enters with
/// the token, as `log_beta`, or as `attention_input` from which the `gates` make it. State: 4 bytes per token
/// and KV head. Cost: the gates, and O(n) per eviction.
struct TrimKV {
    static constexpr std::string_view name = "trimkv";
    static constexpr Side side = Side::log_beta;
    struct State {
        RowArray<float> log_beta;  // <= 0; -Inf: worth nothing to all later tokens

        [[nodiscard]] auto arrays() noexcept { return std::tie(log_beta); }
    };
    /// What is cut together. `threshold` takes no budget: what is worth less than that goes, after every
    /// call.
    enum class Mode : std::uint8_t { head, layer, global, threshold };
    friend constexpr auto names_of(Mode /*any*/) noexcept {
        return std::array<std::string_view, 4>{"head", "layer", "global", "threshold"};
    }

    Gates gates = {};
    std::size_t buffer = 1;      // rows above the budget at which a cut falls due; 0 means 1
    std::size_t newest_age = 2;  // as the authors' code; 0: as the paper
    std::size_t window = 0;      // newest rows that stay
    std::size_t lookahead = 1;   // steps whose worth is summed
    Mode mode = Mode::head;
    std::size_t floor = 0;        // rows of its own that each head keeps, where several are ranked together
    float threshold = 0.0F;       // least worth that stays, in (0, 1]
    std::size_t skip_layers = 0;  // the first layers that never evict
    bool key_norm = false;        // worth times the norm of the key

    static constexpr auto fields() {
        return std::tuple{Field{"gates", &TrimKV::gates},
                          Field{"buffer", &TrimKV::buffer},
                          Field{"newest_age", &TrimKV::newest_age},
                          Field{"window", &TrimKV::window},
                          Field{"lookahead", &TrimKV::lookahead},
                          Field{"mode", &TrimKV::mode},
                          Field{"floor", &TrimKV::floor},
                          Field{"threshold", &TrimKV::threshold},
                          Field{"skip_layers", &TrimKV::skip_layers},
                          Field{"key_norm", &TrimKV::key_norm}};
    }
    void check(std::size_t budget) const {
        using error::config_error;
        const bool joint = mode == Mode::layer || mode == Mode::global, cuts = mode == Mode::threshold;
        detail::check<config_error>(newest_age <= 3, "TrimKV", "newest_age", newest_age, "0 to 3");
        detail::check<config_error>(lookahead >= 1, "TrimKV", "lookahead", lookahead, "at least 1");
        detail::check<config_error>(floor == 0 || joint, "TrimKV", "floor", floor,
                                    "0 unless mode is layer or global");
        detail::check<config_error>(floor < budget, "TrimKV", "floor", floor,
                                    detail::text("less than the budget ", budget));
        detail::check<config_error>(
            !joint || window <= budget - floor, "TrimKV", "window", window,
            detail::text("at most budget - floor = ", budget - floor, " where heads are ranked together"));
        detail::check<config_error>(
            is_finite(threshold) && threshold >= 0.0F && threshold <= 1.0F && (threshold > 0.0F) == cuts,
            "TrimKV", "threshold", threshold, cuts ? "in (0, 1]" : "0 unless mode is threshold");
        detail::check<config_error>(skip_layers == 0 || mode != Mode::global, "TrimKV", "skip_layers",
                                    skip_layers, "0 if mode is global");
    }
    [[nodiscard]] constexpr Scope scope() const {
        return mode == Mode::head     ? Scope::head
               : mode == Mode::global ? Scope::model_pooled
                                      : Scope::layer_pooled;
    }
    static constexpr HeadTie tie() { return HeadTie::later; }
    [[nodiscard]] constexpr std::size_t own_rows() const { return floor; }
    /// Least score that stays, if that is what decides.
    [[nodiscard]] std::optional<float> cut() const {
        return mode == Mode::threshold ? std::optional(std::log(threshold)) : std::nullopt;
    }
    [[nodiscard]] constexpr Protected protect(std::size_t /*budget*/) const { return {0, window}; }
    [[nodiscard]] constexpr bool due(const Moment& moment) const {
        if (moment.phase == Phase::probe || moment.layer < skip_layers) return false;
        if (mode == Mode::threshold) return true;
        return moment.rows > moment.budget &&
               moment.rows - moment.budget >= moment.slack + moment.heads * std::max<std::size_t>(buffer, 1);
    }
    static constexpr Needs needs(Phase /*phase*/) { return {}; }
    [[nodiscard]] std::size_t workspace(std::size_t /*rows*/, std::size_t /*group*/, std::size_t dim) const {
        return std::max(gates.scratch(), key_norm ? dim : 0);
    }

    [[nodiscard]] bool gated() const noexcept { return !gates.empty(); }
    void check_gates(std::size_t layers, std::size_t kv_heads) const {
        if (!gated()) return;
        detail::check<error::config_error>(gates.layers() == layers, "TrimKV", "gates.layers()",
                                           gates.layers(), layers);
        detail::check<error::config_error>(gates.kv_heads() == kv_heads, "TrimKV", "gates.kv_heads()",
                                           gates.kv_heads(), kv_heads);
    }
    void log_beta(const simd::Kernels& kernels, std::size_t layer, MatrixView<const float> x,
                  MatrixView<float> out, Scratch<float>& workspace) const {
        gates.log_beta(kernels, layer, x, out, workspace);
    }
    /// @throws shape_error for a log beta that is NaN or above 0; it names layer, head and token.
    static void admit(State& state, const HeadInputs& inputs) {
        for (std::size_t i = 0; i < inputs.log_beta.size(); ++i) {
            const float& log_beta = inputs.log_beta[i];
            detail::check<error::shape_error>(
                !is_nan(log_beta) && log_beta <= 0.0F, "TrimKV",
                detail::text("log_beta of layer ", inputs.layer, ", head ", inputs.head, ", token ", i),
                log_beta, "at most 0");
            state.log_beta[inputs.first_row + i] = log_beta;
        }
    }
    static void observe(State& /*state*/, const HeadStep& /*step*/) {}
    void score(const State& state, const HeadStep& step, std::span<float> out) const {
        const position_t newest = step.next_position - 1, more = static_cast<position_t>(newest_age);
        constexpr position_t oldest = std::numeric_limits<position_t>::max();
        step.cached.position.for_each_run([&](std::size_t first, std::span<const position_t> run) {
            for (std::size_t j = 0; j < run.size(); ++j)
                worth(state.log_beta[first + j], std::min(newest - run[j], oldest - more) + more,
                      out[first + j]);
        });
        if (!key_norm) return;
        for_each_row(step.cached.k, 0, *step.workspace, [&](std::size_t j, std::span<const float> key) {
            if (is_finite(out[j])) out[j] += std::log(std::max(euclidean_norm(*step.kernels, key), 1e-12F));
        });
    }

  private:
    /// log of beta^age, or of its sum over `lookahead` steps. By reference, as -Inf may be given or left.
    void worth(const float& log_beta, position_t age, float& out) const noexcept {
        if (!is_finite(log_beta)) {
            out = age == 0 ? 0.0F : negative_infinity();
            return;
        }
        const auto rate = static_cast<double>(log_beta);
        double sum = static_cast<double>(age) * rate;
        if (lookahead > 1) {
            const auto steps = static_cast<double>(lookahead);
            sum += log_beta == 0.0F ? std::log(steps)
                                    : log_one_minus_exp(steps * rate) - log_one_minus_exp(rate);
        }
        out = static_cast<float>(sum);
    }
    /// log(1 - e^x) for x < 0.
    static double log_one_minus_exp(double x) noexcept {
        constexpr double log_half = -0.6931471805599453;
        return x > log_half ? std::log(-std::expm1(x)) : std::log1p(-std::exp(x));
    }
};
static_assert(Policy<TrimKV> && Protects<TrimKV> && Triggered<TrimKV> && Scoped<TrimKV> && Checked<TrimKV> &&
              Gated<TrimKV> && Cuts<TrimKV>);

}  // namespace kvcull::inline KVCULL_ABI
