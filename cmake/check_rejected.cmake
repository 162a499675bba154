# cmake -DCOMPILER=.. -DINCLUDE=.. -DFILE=.. -P check_rejected.cmake: FILE must not compile, for the reason it states.
file(STRINGS "${FILE}" first LIMIT_COUNT 1)
if(NOT first MATCHES "^// expect: (.+)$")
    message(FATAL_ERROR "${FILE}: the first line is not `// expect: TEXT`")
endif()
set(expected "${CMAKE_MATCH_1}")
set(ENV{LC_ALL} C)  # plain quotes, English
execute_process(COMMAND "${COMPILER}" -std=c++20 -fsyntax-only "-I${INCLUDE}" "${FILE}"
    RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
if(status EQUAL 0)
    message(FATAL_ERROR "${FILE} compiles and must not")
endif()
string(FIND "${output}" "${expected}" at)
if(at EQUAL -1)
    message(FATAL_ERROR "${FILE} is rejected, but the diagnostic lacks: ${expected}\n${output}")
endif()
