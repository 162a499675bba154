# kvcull_unity(TARGET BATCH): with CMAKE_UNITY_BUILD, up to BATCH sources of TARGET are one translation unit, which
# instantiates their common templates once. Each is within a namespace of its own there, so that helpers of two files may
# share a name; what any of them includes is included before.
function(kvcull_unity target batch)
    if(NOT CMAKE_UNITY_BUILD)
        return()
    endif()
    get_target_property(sources ${target} SOURCES)
    set(includes "#pragma once\n")
    foreach(source IN LISTS sources)
        get_source_file_property(alone ${source} SKIP_UNITY_BUILD_INCLUSION)
        if(alone)
            continue()
        endif()
        cmake_path(ABSOLUTE_PATH source)
        file(STRINGS ${source} lines REGEX "^# *(include|if|el|endif)")
        list(JOIN lines "\n" lines)
        string(APPEND includes "${lines}\n")
        set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${source})  # it may include more by then
        cmake_path(GET source PARENT_PATH folder)
        target_include_directories(${target} PRIVATE ${folder})
    endforeach()
    set(header ${CMAKE_CURRENT_BINARY_DIR}/${target}.hpp)
    file(CONFIGURE OUTPUT ${header} CONTENT "${includes}" @ONLY)
    set_target_properties(${target} PROPERTIES
        UNITY_BUILD_BATCH_SIZE ${batch}
        UNITY_BUILD_UNIQUE_ID KVCULL_FILE
        UNITY_BUILD_CODE_BEFORE_INCLUDE "#include \"${header}\"\nnamespace KVCULL_FILE {"
        UNITY_BUILD_CODE_AFTER_INCLUDE "}")
endfunction()
