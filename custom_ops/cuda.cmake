# CUDA half of the core, included by CMakeLists.txt when FLASHMASK_CUDA is on. Any toolkit from 11.8 on.
#
# Narrow a build with cmake options or environment variables of the same name (semicolon- or comma-separated lists; the
# environment wins):
#   FLASHMASK_CUDA_ARCHS   80;90 by default: machine code for Ampere, Ada (which runs sm_80's) and Hopper, and PTX of
#                          the last for anything newer. 90 brings Hopper's own kernels (sm_90a) too
#   FLASHMASK_HEAD_DIMS    32;64;96;128;192;256 by default; other head dims are padded to the next one built
#   FLASHMASK_CUDA_DTYPES  bf16;fp16 by default
# -DFLASHMASK_CUDA_RESOURCES=ON prints registers, spills and shared memory of every kernel.
enable_language(CUDA)
option(FLASHMASK_CUDA_RESOURCES "Print the resource use of the CUDA kernels" OFF)

# The environment's word is not cached: it holds for this run of CMake, and what the build folder was told with -D stays.
function(flashmask_list_option name default description)
  set(${name} "${default}" CACHE STRING "${description}")
  set(value "${${name}}")
  if(NOT "$ENV{${name}}" STREQUAL "")
    set(value "$ENV{${name}}")
  endif()
  string(REPLACE "," ";" value "${value}")
  set(${name} "${value}" PARENT_SCOPE)
endfunction()

flashmask_list_option(FLASHMASK_CUDA_ARCHS "80;90" "CUDA architectures")
flashmask_list_option(FLASHMASK_HEAD_DIMS "32;64;96;128;192;256" "Head dims to build CUDA kernels for")
flashmask_list_option(FLASHMASK_CUDA_DTYPES "bf16;fp16" "Storage types to build CUDA kernels for")

# For which devices there is code: from the oldest architecture on, and by the PTX of the last for all that is newer. But
# that of 90a is for 9.0 alone, that of 100f for 10.x. (In between some may lack code, such as 9.0 with "80;100".)
set(flashmask_architectures)
set(oldest 9999)
foreach(arch IN LISTS FLASHMASK_CUDA_ARCHS)
  if(NOT arch MATCHES "^([1-9][0-9]+)([af]?)$")
    message(FATAL_ERROR "FLASHMASK_CUDA_ARCHS: expected numbers such as 80;90, got '${arch}'")
  endif()
  list(APPEND flashmask_architectures ${arch}-real)
  if(CMAKE_MATCH_1 LESS oldest)
    set(oldest ${CMAKE_MATCH_1})
  endif()
  set(newest 9999)
  if(CMAKE_MATCH_2 STREQUAL "a")
    set(newest ${CMAKE_MATCH_1})
  elseif(CMAKE_MATCH_2 STREQUAL "f")
    math(EXPR newest "${CMAKE_MATCH_1} / 10 * 10 + 9")
  endif()
endforeach()
list(GET FLASHMASK_CUDA_ARCHS -1 last)
list(APPEND flashmask_architectures ${last}-virtual)

# wgmma and TMA need a toolkit of 12.3 or newer; the portable kernels serve Hopper too where it is older.
set(flashmask_has_sm90 OFF)
if("90" IN_LIST FLASHMASK_CUDA_ARCHS)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.3)
    set(flashmask_has_sm90 ON)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.6)
      message(STATUS "flashmask: ptxas of CUDA ${CMAKE_CUDA_COMPILER_VERSION} makes slow code of Hopper's kernels "
                     "(docs/hopper-kernel.md): better build with 12.6 or newer")
    endif()
  else()
    message(STATUS "flashmask: nvcc ${CMAKE_CUDA_COMPILER_VERSION} is older than 12.3: Hopper gets the portable kernels")
  endif()
endif()

# One small translation unit per architecture x head dim x dtype x direction, so that builds run in parallel.
set(flashmask_generated ${CMAKE_CURRENT_BINARY_DIR}/cuda_instances)
set(flashmask_table "")
list(SORT FLASHMASK_HEAD_DIMS COMPARE NATURAL)
foreach(HEAD_DIM IN LISTS FLASHMASK_HEAD_DIMS)
  if(NOT HEAD_DIM MATCHES "^(32|64|96|128|192|256)$")
    message(FATAL_ERROR "FLASHMASK_HEAD_DIMS: expected some of 32;64;96;128;192;256, got '${HEAD_DIM}'")
  endif()
endforeach()

# Writes the instances of one folder for the named head dims of one direction (those that are wanted at all), appends them
# to `sources` and to the table of kernels.
function(flashmask_instantiate ARCH min_capability max_capability DIRECTION sources)
  string(TOUPPER ${DIRECTION} macro)
  foreach(HEAD_DIM IN LISTS ARGN)
    if(NOT HEAD_DIM IN_LIST FLASHMASK_HEAD_DIMS)
      continue()
    endif()
    foreach(dtype IN LISTS FLASHMASK_CUDA_DTYPES)
      if(dtype STREQUAL "bf16")
        set(TYPE __nv_bfloat16)
        set(enumerator FLASHMASK_BFLOAT16)
      elseif(dtype STREQUAL "fp16")
        set(TYPE __half)
        set(enumerator FLASHMASK_FLOAT16)
      else()
        message(FATAL_ERROR "FLASHMASK_CUDA_DTYPES: expected some of bf16;fp16, got '${dtype}'")
      endif()
      string(APPEND flashmask_table
        "FLASHMASK_${macro}(${ARCH}, ${min_capability}, ${max_capability}, ${enumerator}, ${TYPE}, ${HEAD_DIM})\n")
      set(source ${flashmask_generated}/${ARCH}_${DIRECTION}_${HEAD_DIM}_${dtype}.cu)
      configure_file(${CMAKE_CURRENT_SOURCE_DIR}/flashmask/cuda/instance.cu.in ${source} @ONLY)
      list(APPEND ${sources} ${source})
    endforeach()
  endforeach()
  set(${sources} "${${sources}}" PARENT_SCOPE)
  set(flashmask_table "${flashmask_table}" PARENT_SCOPE)
endfunction()

set(flashmask_sm90_instances)
if(flashmask_has_sm90)
  flashmask_instantiate(sm90 90 90 forward flashmask_sm90_instances 64 96 128 192 256)
  flashmask_instantiate(sm90 90 90 backward flashmask_sm90_instances 64 128 192 256)
endif()
set(flashmask_instances)
foreach(direction IN ITEMS forward backward)
  flashmask_instantiate(sm80 ${oldest} ${newest} ${direction} flashmask_instances 32 64 96 128 192 256)
endforeach()
file(CONFIGURE OUTPUT ${flashmask_generated}/built_kernels.inc CONTENT "${flashmask_table}" @ONLY)

target_sources(flashmask PRIVATE
  ${CMAKE_CURRENT_SOURCE_DIR}/flashmask/cuda/cuda_backend.cu
  ${CMAKE_CURRENT_SOURCE_DIR}/flashmask/cuda/kernel_table.cu
  ${CMAKE_CURRENT_SOURCE_DIR}/flashmask/cuda/tile_lists.cu
  ${flashmask_instances})
if(flashmask_sm90_instances)
  # Machine code that only Hopper runs (sm_90a), and only for these sources.
  add_library(flashmask_sm90 OBJECT ${flashmask_sm90_instances})
  target_include_directories(flashmask_sm90 PRIVATE flashmask ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  set_target_properties(flashmask_sm90 PROPERTIES CUDA_ARCHITECTURES 90a-real)
  target_sources(flashmask PRIVATE $<TARGET_OBJECTS:flashmask_sm90>)
  target_compile_definitions(flashmask PRIVATE FLASHMASK_WITH_SM90)
endif()
target_include_directories(flashmask PRIVATE ${flashmask_generated})
target_compile_definitions(flashmask PRIVATE FLASHMASK_WITH_CUDA)
set_target_properties(flashmask PROPERTIES CUDA_ARCHITECTURES "${flashmask_architectures}")
foreach(target IN ITEMS flashmask flashmask_sm90)
  if(NOT TARGET ${target})
    continue()
  endif()
  if(FLASHMASK_CUDA_RESOURCES)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-v>)
  endif()
  set_target_properties(${target} PROPERTIES
    CUDA_STANDARD 17
    CUDA_STANDARD_REQUIRED ON
    CUDA_VISIBILITY_PRESET hidden
    CUDA_RUNTIME_LIBRARY Static)
endforeach()
