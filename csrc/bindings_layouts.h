#pragma once

#include <pybind11/pybind11.h>

namespace w2s {

// Passes, draws and selections (plan.h, draw.h, scoring.h) in the module; behind Beams.
void bind_layouts(pybind11::module_& module);

}  // namespace w2s
