// Tensors for results, in memory that is kept.
#pragma once

#include <pybind11/pybind11.h>

namespace stepladder {

void bind_kept_tensor(pybind11::module_& m);

}  // namespace stepladder
