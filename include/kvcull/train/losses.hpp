#pragma once
/// What gates are trained to preserve: the frozen model's own predictions, and the next token. By blocks of
/// rows, so that the logits of a long sequence never exist whole.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "../views.hpp"
#include "products.hpp"

namespace kvcull::inline KVCULL_ABI::train {

/// Distillation by forward KL divergence, and next-token prediction (cross entropy), both at temperature 1
/// and as means over the rows that count for them. A term without rows is 0.
struct BaseLoss {
    bool distil = true, predict = true;
    bool mean = true;  // of the terms that are on, as the authors' code; else their sum, as the paper
    std::size_t distil_rows = 0, predict_rows = 0;  // that count in the whole sequence

    struct Terms {
        double kl = 0.0, ntp = 0.0;

        Terms& operator+=(const Terms& other) noexcept {
            kl += other.kl;
            ntp += other.ntp;
            return *this;
        }
    };
    static constexpr std::int64_t not_counted = -1;

    /// The loss, of the terms of all blocks added up.
    [[nodiscard]] double total(const Terms& terms) const noexcept {
        return factor(distil) * terms.kl + factor(predict) * terms.ntp;
    }

    /// What a block of rows contributes to both terms; its gradient of `total` overwrites d_student.
    /// @param student, teacher [rows, V] logits @param target [rows], the next token or `not_counted`
    /// @param counts [rows], not 0 where the row counts for distillation
    /// @param d_student [rows, V], or empty; may be `student` itself @throws shape_error
    template <class T>
    Terms block(MatrixView<const T> student, MatrixView<const T> teacher,
                std::span<const std::int64_t> target, std::span<const std::uint8_t> counts,
                MatrixView<T> d_student) const {
        check("BaseLoss::block", student, teacher, target, counts, d_student);
        const std::size_t vocabulary = student.cols;
        const double by_kl = distil_rows == 0 ? 0.0 : 1.0 / static_cast<double>(distil_rows);
        const double by_ntp = predict_rows == 0 ? 0.0 : 1.0 / static_cast<double>(predict_rows);
        Distribution own(vocabulary), other(vocabulary);
        Terms terms;
        for (std::size_t r = 0; r < student.rows; ++r) {
            const bool distils = counts[r] != 0, predicts = target[r] != not_counted;
            if (!distils && !predicts) {
                if (!d_student.empty()) std::fill(d_student[r].begin(), d_student[r].end(), T{0});
                continue;
            }
            own.set<T>(student[r]);
            if (distils) {
                other.set<T>(teacher[r]);
                double sum = 0.0;
                for (std::size_t c = 0; c < vocabulary; ++c)
                    sum += other.p[c] * (other.log_p[c] - own.log_p[c]);
                terms.kl += by_kl * sum;
            }
            if (predicts) terms.ntp -= by_ntp * own.log_p[static_cast<std::size_t>(target[r])];
            if (d_student.empty()) continue;
            const double kl = distils ? factor(distil) * by_kl : 0.0;
            const double ntp = predicts ? factor(predict) * by_ntp : 0.0;
            for (std::size_t c = 0; c < vocabulary; ++c) {
                const double p = own.p[c], aim = distils ? other.p[c] : 0.0;
                const double hit = predicts && static_cast<std::size_t>(target[r]) == c ? 1.0 : 0.0;
                d_student[r][c] = static_cast<T>(kl * (p - aim) + ntp * (p - hit));
            }
        }
        return terms;
    }

  private:
    [[nodiscard]] double factor(bool on) const noexcept {
        return on ? (mean && distil && predict ? 0.5 : 1.0) : 0.0;
    }
    /// What logits mean.
    struct Distribution {
        std::vector<double> p, log_p;

        explicit Distribution(std::size_t vocabulary) : p(vocabulary), log_p(vocabulary) {}
        template <class T>
        void set(std::span<const T> logits) {
            const auto most = static_cast<double>(*std::max_element(logits.begin(), logits.end()));
            double sum = 0.0;
            for (std::size_t c = 0; c < p.size(); ++c) {
                log_p[c] = static_cast<double>(logits[c]) - most;
                sum += p[c] = std::exp(log_p[c]);
            }
            const double log_sum = std::log(sum), share = 1.0 / sum;
            for (std::size_t c = 0; c < p.size(); ++c) {
                p[c] *= share;
                log_p[c] -= log_sum;
            }
        }
    };
    template <class T>
    static void check(std::string_view where, const MatrixView<const T>& student,
                      const MatrixView<const T>& teacher, std::span<const std::int64_t> target,
                      std::span<const std::uint8_t> counts, const MatrixView<T>& d_student) {
        using detail::check_size;
        check_size(where, "teacher.rows", teacher.rows, student.rows);
        check_size(where, "teacher.cols", teacher.cols, student.cols);
        check_size(where, "target.size()", target.size(), student.rows);
        check_size(where, "counts.size()", counts.size(), student.rows);
        if (!d_student.empty()) {
            check_size(where, "d_student.rows", d_student.rows, student.rows);
            check_size(where, "d_student.cols", d_student.cols, student.cols);
        }
        for (const std::int64_t token : target)
            detail::check<error::shape_error>(
                token == not_counted || (token >= 0 && static_cast<std::uint64_t>(token) < student.cols),
                where, "target", token, detail::text("-1 or a token below ", student.cols));
    }
};

}  // namespace kvcull::inline KVCULL_ABI::train
