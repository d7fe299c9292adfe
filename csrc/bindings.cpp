// w2s_fast._pages: PageManager for Python. int32 numpy arrays go in and come out; columns such as
// lengths are read-only views of the manager's own memory. The errors are the classes of
// w2s_fast.errors. And Hold, for the locks of those who use it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "arrays.h"
#include "bindings_beams.h"
#include "bindings_layouts.h"
#include "bindings_unchanged.h"
#include "hold.h"
#include "page_manager.h"

namespace py = pybind11;
using w2s::IntArray;
using w2s::ints;
using w2s::PageManager;
using w2s::to_numpy;

namespace {

// A view that keeps its manager alive.
py::array view(const py::object& manager, const std::int32_t* data, py::ssize_t size,
               py::ssize_t stride = 1) {
    const auto item = static_cast<py::ssize_t>(sizeof(std::int32_t));
    py::array_t<std::int32_t> array({size}, {stride * item}, data, manager);
    array.attr("setflags")(py::arg("write") = false);
    return array;
}

// Never released: a translator may run until the interpreter is gone.
PyObject* out_of_pages = nullptr;
PyObject* page_misuse = nullptr;

}  // namespace

PYBIND11_MODULE(_pages, module) {
    module.doc() = "The paged KV-cache manager (csrc/page_manager.h).";

    const py::module_ errors = py::module_::import("w2s_fast.errors");
    out_of_pages = errors.attr("OutOfPages").cast<py::object>().release().ptr();
    page_misuse = errors.attr("PageMisuse").cast<py::object>().release().ptr();
    py::register_local_exception_translator([](std::exception_ptr thrown) {
        try {
            std::rethrow_exception(thrown);
        } catch (const w2s::OutOfPages& error) {
            PyErr_SetString(out_of_pages, error.what());
        } catch (const w2s::PageMisuse& error) {
            PyErr_SetString(page_misuse, error.what());
        }
    });

    using w2s::CacheStatistics;
    py::class_<CacheStatistics>(module, "CacheStatistics")
        .def_readonly("lookups", &CacheStatistics::lookups)
        .def_readonly("lookup_tokens", &CacheStatistics::lookup_tokens)
        .def_readonly("hit_tokens", &CacheStatistics::hit_tokens)
        .def_readonly("evictions", &CacheStatistics::evictions);

    using w2s::Hold;
    py::class_<Hold>(module, "Hold")
        .def(py::init<py::object, py::object, bool, py::object, py::object, py::object>(),
             py::arg("lock"), py::kw_only(), py::arg("queue") = py::none(),
             py::arg("wait") = true, py::arg("begin") = py::none(),
             py::arg("end") = py::none(), py::arg("after") = py::none())
        .def("__enter__", &Hold::enter)
        .def("__exit__", [](Hold& self, const py::object&, const py::object& error,
                            const py::object&) { self.exit(error); });

    py::class_<PageManager>(module, "PageManager")
        .def(py::init<std::int64_t, std::int64_t, std::int64_t, std::int64_t, bool, int>(),
             py::arg("num_pages"), py::arg("page_size"), py::arg("max_slots"),
             py::arg("max_pages_per_slot"), py::arg("prefix_cache") = false,
             py::arg("hash_bits") = 64)
        .def("allocate", [](PageManager& self, std::int64_t n) {
                return to_numpy(self.allocate(n));
            }, py::arg("n"))
        .def("reserve", [](PageManager& self, const IntArray& slots, const IntArray& tokens) {
                return to_numpy(self.reserve(ints(slots), ints(tokens)));
            }, py::arg("slots").noconvert(), py::arg("tokens").noconvert())
        .def("pages_needed", [](const PageManager& self, const IntArray& slots,
                                const IntArray& tokens) {
                return self.pages_needed(ints(slots), ints(tokens));
            }, py::arg("slots").noconvert(), py::arg("tokens").noconvert())
        .def("places", [](const PageManager& self, const IntArray& slots,
                                const IntArray& tokens) {
                return to_numpy(self.places(ints(slots), ints(tokens)));
            }, py::arg("slots").noconvert(), py::arg("tokens").noconvert())
        .def("extend", [](PageManager& self, const IntArray& slots, const IntArray& tokens) {
                self.extend(ints(slots), ints(tokens));
            }, py::arg("slots").noconvert(), py::arg("tokens").noconvert())
        .def("fork", [](PageManager& self, const IntArray& slots, const IntArray& counts) {
                const w2s::ForkResult result = self.fork(ints(slots), ints(counts));
                return py::make_tuple(to_numpy(result.children), to_numpy(result.copies));
            }, py::arg("slots").noconvert(), py::arg("counts").noconvert())
        .def("truncate", [](PageManager& self, const IntArray& slots, const IntArray& lengths) {
                self.truncate(ints(slots), ints(lengths));
            }, py::arg("slots").noconvert(), py::arg("lengths").noconvert())
        .def("trim", [](PageManager& self, const IntArray& slots) { self.trim(ints(slots)); },
             py::arg("slots").noconvert())
        .def("release", [](PageManager& self, const IntArray& slots) {
                self.release(ints(slots));
            }, py::arg("slots").noconvert())
        .def("page_table", [](const PageManager& self, const IntArray& slots) {
                std::vector<std::int32_t> table = self.page_table(ints(slots));
                const auto rows = static_cast<py::ssize_t>(slots.size());
                const auto width = rows == 0 ? 0 : static_cast<py::ssize_t>(table.size()) / rows;
                return w2s::move_to_numpy(std::move(table), {rows, width});
            }, py::arg("slots").noconvert())
        .def("match", [](const PageManager& self, const IntArray& tokens, const IntArray& counts) {
                return to_numpy(self.match(ints(tokens), ints(counts)));
            }, py::arg("tokens").noconvert(), py::arg("counts").noconvert())
        .def("adopt", [](PageManager& self, const IntArray& slots, const IntArray& tokens,
                         const IntArray& counts) {
                return to_numpy(self.adopt(ints(slots), ints(tokens), ints(counts)));
            }, py::arg("slots").noconvert(), py::arg("tokens").noconvert(),
            py::arg("counts").noconvert())
        .def("remember", [](PageManager& self, const IntArray& slots, const IntArray& tokens,
                            const IntArray& counts) {
                return self.remember(ints(slots), ints(tokens), ints(counts));
            }, py::arg("slots").noconvert(), py::arg("tokens").noconvert(),
            py::arg("counts").noconvert())
        .def("drop_cache", &PageManager::drop_cache)
        .def("check", &PageManager::check)
        .def_property_readonly("prefix_cache", &PageManager::prefix_cache)
        .def_property_readonly("cached_pages", &PageManager::cached_pages)
        .def_property_readonly("cache_statistics", &PageManager::cache_statistics)
        .def_property_readonly("num_pages", &PageManager::num_pages)
        .def_property_readonly("page_size", &PageManager::page_size)
        .def_property_readonly("max_slots", &PageManager::max_slots)
        .def_property_readonly("max_pages_per_slot", &PageManager::max_pages_per_slot)
        .def_property_readonly("free_pages", &PageManager::free_pages)
        .def_property_readonly("used_pages", &PageManager::used_pages)
        .def_property_readonly("free_slots", &PageManager::free_slots)
        .def_property_readonly("lengths", [](const py::object& self) {
                const auto& manager = self.cast<const PageManager&>();
                return view(self, manager.lengths(), manager.max_slots());
            })
        .def_property_readonly("held_pages", [](const py::object& self) {
                const auto& manager = self.cast<const PageManager&>();
                return view(self, manager.held(), manager.max_slots());
            })
        .def_property_readonly("last_pages", [](const py::object& self) {
                const auto& manager = self.cast<const PageManager&>();
                return view(self, manager.last(), manager.max_slots());
            })
        .def_property_readonly("pages_before", [](const py::object& self) {
                const auto& manager = self.cast<const PageManager&>();
                return view(self, manager.before(), manager.num_pages(), PageManager::kPageStride);
            })
        .def_property_readonly("holders", [](const py::object& self) {
                const auto& manager = self.cast<const PageManager&>();
                return view(self, manager.holders(), manager.num_pages(), PageManager::kPageStride);
            });

    w2s::bind_beams(module);
    w2s::bind_layouts(module);
    w2s::bind_unchanged(module);
}
