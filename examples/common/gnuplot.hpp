#pragma once
/// Pictures by gnuplot, where it is installed.

#include <array>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>

namespace examples {

[[nodiscard]] inline bool have_gnuplot() {
    return std::system("gnuplot --version > /dev/null 2>&1") == 0;
}

/// A gnuplot string.
[[nodiscard]] inline std::string quoted(const std::string& text) {
    std::string out = "'";
    for (const char c : text) out += c == '\'' ? "''" : std::string(1, c);
    return out + "'";
}

/// The colour of the `index`-th policy of a picture; `full`, the yardstick, is black.
[[nodiscard]] inline std::string color_of(const std::string& policy, std::size_t index) {
    constexpr std::array<const char*, 8> colors{"#1f77b4", "#7f7f7f", "#d62728", "#ff7f0e",
                                                "#17becf", "#9467bd", "#2ca02c", "#bcbd22"};
    return policy == "full" ? "#000000" : colors[index % colors.size()];
}
/// How a diagram draws the line of the `index`-th policy.
[[nodiscard]] inline std::string line_of(const std::string& policy, std::size_t index) {
    return "with linespoints lw 2 ps 0.7 pt " + std::to_string(4 + index % 9) + " dt " +
           (policy == "full" ? "2" : "1") + " lc rgb '" + color_of(policy, index) + "'";
}

/// Draws `file`, an SVG of `width` by `height` pixels, by a script that need not name terminal or output.
/// @throws std::runtime_error if gnuplot fails
inline void draw_svg(const std::filesystem::path& file, double width, double height,
                     const std::string& script) {
    const std::string whole =
        "set terminal svg size " + std::to_string(width) + ',' + std::to_string(height) +
        " font 'Helvetica,13' background '#ffffff'\nset output " + quoted(file.string()) + '\n' + script;
    const auto close = [](std::FILE* pipe) { ::pclose(pipe); };
    std::unique_ptr<std::FILE, decltype(close)> gnuplot(::popen("gnuplot > /dev/null", "w"), close);
    if (gnuplot == nullptr || std::fwrite(whole.data(), 1, whole.size(), gnuplot.get()) != whole.size() ||
        ::pclose(gnuplot.release()) != 0)
        throw std::runtime_error("gnuplot could not draw " + file.string());
}

}  // namespace examples
