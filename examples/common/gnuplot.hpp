#pragma once
/// Pictures by gnuplot, where it is installed.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace examples {

[[nodiscard]] inline bool have_gnuplot() {
    return std::system("gnuplot --version > /dev/null 2>&1") == 0;
}

/// A gnuplot string. Control characters become spaces: a new line would be a new command.
[[nodiscard]] inline std::string quoted(const std::string& text) {
    std::string out = "'";
    for (const char c : text)
        out += c == '\'' ? "''" : std::string(1, static_cast<unsigned char>(c) < 0x20 ? ' ' : c);
    return out + "'";
}

/// What the others are measured by: drawn black and dashed.
[[nodiscard]] inline bool is_yardstick(const std::string& policy) {
    return policy == "full" || policy == "belady";
}
/// The colour of the `index`-th policy of a picture.
[[nodiscard]] inline std::string color_of(const std::string& policy, std::size_t index) {
    constexpr std::array<const char*, 8> colors{"#1f77b4", "#7f7f7f", "#d62728", "#ff7f0e",
                                                "#17becf", "#9467bd", "#2ca02c", "#bcbd22"};
    return is_yardstick(policy) ? "#000000" : colors[index % colors.size()];
}
/// How a diagram draws the line of the `index`-th policy.
[[nodiscard]] inline std::string line_of(const std::string& policy, std::size_t index) {
    return "with linespoints lw 2 ps 0.7 pt " + std::to_string(4 + index % 9) + " dt " +
           (is_yardstick(policy) ? "2" : "1") + " lc rgb '" + color_of(policy, index) + "'";
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

/// A line of a diagram.
struct Line {
    struct Point {
        double x = 0;
        std::array<double, 2> y{};  ///< in the left panel, in the right one
    };
    std::string name;
    std::vector<Point> points;  ///< ascending x
};
struct Panel {
    std::string title;
    std::string settings;  ///< gnuplot's, such as `set yrange [0:*]`; they stay for the panels after it
};

/// Two panels with the same lines and x, which is logarithmic; the legend stands at the right.
/// @param tics  of x: `8, 64`, or `'0.5' 193, '96' 96`
/// @throws std::runtime_error if gnuplot fails
inline void draw_panels(const std::filesystem::path& file, const std::string& x_label,
                        const std::string& tics, const std::vector<Line>& lines,
                        const std::array<Panel, 2>& panels) {
    std::ostringstream plot;
    std::size_t longest = 0;
    for (std::size_t i = 0; i < lines.size(); ++i) {
        plot << "$line" << i << " << EOD\n";
        for (const auto& [x, y] : lines[i].points) plot << x << ' ' << y[0] << ' ' << y[1] << '\n';
        plot << "EOD\n";
        longest = std::max(longest, lines[i].name.size());
    }
    // in pixels: two panels left, the legend right
    const double legend = 90 + 7.5 * static_cast<double>(longest), width = 70 + 800 + legend, height = 340;
    plot << "set multiplot layout 1,2 margins screen " << 70 / width << ',' << 1 - legend / width
         << ",0.17,0.88"
         << " spacing screen " << 80 / width
         << "\nset logscale x 2\nset offsets graph 0.05, graph 0.05, 0, 0\n"
         << "set xtics (" << tics << ")\nset grid lc rgb '#e0e0e0'\nset border 3 lc rgb '#808080'\n"
         << "set tics nomirror textcolor rgb '#404040'\nset xlabel " << quoted(x_label) << '\n'
         << "set key at screen 0.99,0.5 right center vertical maxcols 1 Left reverse samplen 2 noautotitle\n";
    for (std::size_t column = 0; column < panels.size(); ++column) {
        plot << panels[column].settings << "\nset title " << quoted(panels[column].title) << "\nplot ";
        const bool titled = column + 1 == panels.size();
        for (std::size_t i = 0; i < lines.size(); ++i) {
            plot << (i == 0 ? "" : ", ") << "$line" << i << " using 1:" << column + 2 << ' '
                 << line_of(lines[i].name, i) << " title " << (titled ? quoted(lines[i].name) : "''")
                 << " noenhanced";
        }
        plot << '\n';
    }
    plot << "unset multiplot\n";
    draw_svg(file, width, height, plot.str());
}

}  // namespace examples
