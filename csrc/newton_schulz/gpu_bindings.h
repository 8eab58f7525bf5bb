#pragma once

#include <pybind11/pybind11.h>

namespace stepladder {

void bind_newton_schulz_gpu(pybind11::module_& m);

}  // namespace stepladder
