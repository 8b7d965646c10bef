# cmake --install, and find_package(FlashAttentionPlus) for those who link us.
include(CMakePackageConfigHelpers)
set(FA_PACKAGE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/FlashAttentionPlus)

install(TARGETS flash_attention_plus EXPORT FlashAttentionPlusTargets)
install(DIRECTORY include/flash_attn DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})
install(EXPORT FlashAttentionPlusTargets NAMESPACE FlashAttentionPlus:: DESTINATION ${FA_PACKAGE_DIR})

configure_package_config_file(cmake/FlashAttentionPlusConfig.cmake.in
  ${PROJECT_BINARY_DIR}/FlashAttentionPlusConfig.cmake INSTALL_DESTINATION ${FA_PACKAGE_DIR})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/FlashAttentionPlusConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/FlashAttentionPlusConfig.cmake
              ${PROJECT_BINARY_DIR}/FlashAttentionPlusConfigVersion.cmake
        DESTINATION ${FA_PACKAGE_DIR})
