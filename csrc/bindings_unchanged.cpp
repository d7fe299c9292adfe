#include "bindings_unchanged.h"

#include <pybind11/stl.h>

#include <algorithm>
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

// A number that an object tells: what `object.name` is, or what `object.name()` returns.
//
// A model has hundreds of tensors that are asked in every step. So it is looked up once, in the
// object's type, what C code answers, and that is called; where it is none, Python is asked.
class Number {
public:
    // `object` has to live as long.
    Number(PyObject* object, const char* name, bool called)
        : object_(object), name_(PyUnicode_InternFromString(name)), called_(called) {
        if (name_ == nullptr) throw py::error_already_set();
        PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
        const auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(type, name_));
        if (!found) {
            PyErr_Clear();
        } else if (!called && Py_IS_TYPE(found.ptr(), &PyGetSetDescr_Type)) {
            const auto* own = reinterpret_cast<PyGetSetDescrObject*>(found.ptr())->d_getset;
            get_ = own->get;
            closure_ = own->closure;
        } else if (called && Py_IS_TYPE(found.ptr(), &PyMethodDescr_Type)) {
            const auto* own = reinterpret_cast<PyMethodDescrObject*>(found.ptr())->d_method;
            if (own->ml_flags == METH_NOARGS) method_ = own->ml_meth;
        }
        last_ = ask();
    }

    bool changed() const { return ask() != last_; }
    std::uint64_t last() const { return last_; }

private:
    std::uint64_t ask() const {
        PyObject* const found = get_ != nullptr      ? get_(object_, closure_)
                                : method_ != nullptr ? method_(object_, nullptr)
                                : called_            ? PyObject_CallMethodNoArgs(object_, name_)
                                                     : PyObject_GetAttr(object_, name_);
        if (found == nullptr) throw py::error_already_set();
        const auto value = PyLong_AsUnsignedLongLong(found);
        Py_DECREF(found);
        if (PyErr_Occurred() != nullptr) throw py::error_already_set();
        return value;
    }

    PyObject *object_, *name_;  // interned names are kept for good
    bool called_;
    getter get_ = nullptr;  // of types that live as long as the object does
    void* closure_ = nullptr;
    PyCFunction method_ = nullptr;
    std::uint64_t last_ = 0;
};

// Says of tensors whether they were written to, or stand elsewhere: by the number of their writes
// and by their address.
class NumberWatch {
public:
    // `versioned`: those that count their writes, `stored`: those that have an address.
    NumberWatch(py::list versioned, py::list stored)
        : versioned_(std::move(versioned)), stored_(std::move(stored)) {
        for (const auto one : versioned_) versions_.emplace_back(one.ptr(), "_version", false);
        for (const auto one : stored_) addresses_.emplace_back(one.ptr(), "data_ptr", true);
    }

    std::vector<std::uint64_t> versions() const { return last(versions_); }
    std::vector<std::uint64_t> addresses() const { return last(addresses_); }

    bool changed() const {
        const auto has_changed = [](const Number& number) { return number.changed(); };
        return std::ranges::any_of(versions_, has_changed) ||
               std::ranges::any_of(addresses_, has_changed);
    }

private:
    static std::vector<std::uint64_t> last(const std::vector<Number>& numbers) {
        std::vector<std::uint64_t> found;
        for (const Number& number : numbers) found.push_back(number.last());
        return found;
    }

    py::list versioned_, stored_;
    std::vector<Number> versions_, addresses_;
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
