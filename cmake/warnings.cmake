# For this project's own sources only; users of the library never see these flags.
add_library(kvcull-warnings INTERFACE)
target_compile_options(kvcull-warnings INTERFACE
    -Wall -Wextra -Wpedantic -Wconversion -Wshadow $<$<BOOL:${KVCULL_WERROR}>:-Werror>)
