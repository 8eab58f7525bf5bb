// Inverse roots on a GPU, for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace stepladder {

void bind_matrix_root_gpu(pybind11::module_& m);

}  // namespace stepladder
