# kvcull_headers: every public header. kvcull_check_headers(): does each stand alone, and does it link twice?
file(GLOB_RECURSE kvcull_headers CONFIGURE_DEPENDS
    ${PROJECT_SOURCE_DIR}/include/kvcull/*.hpp ${PROJECT_SOURCE_DIR}/include/kvcull/*.cuh)

# One object per header that includes nothing else (it compiles alone), and one object that includes all of them:
# every header is then in two objects of one executable, so a definition without `inline` breaks the link.
function(kvcull_check_headers target)
    set(headers ${kvcull_headers})
    list(FILTER headers EXCLUDE REGEX "/cuda/|\\.cuh$")
    set(folder ${CMAKE_CURRENT_BINARY_DIR}/${target})
    set(sources ${folder}/main.cpp)
    set(all "")
    foreach(header IN LISTS headers)
        file(RELATIVE_PATH path ${PROJECT_SOURCE_DIR}/include ${header})
        string(REPLACE "/" "_" name ${path})
        file(CONFIGURE OUTPUT ${folder}/${name}.cpp CONTENT "#include <${path}>\n")
        list(APPEND sources ${folder}/${name}.cpp)
        string(APPEND all "#include <${path}>\n")
    endforeach()
    file(CONFIGURE OUTPUT ${folder}/main.cpp CONTENT "${all}int main() {}\n")
    add_executable(${target} ${sources})
    set_target_properties(${target} PROPERTIES UNITY_BUILD OFF)
    target_compile_options(${target} PRIVATE -O0)  # nothing runs: only diagnostics and symbols count
    target_link_libraries(${target} PRIVATE kvcull::kvcull kvcull-warnings Eigen3::Eigen)
endfunction()
