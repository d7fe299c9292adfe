// NumPy arrays of what C++ has computed.
#pragma once

#include <pybind11/numpy.h>

#include <memory>
#include <utility>
#include <vector>

namespace w2s {

// The vector's own memory, which the array keeps alive: [n], or of a given shape.
template <typename T>
pybind11::array_t<T> move_to_numpy(std::vector<T>&& values,
                                   std::vector<pybind11::ssize_t> shape = {}) {
    if (shape.empty()) shape = {static_cast<pybind11::ssize_t>(values.size())};
    auto owned = std::make_unique<std::vector<T>>(std::move(values));
    const T* const data = owned->data();
    const pybind11::capsule owner(owned.release(), [](void* vector) {
        delete static_cast<std::vector<T>*>(vector);
    });
    return pybind11::array_t<T>(shape, data, owner);
}

}  // namespace w2s
