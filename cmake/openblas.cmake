# The target liveact::openblas, from the scipy-openblas32 package or from the system.
#
# A library that is given is bundled: installed beside the runtime. One of the system is not, and
# whoever links the runtime statically must have it too. LIVEACT_OPENBLAS_BUNDLED says which.

set(LIVEACT_OPENBLAS_INCLUDE "" CACHE PATH "Folder with cblas.h of the OpenBLAS to bundle")
set(LIVEACT_OPENBLAS_LIBRARY "" CACHE FILEPATH "The OpenBLAS to bundle; empty: that of the system")

if(LIVEACT_OPENBLAS_LIBRARY)
  set(LIVEACT_OPENBLAS_BUNDLED ON)
  set(openblas_library ${LIVEACT_OPENBLAS_LIBRARY})
  set(openblas_include ${LIVEACT_OPENBLAS_INCLUDE})
else()
  set(LIVEACT_OPENBLAS_BUNDLED OFF)
  find_library(LIVEACT_SYSTEM_OPENBLAS openblas PATH_SUFFIXES openblas-pthread)
  find_path(LIVEACT_SYSTEM_CBLAS openblas_config.h
            PATH_SUFFIXES openblas-pthread openblas ${CMAKE_LIBRARY_ARCHITECTURE}/openblas-pthread)
  if(NOT LIVEACT_SYSTEM_OPENBLAS OR NOT LIVEACT_SYSTEM_CBLAS)
    message(FATAL_ERROR "expected OpenBLAS (apt install libopenblas-dev, or pip install "
                        "scipy-openblas32 and LIVEACT_OPENBLAS_LIBRARY, LIVEACT_OPENBLAS_INCLUDE), "
                        "found none")
  endif()
  set(openblas_library ${LIVEACT_SYSTEM_OPENBLAS})
  set(openblas_include ${LIVEACT_SYSTEM_CBLAS})
endif()
get_filename_component(openblas_file ${openblas_library} NAME)
# "scipy_openblas" of libscipy_openblas.so: what a linker is told.
string(REGEX REPLACE "^lib(.+)\\.(so|a|dylib).*$" "\\1" LIVEACT_OPENBLAS_NAME ${openblas_file})

add_library(liveact::openblas UNKNOWN IMPORTED)
set_target_properties(liveact::openblas PROPERTIES
  IMPORTED_LOCATION ${openblas_library}
  INTERFACE_INCLUDE_DIRECTORIES ${openblas_include})
# The functions of the package have names of their own, so that they meet no other OpenBLAS.
if(NOT openblas_file MATCHES "scipy")
  set_property(TARGET liveact::openblas PROPERTY INTERFACE_COMPILE_DEFINITIONS
    scipy_cblas_sgemm=cblas_sgemm
    scipy_openblas_set_num_threads=openblas_set_num_threads)
endif()
