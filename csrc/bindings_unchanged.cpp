#include "bindings_unchanged.h"

namespace py = pybind11;

namespace {

// As `now == seen` says, where what cannot be compared is not equal. Most of the time each key and
// each value is the very same object in the same order, which takes a hundredth of asking them.
bool same(PyObject* now, PyObject* seen) {
    if (PyDict_GET_SIZE(now) != PyDict_GET_SIZE(seen)) return false;
    Py_ssize_t here = 0, there = 0;
    PyObject *key = nullptr, *value = nullptr, *old_key = nullptr, *old_value = nullptr;
    while (PyDict_Next(now, &here, &key, &value)) {
        if (!PyDict_Next(seen, &there, &old_key, &old_value)) return false;
        if (key == old_key && value == old_value) continue;
        const int equal = PyObject_RichCompareBool(now, seen, Py_EQ);
        if (equal < 0) PyErr_Clear();
        return equal == 1;
    }
    return true;
}

}  // namespace

namespace w2s {

void bind_unchanged(py::module_& module) {
    module.def("same_dicts", [](const py::list& now, const py::list& seen) {
        if (now.size() != seen.size()) return false;
        for (py::size_t i = 0; i < now.size(); ++i) {
            PyObject* const a = PyList_GET_ITEM(now.ptr(), static_cast<Py_ssize_t>(i));
            PyObject* const b = PyList_GET_ITEM(seen.ptr(), static_cast<Py_ssize_t>(i));
            if (!PyDict_Check(a) || !PyDict_Check(b)) throw py::type_error("not a dict");
            if (!same(a, b)) return false;
        }
        return true;
    });
    module.def("same_numbers", [](const py::list& objects, const py::str& name,
                                  const py::list& numbers, bool call) {
        if (objects.size() != numbers.size()) return false;
        for (py::size_t i = 0; i < objects.size(); ++i) {
            PyObject* const one = PyList_GET_ITEM(objects.ptr(), static_cast<Py_ssize_t>(i));
            const py::object value = py::reinterpret_steal<py::object>(
                call ? PyObject_CallMethodNoArgs(one, name.ptr())
                     : PyObject_GetAttr(one, name.ptr()));
            if (!value) throw py::error_already_set();
            PyObject* const known = PyList_GET_ITEM(numbers.ptr(), static_cast<Py_ssize_t>(i));
            const int equal = PyObject_RichCompareBool(value.ptr(), known, Py_EQ);
            if (equal < 0) throw py::error_already_set();
            if (equal == 0) return false;
        }
        return true;
    });
}

}  // namespace w2s
