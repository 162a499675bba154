include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(package_dir ${CMAKE_INSTALL_DATADIR}/cmake/kvcull)
install(TARGETS kvcull EXPORT kvcull-targets FILE_SET HEADERS)
install(EXPORT kvcull-targets NAMESPACE kvcull:: DESTINATION ${package_dir})
configure_package_config_file(cmake/kvcull-config.cmake.in kvcull-config.cmake
    INSTALL_DESTINATION ${package_dir})
# Before 1.0 a minor version may break.
write_basic_package_version_file(kvcull-config-version.cmake COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES ${PROJECT_BINARY_DIR}/kvcull-config.cmake ${PROJECT_BINARY_DIR}/kvcull-config-version.cmake
    DESTINATION ${package_dir})
