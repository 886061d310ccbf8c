# CUDA half of the core, included by CMakeLists.txt when FLASHMASK_CUDA is on. Any toolkit from 11.8 on.
#
# Narrow a build with cmake options or environment variables of the same name (semicolon- or comma-separated lists):
#   FLASHMASK_CUDA_ARCHS   80;90 by default: machine code for Ampere, Ada (which runs sm_80's) and Hopper, and PTX of
#                          the last for anything newer
#   FLASHMASK_HEAD_DIMS    32;64;96;128;192;256 by default; other head dims are padded to the next one built
#   FLASHMASK_CUDA_DTYPES  bf16;fp16 by default
# -DFLASHMASK_CUDA_RESOURCES=ON prints registers, spills and shared memory of every kernel.
enable_language(CUDA)
option(FLASHMASK_CUDA_RESOURCES "Print the resource use of the CUDA kernels" OFF)

function(flashmask_list_option name default description)
  set(value "${default}")
  if(DEFINED ENV{${name}} AND NOT "$ENV{${name}}" STREQUAL "")
    string(REPLACE "," ";" value "$ENV{${name}}")
  endif()
  set(${name} "${value}" CACHE STRING "${description}")
  string(REPLACE "," ";" value "${${name}}")
  set(${name} "${value}" PARENT_SCOPE)
endfunction()

flashmask_list_option(FLASHMASK_CUDA_ARCHS "80;90" "CUDA architectures")
flashmask_list_option(FLASHMASK_HEAD_DIMS "32;64;96;128;192;256" "Head dims to build CUDA kernels for")
flashmask_list_option(FLASHMASK_CUDA_DTYPES "bf16;fp16" "Storage types to build CUDA kernels for")

set(flashmask_architectures)
foreach(arch IN LISTS FLASHMASK_CUDA_ARCHS)
  list(APPEND flashmask_architectures ${arch}-real)
endforeach()
list(GET FLASHMASK_CUDA_ARCHS -1 newest)
list(APPEND flashmask_architectures ${newest}-virtual)

# One small translation unit per head dim x dtype x direction, so that builds run in parallel.
set(flashmask_generated ${CMAKE_CURRENT_BINARY_DIR}/cuda_instances)
set(flashmask_table "")
set(flashmask_instances)
list(SORT FLASHMASK_HEAD_DIMS COMPARE NATURAL)
foreach(HEAD_DIM IN LISTS FLASHMASK_HEAD_DIMS)
  if(NOT HEAD_DIM MATCHES "^(32|64|96|128|192|256)$")
    message(FATAL_ERROR "FLASHMASK_HEAD_DIMS: expected some of 32;64;96;128;192;256, got '${HEAD_DIM}'")
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
    string(APPEND flashmask_table "FLASHMASK_SM80_KERNELS(${enumerator}, ${TYPE}, ${HEAD_DIM})\n")
    foreach(DIRECTION IN ITEMS forward backward)
      set(source ${flashmask_generated}/sm80_${DIRECTION}_${HEAD_DIM}_${dtype}.cu)
      configure_file(${CMAKE_CURRENT_SOURCE_DIR}/flashmask/sm80/instance.cu.in ${source} @ONLY)
      list(APPEND flashmask_instances ${source})
    endforeach()
  endforeach()
endforeach()
file(CONFIGURE OUTPUT ${flashmask_generated}/built_kernels.inc CONTENT "${flashmask_table}" @ONLY)

target_sources(flashmask PRIVATE
  ${CMAKE_CURRENT_SOURCE_DIR}/flashmask/cuda/cuda_backend.cu
  ${CMAKE_CURRENT_SOURCE_DIR}/flashmask/cuda/kernel_table.cu
  ${CMAKE_CURRENT_SOURCE_DIR}/flashmask/cuda/tile_lists.cu
  ${flashmask_instances})
target_include_directories(flashmask PRIVATE ${flashmask_generated})
target_compile_definitions(flashmask PRIVATE FLASHMASK_WITH_CUDA)
if(FLASHMASK_CUDA_RESOURCES)
  target_compile_options(flashmask PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-v>)
endif()
set_target_properties(flashmask PROPERTIES
  CUDA_ARCHITECTURES "${flashmask_architectures}"
  CUDA_STANDARD 17
  CUDA_STANDARD_REQUIRED ON
  CUDA_VISIBILITY_PRESET hidden
  CUDA_RUNTIME_LIBRARY Static)
