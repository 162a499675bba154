#pragma once
/// Eigen maps over views and back. The only header that knows Eigen; no Eigen type enters the library.

#include <Eigen/Core>

#include "../views.hpp"

namespace kvcull::inline KVCULL_ABI {

template <class T>
using EigenMap =
    Eigen::Map<std::conditional_t<std::is_const_v<T>,
                                  const Eigen::Matrix<std::remove_const_t<T>, Eigen::Dynamic, Eigen::Dynamic,
                                                      Eigen::RowMajor>,
                                  Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>,
               Eigen::Unaligned, Eigen::OuterStride<>>;

/// The same memory as an Eigen matrix. No alignment is assumed.
template <class T>
[[nodiscard]] EigenMap<T> eigen_map(MatrixView<T> view) {
    return EigenMap<T>(view.data, static_cast<Eigen::Index>(view.rows), static_cast<Eigen::Index>(view.cols),
                       Eigen::OuterStride<>(static_cast<Eigen::Index>(view.stride)));
}

/// A view of a row-major Eigen matrix or map with contiguous columns.
template <class Derived>
[[nodiscard]] auto matrix_view(Eigen::DenseBase<Derived>& matrix) {
    static_assert(Derived::IsRowMajor && Derived::InnerStrideAtCompileTime == 1, "rows must be contiguous");
    auto& derived = matrix.derived();
    return MatrixView(derived.data(), static_cast<std::size_t>(derived.rows()),
                      static_cast<std::size_t>(derived.cols()),
                      static_cast<std::size_t>(derived.outerStride()));
}

}  // namespace kvcull::inline KVCULL_ABI
