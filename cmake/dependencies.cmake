# What tests, examples and benchmarks need; the library itself needs nothing. An installed package is taken first, a
# pinned source second (FETCHCONTENT_SOURCE_DIR_<NAME> names a local copy where there is no network).
include(FetchContent)

set(THREADS_PREFER_PTHREAD_FLAG ON)
find_package(Threads REQUIRED)

set(dependencies)
function(kvcull_dependency name repository tag)
    FetchContent_Declare(${name} GIT_REPOSITORY ${repository} GIT_TAG ${tag} GIT_SHALLOW ON SYSTEM FIND_PACKAGE_ARGS)
    list(APPEND dependencies ${name})
    set(dependencies ${dependencies} PARENT_SCOPE)
endfunction()
if(KVCULL_BUILD_TESTS)
    kvcull_dependency(Catch2 https://github.com/catchorg/Catch2.git v3.7.1)
endif()
if(KVCULL_BUILD_TESTS OR KVCULL_BUILD_EXAMPLES OR KVCULL_BUILD_BENCH OR KVCULL_BUILD_FUZZERS)  # in the tests: for integrations/eigen.hpp
    kvcull_dependency(Eigen3 https://gitlab.com/libeigen/eigen.git 3.4.0)
endif()
if(KVCULL_BUILD_EXAMPLES OR KVCULL_BUILD_FUZZERS)
    kvcull_dependency(nlohmann_json https://github.com/nlohmann/json.git v3.11.3)
endif()
if(KVCULL_BUILD_EXAMPLES)
    kvcull_dependency(CLI11 https://github.com/CLIUtils/CLI11.git v2.4.2)
endif()
if(KVCULL_BUILD_BENCH)
    kvcull_dependency(benchmark https://github.com/google/benchmark.git v1.8.3)
endif()

# For those that are built from source. The policy: their options obey these variables.
set(CMAKE_POLICY_DEFAULT_CMP0077 NEW)
set(BUILD_TESTING OFF)
set(EIGEN_BUILD_DOC OFF)
set(EIGEN_BUILD_PKGCONFIG OFF)
set(BENCHMARK_ENABLE_TESTING OFF)
set(BENCHMARK_ENABLE_INSTALL OFF)
FetchContent_MakeAvailable(${dependencies})

# kvcull-catch-main: Catch2 with its `main`. Version 2 is a header; the compiled `main` beside it, where a distribution
# ships one, is for this machine alone.
if(KVCULL_BUILD_TESTS)
    if(TARGET Catch2::Catch2WithMain AND NOT (CMAKE_CROSSCOMPILING AND Catch2_VERSION AND Catch2_VERSION VERSION_LESS 3))
        add_library(kvcull-catch-main INTERFACE)
        target_link_libraries(kvcull-catch-main INTERFACE Catch2::Catch2WithMain)
    else()
        file(CONFIGURE OUTPUT catch_main.cpp CONTENT "#define CATCH_CONFIG_MAIN\n#include <catch2/catch.hpp>\n")
        add_library(kvcull-catch-main STATIC ${CMAKE_CURRENT_BINARY_DIR}/catch_main.cpp)
        target_link_libraries(kvcull-catch-main PUBLIC Catch2::Catch2)
    endif()
endif()
