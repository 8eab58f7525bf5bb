# The CPU's matrix kernels, once for each unit that multiplies bf16, where the compiler knows these.
set(MATRIX_SOURCES ${CMAKE_CURRENT_LIST_DIR}/newton_schulz/cpu_bindings.cpp
                   ${CMAKE_CURRENT_LIST_DIR}/newton_schulz/cpu_dispatch.cpp
                   ${CMAKE_CURRENT_LIST_DIR}/newton_schulz/cpu_iteration.cpp
                   ${CMAKE_CURRENT_LIST_DIR}/newton_schulz/program.cpp)
set(PRODUCT_SOURCES ${CMAKE_CURRENT_LIST_DIR}/common/amx.cpp ${CMAKE_CURRENT_LIST_DIR}/common/buffer.cpp
                    ${CMAKE_CURRENT_LIST_DIR}/common/buffer_pool.cpp ${CMAKE_CURRENT_LIST_DIR}/matrix_product/bindings.cpp
                    ${CMAKE_CURRENT_LIST_DIR}/matrix_product/product.cpp)
include(CheckCXXCompilerFlag)

function(add_matrix_unit target unit)
  add_library(matrix_${unit} OBJECT ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/newton_schulz/cpu_kernels.cpp)
  target_compile_definitions(matrix_${unit} PRIVATE SL_UNIT=${unit})
  target_compile_options(matrix_${unit} PRIVATE -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mfma -mf16c
                         -mprefer-vector-width=512 $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized> $<$<CXX_COMPILER_ID:GNU>:-Wno-uninitialized> ${ARGN})
  target_link_libraries(matrix_${unit} PRIVATE flags)
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:matrix_${unit}>)
endfunction()

# Products of fp32 matrices.
function(add_product_unit target unit)
  add_library(product_${unit} OBJECT ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/matrix_product/${unit}_product.cpp)
  target_compile_options(product_${unit} PRIVATE -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma
                         -mprefer-vector-width=512 $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>
                         $<$<CXX_COMPILER_ID:GNU>:-Wno-uninitialized> ${ARGN})
  target_link_libraries(product_${unit} PRIVATE flags)
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:product_${unit}>)
endfunction()

function(add_matrix_units target)
  target_sources(${target} PRIVATE ${MATRIX_SOURCES} ${PRODUCT_SOURCES})
  if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
    return()
  endif()
  target_compile_definitions(${target} PRIVATE SL_MATRIX_PRODUCT)
  add_product_unit(${target} avx512)
  check_cxx_compiler_flag("-mavx512bf16 -mamx-tile -mamx-bf16" HAS_MATRIX_UNITS)
  if(HAS_MATRIX_UNITS)
    target_compile_definitions(${target} PRIVATE SL_MATRIX_UNITS)
    add_matrix_unit(${target} avx512_bf16)
    add_matrix_unit(${target} amx -mamx-tile -mamx-bf16)
    target_compile_definitions(matrix_amx PRIVATE SL_AMX)
    add_product_unit(${target} amx -mamx-tile -mamx-bf16)
  endif()
endfunction()
