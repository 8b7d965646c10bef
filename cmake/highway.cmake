# Google Highway: one source for every vector instruction set. Only its headers are used, so that
# nothing has to be found at run time. Debian and Ubuntu package it as libhwy-dev; where it is
# missing, a pinned release is fetched.
find_path(FA_HIGHWAY_INCLUDE_DIR hwy/highway.h)
# The same headers serve every processor; a cross compiler must not see the rest of /usr/include.
if(CMAKE_CROSSCOMPILING AND NOT FA_HIGHWAY_INCLUDE_DIR AND EXISTS /usr/include/hwy/highway.h)
  set(FA_HIGHWAY_INCLUDE_DIR ${PROJECT_BINARY_DIR}/highway CACHE PATH "" FORCE)
  file(MAKE_DIRECTORY ${FA_HIGHWAY_INCLUDE_DIR})
  file(CREATE_LINK /usr/include/hwy ${FA_HIGHWAY_INCLUDE_DIR}/hwy SYMBOLIC)
endif()
if(NOT FA_HIGHWAY_INCLUDE_DIR)
  message(STATUS "Highway: libhwy-dev is not installed, fetching release 1.0.7")
  include(FetchContent)
  FetchContent_Declare(highway
    URL https://github.com/google/highway/archive/refs/tags/1.0.7.tar.gz
    SOURCE_SUBDIR headers-only)  # no such folder: nothing of it is built
  FetchContent_MakeAvailable(highway)
  set(FA_HIGHWAY_INCLUDE_DIR ${highway_SOURCE_DIR})
endif()
message(STATUS "Highway: ${FA_HIGHWAY_INCLUDE_DIR}")
add_library(fa_highway INTERFACE)
target_include_directories(fa_highway SYSTEM INTERFACE ${FA_HIGHWAY_INCLUDE_DIR})
