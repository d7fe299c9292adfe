// Whether Python objects still hold what they held.
#pragma once

#include <pybind11/pybind11.h>

namespace w2s {

// Adds the function to the module.
void bind_unchanged(pybind11::module_& module);

}  // namespace w2s
