// NumPy arrays and what C++ has of them, both ways.
#pragma once

#include <pybind11/numpy.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "page_manager.h"
#include "row_tree.h"

namespace w2s {

template <typename T>
using Array = pybind11::array_t<T, pybind11::array::c_style>;

template <typename T>
std::span<const T> span(const Array<T>& array) {
    return {array.data(), static_cast<std::size_t>(array.size())};
}

// Taken with noconvert(): floats, or 64-bit integers that might not fit, are a TypeError and not
// silently cut. w2s_fast/cache/pages.py converts what can be converted.
using IntArray = Array<std::int32_t>;

inline PageManager::Ints ints(const IntArray& array) {
    if (array.ndim() != 1) {
        throw PageMisuse("expected a one-dimensional array, got " +
                         std::to_string(array.ndim()) + " dimensions");
    }
    return {array.data(), static_cast<std::size_t>(array.size())};
}

inline std::span<std::byte> bytes(Array<std::uint8_t>& array) {
    return {reinterpret_cast<std::byte*>(array.mutable_data()),
            static_cast<std::size_t>(array.size())};
}

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

template <typename T>
pybind11::array_t<T> to_numpy(const std::vector<T>& values) {
    return pybind11::array_t<T>(static_cast<pybind11::ssize_t>(values.size()), values.data());
}

inline pybind11::array_t<std::int32_t> to_numpy(const std::vector<PageCopy>& copies) {
    static_assert(sizeof(PageCopy) == 2 * sizeof(std::int32_t));
    const auto rows = static_cast<pybind11::ssize_t>(copies.size());
    return pybind11::array_t<std::int32_t>({rows, pybind11::ssize_t{2}},
                                           reinterpret_cast<const std::int32_t*>(copies.data()));
}

inline pybind11::tuple to_numpy(TreeSegments&& segments) {
    return pybind11::make_tuple(
        move_to_numpy(std::move(segments.first)), move_to_numpy(std::move(segments.count)),
        move_to_numpy(std::move(segments.begin)), move_to_numpy(std::move(segments.end)),
        move_to_numpy(std::move(segments.own)));
}

}  // namespace w2s
