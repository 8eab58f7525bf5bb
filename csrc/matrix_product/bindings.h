#pragma once

#include <pybind11/pybind11.h>

namespace stepladder {

void bind_matrix_product(pybind11::module_& m);

}  // namespace stepladder
