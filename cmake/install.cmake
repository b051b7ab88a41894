# The SDK: liveact::liveact with its headers, a CMake package, a pkg-config file and, where they were
# compiled, the GPU kernels. The tree may be moved; nothing in it has an absolute path.

include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(LIVEACT_KERNELS "share/liveact/gpu" CACHE STRING
    "Where GPU kernels are, from the prefix on: <here>/<architecture>/manifest.json")
set(LIVEACT_KERNELS_SOURCE "" CACHE PATH
    "Compiled kernels to install there (python -m triton_kernels.compile); empty: none")

file(RELATIVE_PATH kernels_from_library /prefix/${CMAKE_INSTALL_LIBDIR} /prefix/${LIVEACT_KERNELS})
set_property(SOURCE csrc/cuda/manifest.cpp APPEND PROPERTY COMPILE_DEFINITIONS
             LIVEACT_KERNELS_FROM_LIBRARY="${kernels_from_library}")

add_library(liveact $<TARGET_OBJECTS:liveact_core>)
add_library(liveact::liveact ALIAS liveact)
target_include_directories(liveact PUBLIC $<BUILD_INTERFACE:${CMAKE_CURRENT_SOURCE_DIR}/include>
                                          $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
target_compile_features(liveact PUBLIC cxx_std_20)
target_link_libraries(liveact PRIVATE Threads::Threads ${CMAKE_DL_LIBS} liveact::openblas)
if(BUILD_SHARED_LIBS)
  set(exports ${CMAKE_CURRENT_SOURCE_DIR}/cmake/exports.map)
  target_link_options(liveact PRIVATE -Wl,--version-script=${exports} -Wl,--no-undefined)
  # Compatible within a minor version: docs/sdk.md, "What is stable".
  set(LIVEACT_ABI ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR})
  set_target_properties(liveact PROPERTIES
    VERSION ${LIVEACT_ABI} SOVERSION ${LIVEACT_ABI} LINK_DEPENDS ${exports}
    BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN")
  set(LIVEACT_PC_LIBS "")
else()
  set(LIVEACT_PC_LIBS " -l${LIVEACT_OPENBLAS_NAME} -lstdc++ -lm -lpthread -ldl")
endif()

set(CMAKE_INSTALL_DEFAULT_COMPONENT_NAME sdk)
set(package ${CMAKE_INSTALL_LIBDIR}/cmake/liveact)
install(TARGETS liveact EXPORT liveact LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
                                       ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/liveact DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT liveact NAMESPACE liveact:: FILE liveactTargets.cmake DESTINATION ${package})
if(LIVEACT_OPENBLAS_BUNDLED)
  install(FILES ${openblas_library} DESTINATION ${CMAKE_INSTALL_LIBDIR})
endif()
if(LIVEACT_KERNELS_SOURCE)
  install(DIRECTORY ${LIVEACT_KERNELS_SOURCE}/ DESTINATION ${LIVEACT_KERNELS})
endif()
configure_package_config_file(cmake/liveactConfig.cmake.in liveactConfig.cmake
                              INSTALL_DESTINATION ${package}
                              PATH_VARS CMAKE_INSTALL_LIBDIR LIVEACT_KERNELS)
write_basic_package_version_file(liveactConfigVersion.cmake COMPATIBILITY SameMinorVersion)
configure_file(cmake/liveact.pc.in liveact.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/liveactConfig.cmake
              ${CMAKE_CURRENT_BINARY_DIR}/liveactConfigVersion.cmake DESTINATION ${package})
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/liveact.pc
        DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
