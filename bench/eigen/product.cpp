// K K^T by Eigen, compiled once for each instruction set under a function name (KVCULL_PRODUCT) and an Eigen
// namespace of its own, so that the linker cannot take the code of one for the other.

#include <Eigen/Core>
#include <cstddef>

namespace kvcull::bench {

void KVCULL_PRODUCT(const float* keys, std::size_t n, std::size_t dim, float* out);

/// out[n, n] = K K^T of keys[n, dim].
void KVCULL_PRODUCT(const float* keys, std::size_t n, std::size_t dim, float* out) {
    using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
    const auto rows = static_cast<Eigen::Index>(n);
    const Eigen::Map<const Matrix> k(keys, rows, static_cast<Eigen::Index>(dim));
    Eigen::Map<Matrix>(out, rows, rows).noalias() = k * k.transpose();
}

}  // namespace kvcull::bench
