#pragma once

#include <pybind11/pybind11.h>

namespace w2s {

// Beams and rounds (beams.h, rounds.h) in the module; behind PageManager.
void bind_beams(pybind11::module_& module);

}  // namespace w2s
