/// Task files of the demo.

#include "tiny_llama/tasks.hpp"

#include <array>

#include "fuzz.hpp"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    static const fuzz::TemporaryFile file("task.json");
    file.write(fuzz::as_bytes(data, size));
    return fuzz::offer([&] {
        const std::array where{file.path()};
        for (const tiny_llama::Task& task : tiny_llama::read_tasks(where, file.folder(), 448))
            for (const tiny_llama::Case& one : task.cases) (void)tiny_llama::kinds(one, 448);
    });
}
