#include "tasks.hpp"

#include <algorithm>
#include <cstdio>
#include <set>

#include "json.hpp"

namespace tiny_llama {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

std::vector<int> read_tokens(const Object& object, const std::string& key, std::size_t vocabulary) {
    std::vector<int> tokens;
    for (const json& token : object.list(key)) {
        if (!token.is_number_unsigned() || token.get<std::size_t>() >= vocabulary)
            object.wrong_at(key, tokens.size(), "a token id below " + std::to_string(vocabulary));
        tokens.push_back(token.get<int>());
    }
    return tokens;
}

std::vector<float> read_embedding(const json& list, const Object& object, const std::string& key) {
    std::vector<float> embedding;
    if (list.is_array())
        for (const json& number : list)
            if (number.is_number()) embedding.push_back(number.get<float>());
    if (embedding.empty() || embedding.size() != list.size()) object.wrong(key, "numbers");
    if (std::all_of(embedding.begin(), embedding.end(), [](float x) { return x == 0.0F; }))
        object.wrong(key, "a direction, so not zeros alone");
    return embedding;
}

std::vector<TextSegment> read_segments(const Object& object, std::size_t tokens) {
    std::vector<TextSegment> segments;
    for (const json& span : object.list("segments")) {
        const bool pair = span.is_array() && span.size() == 2 && span[0].is_number_unsigned() &&
                          span[1].is_number_unsigned();
        if (!pair || span[0] >= span[1] || span[1] > tokens)
            object.wrong("segments", "pairs begin < end, not beyond " + std::to_string(tokens));
        segments.push_back({.begin = span[0], .end = span[1]});
    }
    if (!object.has("embeddings")) return segments;
    const json& embeddings = object.list("embeddings");
    if (embeddings.size() != segments.size())
        object.wrong("embeddings", "one for each of " + std::to_string(segments.size()) + " segments");
    for (std::size_t i = 0; i < segments.size(); ++i)
        segments[i].embedding = read_embedding(embeddings[i], object, "embeddings");
    const std::size_t size = segments.empty() ? 0 : segments.front().embedding.size();
    for (const TextSegment& one : segments)
        if (one.embedding.size() != size)
            object.wrong("embeddings", "one number of channels, as the first has: " + std::to_string(size));
    return segments;
}

/// A question meets segments with embeddings of `size` numbers; 0: they have none.
void check_embedding(const Object& object, const Question& question, std::size_t size) {
    const std::size_t own = question.embedding.size();
    if (own > 0 && own != size)
        object.wrong("embedding", std::to_string(size) + " numbers, as many as segments have");
    if (own == 0 && size > 0) (void)object.at("embedding");  // is missing
}

Case read_case(const Object& object, std::size_t vocabulary) {
    Case example{.prompt = read_tokens(object, "prompt", vocabulary)};
    if (object.has("stream")) example.stream = read_tokens(object, "stream", vocabulary);
    if (example.prompt.empty()) object.wrong("prompt", "at least one token");
    if (object.has("segments")) example.segments = read_segments(object, example.size());
    object.each("questions", [&](const Object& question) {
        example.questions.push_back({.ask = read_tokens(question, "ask", vocabulary),
                                     .answer = read_tokens(question, "answer", vocabulary)});
        if (question.has("topic")) {
            const auto topic = question.get<std::size_t>("topic");
            if (topic >= vocabulary)
                question.wrong("topic", "a token id below " + std::to_string(vocabulary));
            example.questions.back().topic = static_cast<int>(topic);
        }
        if (question.has("embedding"))
            example.questions.back().embedding =
                read_embedding(question.list("embedding"), question, "embedding");
        if (!example.segments.empty())
            check_embedding(question, example.questions.back(), example.segments.front().embedding.size());
        if (example.questions.back().ask.empty()) question.wrong("ask", "at least one token");
        if (example.questions.back().answer.empty()) question.wrong("answer", "at least one token");
    });
    return example;
}

Task read_task(const json& file, const fs::path& path, std::size_t vocabulary) {
    const Object object(file, path.string());
    Task task{.name = object.get<std::string>("task")};
    object.each("cases",
                [&](const Object& example) { task.cases.push_back(read_case(example, vocabulary)); });
    if (task.cases.empty()) object.wrong("cases", "at least one case");
    return task;
}

/// The tasks among the files of a folder. A model's folder may hold files that are no JSON but their name.
std::vector<Task> read_folder(const fs::path& folder, std::size_t vocabulary) {
    std::set<fs::path> files;  // in order of names
    for (const auto& item : fs::directory_iterator(folder))
        if (item.path().extension() == ".json") files.insert(item.path());
    std::vector<Task> tasks;
    for (const fs::path& path : files) {
        json file;
        try {
            file = read_json(path);
        } catch (const kvcull::error::format_error& e) {
            std::fprintf(stderr, "so not a task: %s\n", e.what());
            continue;
        }
        if (file.is_object() && file.contains("task")) tasks.push_back(read_task(file, path, vocabulary));
    }
    return tasks;
}

}  // namespace

std::vector<Task> read_tasks(std::span<const std::string> where, const fs::path& home,
                             std::size_t vocabulary) {
    std::vector<Task> tasks;
    const auto add = [&](Task task, const std::string& source) {
        const auto same = [&](const Task& other) { return other.name == task.name; };
        if (std::any_of(tasks.begin(), tasks.end(), same))
            fail(source, "task '" + task.name + "' is given twice");
        tasks.push_back(std::move(task));
    };
    const auto add_folder = [&](const fs::path& folder) {
        std::vector<Task> found = read_folder(folder, vocabulary);
        if (found.empty()) fail(folder.string(), "holds no JSON file with a `task` key");
        for (Task& task : found) add(std::move(task), folder.string());
    };
    const auto add_named = [&](const std::string& name) {
        std::vector<Task> found = read_folder(home, vocabulary);
        std::string names;
        for (Task& task : found) {
            if (task.name == name) return add(std::move(task), home.string());
            names += (names.empty() ? "" : ", ") + task.name;
        }
        fail("task " + name,
             "no such file, folder or task; the tasks in " + home.string() + " are: " + names);
    };
    if (where.empty()) add_folder(home);
    for (const std::string& item : where) {
        if (fs::is_directory(item)) {
            add_folder(item);
        } else if (fs::exists(item)) {
            add(read_task(read_json(item), item, vocabulary), item);
        } else {
            add_named(item);
        }
    }
    return tasks;
}

std::vector<Kind> kinds(const Case& example, std::size_t vocabulary) {
    constexpr int stop = 2, wait = 6, so = 7, topics = 8, names = 24, values = 152, words = 280, end = 448;
    const auto within = [](int token, int first, int last) { return token >= first && token < last; };

    std::vector<int> tokens = example.prompt;
    tokens.insert(tokens.end(), example.stream.begin(), example.stream.end());
    std::vector<Kind> kinds(tokens.size(), Kind::other);
    if (vocabulary != end) return kinds;
    const auto asked = [&](int name) {
        return std::any_of(example.questions.begin(), example.questions.end(), [&](const Question& question) {
            return std::find(question.ask.begin(), question.ask.end(), name) != question.ask.end();
        });
    };
    for (std::size_t i = 0; i + 3 < tokens.size(); ++i) {
        const bool statement = within(tokens[i + 1], names, values) && within(tokens[i + 2], values, words) &&
                               tokens[i + 3] == stop;
        Kind kind = Kind::other;
        std::size_t length = 1;
        if (within(tokens[i], topics, names) && statement) {
            kind = asked(tokens[i + 1]) ? Kind::asked_fact : Kind::fact;
            length = 4;
        } else if ((tokens[i] == wait || tokens[i] == so) && statement) {
            kind = Kind::thought;
            length = 4;
        } else if (within(tokens[i], topics, names) && within(tokens[i + 1], words, end)) {
            kind = Kind::filler;
            while (i + length < tokens.size() && within(tokens[i + length], words, end)) ++length;
            if (i + length < tokens.size() && tokens[i + length] == stop) ++length;
        }
        std::fill_n(kinds.begin() + static_cast<std::ptrdiff_t>(i), length, kind);
        i += length - 1;
    }
    return kinds;
}

}  // namespace tiny_llama
