# The GPU's kernels and their hosts, for nvcc and for the emulator alike.
set(GPU_MATRIX_SOURCES ${CMAKE_CURRENT_LIST_DIR}/newton_schulz/gpu_on_chip.cu
                       ${CMAKE_CURRENT_LIST_DIR}/newton_schulz/gpu_cluster.cu
                       ${CMAKE_CURRENT_LIST_DIR}/newton_schulz/gpu_grouped.cu
                       ${CMAKE_CURRENT_LIST_DIR}/matrix_root/gpu_on_chip.cu
                       ${CMAKE_CURRENT_LIST_DIR}/matrix_root/gpu_grouped.cu
                       ${CMAKE_CURRENT_LIST_DIR}/matrix_root/gpu_bases.cu
                       ${CMAKE_CURRENT_LIST_DIR}/matrix_root/gpu_grams.cu
                       ${CMAKE_CURRENT_LIST_DIR}/matrix_root/gpu_multiply.cu)
set(GPU_KERNEL_SOURCES ${CMAKE_CURRENT_LIST_DIR}/multi_tensor/gpu_kernels.cu
                       ${CMAKE_CURRENT_LIST_DIR}/multi_tensor/gpu_norms.cu
                       ${GPU_MATRIX_SOURCES})
set(GPU_HOST_SOURCES ${CMAKE_CURRENT_LIST_DIR}/multi_tensor/gpu_executor.cpp
                     ${CMAKE_CURRENT_LIST_DIR}/multi_tensor/gpu_dispatch.cpp
                     ${CMAKE_CURRENT_LIST_DIR}/newton_schulz/gpu_iteration.cpp
                     ${CMAKE_CURRENT_LIST_DIR}/newton_schulz/gpu_bindings.cpp
                     ${CMAKE_CURRENT_LIST_DIR}/matrix_root/gpu_launcher.cpp
                     ${CMAKE_CURRENT_LIST_DIR}/matrix_root/gpu_iteration.cpp
                     ${CMAKE_CURRENT_LIST_DIR}/matrix_root/gpu_basis_passes.cpp
                     ${CMAKE_CURRENT_LIST_DIR}/matrix_root/gpu_grams.cpp
                     ${CMAKE_CURRENT_LIST_DIR}/matrix_root/gpu_multiply.cpp
                     ${CMAKE_CURRENT_LIST_DIR}/matrix_root/gpu_bindings.cpp)

# Kernels of one pair of storage dtypes: those of the parameter and of the states.
function(add_gpu_pair target param state options)
  set(type_f64 double)
  set(type_f32 float)
  set(type_bf16 bf16)
  set(type_f16 f16)
  set(pair ${param}_${state})
  add_library(gpu_${pair} OBJECT ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/multi_tensor/gpu_kernels.cu)
  target_compile_definitions(gpu_${pair} PRIVATE SL_PARAM=${type_${param}} SL_STATE=${type_${state}} SL_PAIR=${pair})
  target_compile_options(gpu_${pair} PRIVATE ${options})
  target_link_libraries(gpu_${pair} PRIVATE flags)
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:gpu_${pair}>)
endfunction()

function(add_gpu_sources target options)
  foreach(dtype f64 f32 bf16 f16)
    add_gpu_pair(${target} ${dtype} ${dtype} "${options}")
  endforeach()
  foreach(dtype f64 bf16 f16)
    add_gpu_pair(${target} ${dtype} f32 "${options}")
  endforeach()
  add_library(gpu_norms OBJECT ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/multi_tensor/gpu_norms.cu)
  target_compile_options(gpu_norms PRIVATE ${options})
  target_link_libraries(gpu_norms PRIVATE flags)
  add_library(gpu_matrices OBJECT ${GPU_MATRIX_SOURCES})
  target_compile_options(gpu_matrices PRIVATE ${options})
  target_link_libraries(gpu_matrices PRIVATE flags)
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:gpu_norms> $<TARGET_OBJECTS:gpu_matrices> ${GPU_HOST_SOURCES})
endfunction()
