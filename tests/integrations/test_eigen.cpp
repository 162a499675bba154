#if __has_include(<Eigen/Core>)
#    include "kvcull/integrations/eigen.hpp"

#    include <vector>

#    include "support/catch.hpp"
#    include "support/random.hpp"

using namespace kvcull;

TEST_CASE("an Eigen map is the memory of the view, gaps between rows included", "[contract]") {
    std::vector<float> numbers = test::random_floats(5 * 9, 1);
    const MatrixView<float> view(numbers.data() + 1, 5, 7, 9);
    auto map = eigen_map(view);
    REQUIRE(map.rows() == 5);
    REQUIRE(map.cols() == 7);
    for (std::size_t i = 0; i < 5; ++i)
        for (std::size_t j = 0; j < 7; ++j)
            CHECK(&map(static_cast<Eigen::Index>(i), static_cast<Eigen::Index>(j)) == &view[i][j]);
    const float outside = numbers[8];
    map.setZero();
    CHECK(view[4][6] == 0.0F);
    CHECK(numbers[8] == outside);
    const MatrixView<const float> fixed = view;
    CHECK(eigen_map(fixed).data() == view.data);
}

TEST_CASE("a view of an Eigen matrix, map or block has its shape and stride", "[contract]") {
    using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
    RowMajor matrix = RowMajor::Random(6, 8);
    const MatrixView<float> whole = matrix_view(matrix);
    CHECK((whole.rows == 6 && whole.cols == 8 && whole.stride == 8 && whole.data == matrix.data()));
    auto block = matrix.block(1, 2, 3, 4);
    const auto part = matrix_view(block);
    CHECK((part.rows == 3 && part.cols == 4 && part.stride == 8));
    CHECK(&part[2][3] == &matrix(3, 5));
    auto map = eigen_map(whole);
    const auto again = matrix_view(map);
    CHECK((again.data == whole.data && again.rows == 6 && again.stride == 8));
}
#endif
