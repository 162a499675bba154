#include "report.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <iomanip>
#include <map>
#include <nlohmann/json.hpp>
#include <ostream>
#include <sstream>

#include "../common/budget_text.hpp"
#include "../common/gnuplot.hpp"
#include "../common/write_file.hpp"

namespace tiny_llama {
namespace {

using examples::quoted;
using examples::text_of;

/// Distinct values of a projection, in order of appearance.
template <class Project>
std::vector<std::string> distinct(std::span<const Row> rows, Project&& project) {
    std::vector<std::string> values;
    for (const Row& row : rows) {
        const std::string value = project(row);
        if (std::find(values.begin(), values.end(), value) == values.end()) values.push_back(value);
    }
    return values;
}
std::vector<std::string> tasks_of(std::span<const Row> rows) {
    return distinct(rows, [](const Row& row) { return row.task; });
}
std::vector<std::string> policies_of(std::span<const Row> rows) {
    return distinct(rows, [](const Row& row) { return row.setting.policy; });
}
std::vector<std::string> budgets_of(std::span<const Row> rows) {
    return distinct(rows, [](const Row& row) { return text_of(row.setting.budget); });
}
const Row& find(std::span<const Row> rows, const std::string& task, const std::string& policy,
                const std::string& budget) {
    return *std::find_if(rows.begin(), rows.end(), [&](const Row& row) {
        return row.task == task && row.setting.policy == policy && text_of(row.setting.budget) == budget;
    });
}
const Task& find(std::span<const Task> tasks, const std::string& name) {
    return *std::find_if(tasks.begin(), tasks.end(), [&](const Task& task) { return task.name == name; });
}

/// Whether the model thought by itself.
bool any_thoughts(std::span<const Row> rows) {
    return std::any_of(rows.begin(), rows.end(), [](const Row& row) { return row.thought_tokens > 0; });
}

std::size_t longest(const std::vector<std::string>& names) {
    std::size_t length = 0;
    for (const std::string& name : names) length = std::max(length, name.size());
    return length;
}

/// Text between tags.
std::string escaped(const std::string& text) {
    std::string out;
    for (const char c : text) out += c == '&' ? "&amp;" : c == '<' ? "&lt;" : std::string(1, c);
    return out;
}

}  // namespace

void print_table(std::ostream& out, std::span<const Row> rows) {
    struct Column {
        const char* name;
        int digits;
        double (*value)(const Row& row);
    };
    std::vector<Column> columns{
        {"accuracy", 3, [](const Row& row) { return row.accuracy; }},
        {"KB held", 0, [](const Row& row) { return row.kv_bytes / 1000; }},
        {"tokens/s", 0, [](const Row& row) { return row.tokens_per_second; }},
    };
    if (any_thoughts(rows)) {
        columns.push_back({"tokens thought", 1, [](const Row& row) { return row.thought_tokens; }});
        columns.push_back({"second thoughts", 1, [](const Row& row) { return row.second_thoughts; }});
    }
    const auto policies = policies_of(rows), budgets = budgets_of(rows);
    const int name = static_cast<int>(std::max<std::size_t>(longest(policies), 6));
    const auto text = [](const Column& column, const Row& row) {
        std::ostringstream number;
        number << std::fixed << std::setprecision(column.digits) << column.value(row);
        return number.str();
    };
    std::size_t widest = std::max<std::size_t>(longest(budgets), 6);
    for (const Column& column : columns)
        for (const Row& row : rows) widest = std::max(widest, text(column, row).size());
    const int cell = static_cast<int>(widest) + 1;

    for (const std::string& task : tasks_of(rows)) {
        const auto first =
            std::find_if(rows.begin(), rows.end(), [&](const Row& row) { return row.task == task; });
        out << '\n' << task << " (" << first->questions << " questions)\n" << std::setw(name) << "";
        const auto width = [&](const Column& column) {
            return std::max(cell * static_cast<int>(budgets.size()),
                            static_cast<int>(std::char_traits<char>::length(column.name)));
        };
        const auto pad = [&](const Column& column) {
            out << "  " << std::setw(width(column) - cell * static_cast<int>(budgets.size())) << "";
        };
        for (const Column& column : columns) out << "  " << std::setw(width(column)) << column.name;
        out << '\n' << std::left << std::setw(name) << "budget" << std::right;
        for (const Column& column : columns) {
            pad(column);
            for (const std::string& budget : budgets) out << std::setw(cell) << budget;
        }
        out << '\n';
        for (const std::string& policy : policies) {
            out << std::left << std::setw(name) << policy << std::right;
            for (const Column& column : columns) {
                pad(column);
                for (const std::string& budget : budgets)
                    out << std::setw(cell) << text(column, find(rows, task, policy, budget));
            }
            out << '\n';
        }
    }
}

void print_episodes(std::ostream& out, const std::string& task, const Setting& setting,
                    const EpisodeComparison& comparison) {
    const std::size_t questions = comparison[Asked::full].questions;
    out << '\n'
        << setting.policy << " at " << text_of(setting.budget) << ", " << task << ": " << comparison.found
        << " of " << questions << " questions find their topic's episode\n"
        << std::left << std::setw(16) << "" << std::right << std::setw(10) << "accuracy" << std::setw(16)
        << "attention kept" << std::setw(14) << "to its topic" << '\n';
    for (std::size_t i = 0; i < asked_names.size(); ++i) {
        const Answers& one = comparison.answers[i];
        if (one.questions == 0) continue;  // a single episode has no others
        const auto count = static_cast<double>(one.questions);
        out << std::left << std::setw(16) << asked_names[i] << std::right << std::fixed
            << std::setprecision(3) << std::setw(10) << one.right / count << std::setw(16) << one.kept / count
            << std::setw(14);
        if (std::isnan(one.topic_kept))  // a topic without a segment has no attention to keep
            out << '-' << '\n';
        else
            out << one.topic_kept / count << '\n';
    }
}

void write_json(const std::filesystem::path& file, std::span<const Row> rows) {
    nlohmann::ordered_json list = nlohmann::ordered_json::array();
    for (const Row& row : rows) {
        nlohmann::ordered_json item;
        item["task"] = row.task;
        item["policy"] = row.setting.policy;
        if (row.setting.budget.tokens > 0)
            item["budget"] = row.setting.budget.tokens;
        else
            item["budget"] = row.setting.budget.ratio;
        if (!row.setting.rule.empty()) item["rule"] = row.setting.rule;
        item["accuracy"] = row.accuracy;
        item["questions"] = row.questions;
        item["kv_bytes"] = std::llround(row.kv_bytes);
        item["peak_bytes"] = row.peak_bytes;
        item["tokens_per_second"] = std::round(row.tokens_per_second * 10) / 10;
        if (row.thought_tokens > 0) {
            item["thought_tokens"] = row.thought_tokens;
            item["second_thoughts"] = row.second_thoughts;
        }
        list.push_back(std::move(item));
    }
    nlohmann::ordered_json whole;
    whole["rows"] = std::move(list);
    examples::write_file(file, whole.dump(1) + '\n');
}

bool write_accuracy_svg(const std::filesystem::path& file, std::span<const Row> rows,
                        std::span<const Task> tasks) {
    if (!examples::have_gnuplot()) return false;
    const auto names = tasks_of(rows), policies = policies_of(rows), budgets = budgets_of(rows);
    // a ratio is drawn where it lies on average
    const auto tokens = [&](const std::string& task, const kvcull::Budget& budget) {
        double sum = 0;
        const auto& cases = find(tasks, task).cases;
        for (const Case& example : cases)
            sum += static_cast<double>(kvcull::budget_tokens(budget, example.prompt.size()));
        return sum / static_cast<double>(cases.size());
    };
    std::ostringstream plot;
    for (std::size_t t = 0; t < names.size(); ++t)
        for (std::size_t p = 0; p < policies.size(); ++p) {
            std::vector<std::pair<double, double>> points;
            for (const std::string& budget : budgets) {
                const Row& row = find(rows, names[t], policies[p], budget);
                points.emplace_back(tokens(names[t], row.setting.budget), row.accuracy);
            }
            std::sort(points.begin(), points.end());
            plot << "$t" << t << "p" << p << " << EOD\n";
            for (const auto& [x, y] : points) plot << x << ' ' << y << '\n';
            plot << "EOD\n";
        }
    // in pixels: panels left, the legend of all of them right
    const std::size_t columns = names.size() > 1 ? 2 : 1, lines = (names.size() + columns - 1) / columns;
    const double legend = 80 + 7.5 * static_cast<double>(longest(policies));
    const double width = 70 + 400 * static_cast<double>(columns) + legend;
    const double height = 30 + 280 * static_cast<double>(lines);
    plot
        << "set multiplot layout " << lines << ',' << columns << " margins screen " << 70 / width << ','
        << 1 - legend / width << ',' << 50 / height << ',' << 1 - 30 / height << " spacing screen "
        << 80 / width << ',' << 80 / height << '\n'
        << "set logscale x 2\nset yrange [-0.03:1.05]\nset ytics 0, 0.25\nset format y '%.2f'\n"
        << "set grid lc rgb '#e0e0e0'\nset border 3 lc rgb '#808080'\n"
        << "set tics nomirror textcolor rgb '#404040'\n"
        << "set xlabel 'budget per KV head' offset 0,0.4\nset ylabel 'accuracy' offset 1.5,0\n"
        << "set key at screen 0.985,0.5 right center vertical maxcols 1 Left reverse samplen 2 noautotitle\n";
    for (std::size_t t = 0; t < names.size(); ++t) {
        double least = 1e300, most = 0;
        std::ostringstream tics;
        for (const std::string& budget : budgets) {
            const double x = tokens(names[t], find(rows, names[t], policies[0], budget).setting.budget);
            tics << (most == 0 ? "" : ", ") << quoted(budget) << ' ' << x;
            least = std::min(least, x);
            most = std::max(most, x);
        }
        plot << "set title " << quoted(names[t]) << " noenhanced offset 0,-0.6\nset xtics (" << tics.str()
             << ")\nset xrange [" << least / 1.15 << ':' << most * 1.15 << "]\nplot ";
        for (std::size_t p = 0; p < policies.size(); ++p) {
            plot << (p == 0 ? "" : ", ") << "$t" << t << "p" << p << ' ' << examples::line_of(policies[p], p)
                 << " title " << (t + 1 == names.size() ? quoted(policies[p]) : "''") << " noenhanced";
        }
        plot << '\n';
    }
    plot << "unset multiplot\n";

    examples::draw_svg(file, width, height, plot.str());
    return true;
}

void write_kept_svg(const std::filesystem::path& file, std::span<const Row> rows, std::span<const Task> tasks,
                    const kvcull::Budget& budget, std::size_t vocabulary) {
    constexpr double width = 880, bar = 15, pitch = 19, panel_top = 34, panel_gap = 26, top = 58;
    struct Style {
        Kind kind;
        const char *color, *name;
    };
    constexpr std::array<Style, 5> styles{{{Kind::asked_fact, "#b3001b", "fact that is asked for"},
                                           {Kind::fact, "#1f77b4", "other fact"},
                                           {Kind::thought, "#f0a202", "thought"},
                                           {Kind::filler, "#8c8c8c", "filler"},
                                           {Kind::other, "#2b2b2b", "other"}}};
    const auto names = tasks_of(rows), policies = policies_of(rows);
    const double left = 30 + 7 * static_cast<double>(std::max<std::size_t>(longest(policies), 12));
    const double panel = panel_top + pitch * static_cast<double>(policies.size() + 1) + panel_gap;
    std::ostringstream out;
    out << std::setprecision(6);
    const auto label = [&](double x, double y, const std::string& text, const char* more = "") {
        out << "<text x='" << x << "' y='" << y << "' " << more << ">" << escaped(text) << "</text>\n";
    };
    out << "<svg xmlns='http://www.w3.org/2000/svg' width='" << left + width + 20 << "' height='"
        << top + panel * static_cast<double>(names.size()) << "' font-family='Helvetica, Arial, sans-serif' "
        << "font-size='12'>\n<rect width='100%' height='100%' fill='#ffffff'/>\n";
    label(10, 20,
          "Tokens still held after prompt and stream, at a budget of " + text_of(budget) +
              " per KV head. The darker, the more of the KV heads hold the token.",
          "font-size='14'");
    double x = 10;
    for (const Style& style : styles) {
        out << "<rect x='" << x << "' y='33' width='12' height='12' fill='" << style.color << "'/>\n";
        label(x + 17, 43, style.name);
        x += 34 + 6.6 * static_cast<double>(std::char_traits<char>::length(style.name));
    }

    double y = top;
    for (const std::string& name : names) {
        const Case& example = find(tasks, name).cases.front();
        const std::vector<Kind> kind = kinds(example, vocabulary);
        const double token = width / static_cast<double>(kind.size());
        label(10, y + 20, name, "font-weight='bold' font-size='14'");
        label(
            left, y + 20,
            "first case: " + std::to_string(example.prompt.size()) + " tokens of prompt" +
                (example.stream.empty() ? std::string()
                                        : ", then " + std::to_string(example.stream.size()) + " of stream") +
                ", " + std::to_string(example.questions.size()) +
                (example.questions.size() == 1 ? " question" : " questions"));
        double line = y + panel_top;
        const auto strip = [&](const std::string& text, const std::vector<float>& kept) {
            // runs of tokens that look the same become one rectangle, all of one look one path
            std::map<std::pair<Kind, int>, std::ostringstream> paths;
            const auto look = [&](std::size_t i) {
                return std::pair(kind[i], static_cast<int>(std::lround(100 * kept[i])));
            };
            for (std::size_t i = 0, end = 0; i < kind.size(); i = end) {
                for (end = i + 1; end < kind.size() && look(end) == look(i);) ++end;
                paths[look(i)] << 'M' << left + token * static_cast<double>(i) << ' ' << line << 'h'
                               << token * static_cast<double>(end - i) << 'v' << bar << 'h'
                               << -token * static_cast<double>(end - i) << 'z';
            }
            label(left - 8, line + 12, text, "text-anchor='end'");
            out << "<rect x='" << left << "' y='" << line << "' width='" << width << "' height='" << bar
                << "' fill='#f4f4f4'/>\n";
            for (const auto& [seen, path] : paths) {
                const auto [part, percent] = seen;
                if (percent == 0) continue;
                for (const Style& style : styles)
                    if (style.kind == part)
                        out << "<path fill='" << style.color << "' fill-opacity='" << percent / 100.0
                            << "' d='" << path.str() << "'/>\n";
            }
            line += pitch;
        };
        strip("the text", std::vector<float>(kind.size(), 1.0F));
        for (const std::string& policy : policies)
            strip(policy, find(rows, name, policy, text_of(budget)).kept);
        y += panel;
    }
    out << "</svg>\n";
    examples::write_file(file, out.str());
}

}  // namespace tiny_llama
