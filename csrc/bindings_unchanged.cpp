#include "bindings_unchanged.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

// Says of dicts whether they were written to, without looking into them: a model has thousands of
// entries. It may say so of a dict in which all is as before.
//
// In CPython 3.12 a dict tells those who watch it; before, each has a number that changes whenever it
// is written to. 3.13 has no such number, and does not tell of attributes that are set; there it is
// always said, and dicts have to be compared.
class DictWatch {
public:
    explicit DictWatch(py::list dicts) : dicts_(std::move(dicts)) {
        for (const py::handle dict : dicts_) {
            if (!PyDict_Check(dict.ptr())) throw py::type_error("not a dict");
            watch(dict.ptr());
        }
        settle();
    }

    // What was written until now does not count any more.
    void settle() { seen_ = state(); }

    bool changed() const { return !watched_ || seen_ != state(); }

private:
#if PY_VERSION_HEX >= 0x030D0000
    using State = int;

    void watch(PyObject*) { watched_ = false; }

    State state() const { return 0; }
#elif PY_VERSION_HEX >= 0x030C0000
    using State = std::uint64_t;

    // Of all dicts that anybody watches. They are watched as long as they live: another watch may be
    // at the same ones.
    static inline std::uint64_t writes_ = 0;

    static int note(PyDict_WatchEvent event, PyObject*, PyObject*, PyObject*) {
        writes_ += event != PyDict_EVENT_DEALLOCATED;  // of somebody else: ours are kept
        return 0;
    }

    void watch(PyObject* dict) {
        static const int watcher = PyDict_AddWatcher(note);
        if (watcher >= 0 && PyDict_Watch(watcher, dict) == 0) return;
        PyErr_Clear();
        watched_ = false;  // there are eight watchers in all, and others have them
    }

    State state() const { return writes_; }
#else
    using State = std::vector<std::uint64_t>;

    void watch(PyObject*) {}

    State state() const {
        State found;
        found.reserve(dicts_.size());
        for (const py::handle dict : dicts_) {
            found.push_back(reinterpret_cast<PyDictObject*>(dict.ptr())->ma_version_tag);
        }
        return found;
    }
#endif

    py::list dicts_;
    bool watched_ = true;
    State seen_{};
};

// Says of tensors whether they were written to, or stand elsewhere: by the number of their writes and
// by their address, which are asked of them one by one, in every step.
class NumberWatch {
public:
    // `versioned`: those that count their writes, `stored`: those that have an address.
    NumberWatch(py::list versioned, py::list stored)
        : versioned_(std::move(versioned)), stored_(std::move(stored)) {
        for (const py::handle one : versioned_) versions_.push_back(version(one.ptr()));
        for (const py::handle one : stored_) addresses_.push_back(address(one.ptr()));
    }

    const std::vector<std::uint64_t>& versions() const { return versions_; }
    const std::vector<std::uint64_t>& addresses() const { return addresses_; }

    bool changed() const {
        for (std::size_t i = 0; i < versions_.size(); ++i) {
            if (version(item(versioned_, i)) != versions_[i]) return true;
        }
        for (std::size_t i = 0; i < addresses_.size(); ++i) {
            if (address(item(stored_, i)) != addresses_[i]) return true;
        }
        return false;
    }

private:
    static PyObject* item(const py::list& list, std::size_t i) {
        return PyList_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i));
    }

    static std::uint64_t version(PyObject* tensor) {
        static PyObject* const name = PyUnicode_InternFromString("_version");
        return number(PyObject_GetAttr(tensor, name));
    }

    static std::uint64_t address(PyObject* tensor) {
        static PyObject* const name = PyUnicode_InternFromString("data_ptr");
        return number(PyObject_CallMethodNoArgs(tensor, name));
    }

    static std::uint64_t number(PyObject* found) {
        if (found == nullptr) throw py::error_already_set();
        const auto value = PyLong_AsUnsignedLongLong(found);
        Py_DECREF(found);
        if (PyErr_Occurred() != nullptr) throw py::error_already_set();
        return value;
    }

    py::list versioned_, stored_;
    std::vector<std::uint64_t> versions_, addresses_;
};

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
    py::class_<DictWatch>(module, "DictWatch")
        .def(py::init<py::list>(), py::arg("dicts"))
        .def("changed", &DictWatch::changed)
        .def("settle", &DictWatch::settle);
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
    py::class_<NumberWatch>(module, "NumberWatch")
        .def(py::init<py::list, py::list>(), py::arg("versioned"), py::arg("stored"))
        .def_property_readonly("versions", &NumberWatch::versions)
        .def_property_readonly("addresses", &NumberWatch::addresses)
        .def("changed", &NumberWatch::changed);
}

}  // namespace w2s
