#include "kvcull/train/losses.hpp"

#include <cmath>
#include <vector>

#include "support/catch.hpp"
#include "support/failure.hpp"
#include "train/numbers.hpp"

using namespace kvcull;
using namespace kvcull::test;
using train::BaseLoss;

namespace {

constexpr std::size_t rows = 6, vocabulary = 5;
const std::vector<std::int64_t> target{2, BaseLoss::not_counted, 0, 4, BaseLoss::not_counted, 1};
const std::vector<std::uint8_t> counts{1, 1, 0, 7, 0, 0};

MatrixView<const double> logits(const std::vector<double>& values) {
    return {values.data(), rows, vocabulary};
}

}  // namespace

TEST_CASE("gradients of the base loss agree with central differences", "[differential]") {
    std::vector<double> student = random_doubles(rows * vocabulary, 1, 2.0);
    const std::vector<double> teacher = random_doubles(rows * vocabulary, 2, 2.0);
    for (const bool distil : {false, true})
        for (const bool predict : {false, true})
            for (const bool mean : {false, true}) {
                CAPTURE(distil, predict, mean);
                const BaseLoss loss{distil, predict, mean, 3, 4};
                std::vector<double> gradient(student.size(), 77.0);
                const auto total = [&](MatrixView<double> to = {}) {
                    return loss.total(
                        loss.block<double>(logits(student), logits(teacher), target, counts, to));
                };
                total({gradient.data(), rows, vocabulary});
                CHECK(gradient_error(student, gradient, [&] { return total(); }) < 1e-7);
            }
}

TEST_CASE("blocks of rows add up to the whole, and the gradient may take the logits' place", "[property]") {
    const std::vector<double> student = random_doubles(rows * vocabulary, 1, 2.0);
    const std::vector<double> teacher = random_doubles(rows * vocabulary, 2, 2.0);
    const BaseLoss loss{.distil_rows = 3, .predict_rows = 4};
    std::vector<double> whole(student.size()), parts = student;
    const auto all = loss.block<double>(logits(student), logits(teacher), target, counts,
                                        {whole.data(), rows, vocabulary});
    BaseLoss::Terms sum;
    for (std::size_t r = 0; r < rows; r += 2) {
        const MatrixView<double> part(parts.data() + r * vocabulary, 2, vocabulary);
        sum += loss.block<double>(part, {teacher.data() + r * vocabulary, 2, vocabulary},
                                  std::span(target).subspan(r, 2), std::span(counts).subspan(r, 2), part);
    }
    CHECK(std::abs(sum.kl - all.kl) < 1e-12);
    CHECK(std::abs(sum.ntp - all.ntp) < 1e-12);
    for (std::size_t i = 0; i < whole.size(); ++i) CHECK(std::abs(whole[i] - parts[i]) < 1e-12);
    CHECK(std::abs(loss.total(all) - (all.kl + all.ntp) / 2) < 1e-12);
    const BaseLoss added{.mean = false};
    CHECK(std::abs(added.total(all) - all.kl - all.ntp) < 1e-12);
}

TEST_CASE("a student like its teacher has no divergence, and terms without rows are 0", "[property]") {
    const std::vector<double> student =
        random_doubles(rows * vocabulary, 1, 300.0);  // far beyond exp's range
    const BaseLoss loss{.distil_rows = 3, .predict_rows = 4};
    const auto terms = loss.block<double>(logits(student), logits(student), target, counts, {});
    CHECK(std::abs(terms.kl) < 1e-12);
    CHECK(terms.ntp > 0.0);
    const std::vector<std::int64_t> nothing(rows, BaseLoss::not_counted);
    const std::vector<std::uint8_t> nowhere(rows, 0);
    std::vector<double> gradient(student.size(), 77.0);
    const BaseLoss empty{};
    const auto none = empty.block<double>(logits(student), logits(student), nothing, nowhere,
                                          {gradient.data(), rows, vocabulary});
    CHECK(std::abs(empty.total(none)) < 1e-300);
    for (const double x : gradient) CHECK(std::abs(x) < 1e-300);
}

TEST_CASE("the base loss refuses what does not fit by name", "[contract]") {
    const std::vector<double> values(rows * vocabulary);
    const BaseLoss loss{.distil_rows = 3, .predict_rows = 4};
    const auto text = [&](const std::vector<std::int64_t>& next, const std::vector<std::uint8_t>& counted,
                          MatrixView<double> to = {}) {
        return failure<error::shape_error>(
            [&] { (void)loss.block<double>(logits(values), logits(values), next, counted, to); });
    };
    CHECK(text({0, 1}, counts) == "BaseLoss::block: target.size() is 2, want 6");
    CHECK(text(target, {1}) == "BaseLoss::block: counts.size() is 1, want 6");
    CHECK(text({0, 0, 0, 0, 0, 5}, counts) == "BaseLoss::block: target is 5, want -1 or a token below 5");
    CHECK(text({0, 0, 0, 0, 0, -2}, counts) == "BaseLoss::block: target is -2, want -1 or a token below 5");
    std::vector<double> small(6);
    CHECK(text(target, counts, {small.data(), 2, 3}) == "BaseLoss::block: d_student.rows is 2, want 6");
}
