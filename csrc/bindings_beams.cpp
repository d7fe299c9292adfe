// Beams and rounds for Python.
#include "bindings_beams.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "arrays.h"
#include "rounds.h"

namespace py = pybind11;
using w2s::Array;
using w2s::BeamContents;
using w2s::Beams;
using w2s::Finish;
using w2s::move_to_numpy;
using w2s::Requests;
using w2s::RoundContents;
using w2s::span;
using w2s::to_numpy;

namespace {

const char* name(Finish finish) {
    switch (finish) {
        case Finish::eos: return "eos";
        case Finish::stop: return "stop";
        case Finish::length: return "length";
        default: return nullptr;
    }
}

py::list indices(const std::vector<std::uint8_t>& flags) {
    py::list found;
    for (std::size_t i = 0; i < flags.size(); ++i) {
        if (flags[i]) found.append(i);
    }
    return found;
}

template <typename Flag>
py::list flags(const Requests& requests, Flag flag) {
    py::list found(requests.size());
    for (std::size_t i = 0; i < requests.size(); ++i) found[i] = py::bool_(flag(*requests[i]));
    return found;
}

std::optional<std::int32_t> parent_of(const BeamContents& beam) {
    if (beam.parent < 0) return std::nullopt;
    return beam.parent;
}

// Without a penalty it is no beam search; None for early stopping is "never".
std::optional<w2s::BeamSearch> rule_of(std::optional<double> length_penalty,
                                       std::optional<bool> early_stopping) {
    using w2s::EarlyStopping;
    if (!length_penalty) return std::nullopt;
    if (!early_stopping) return w2s::BeamSearch{*length_penalty, EarlyStopping::never};
    return w2s::BeamSearch{*length_penalty,
                           *early_stopping ? EarlyStopping::yes : EarlyStopping::no};
}

}  // namespace

namespace w2s {

void bind_beams(py::module_& module) {
    py::class_<BeamContents>(module, "Beam")
        .def_property_readonly("parent", &parent_of)
        .def_property_readonly("finish_reason",
                               [](const BeamContents& self) { return name(self.finish); })
        .def_readonly("tokens", &BeamContents::tokens)
        .def_readonly("logprobs", &BeamContents::logprobs)
        .def_readonly("token_scores", &BeamContents::token_scores)
        .def_readonly("total", &BeamContents::total)
        .def_readonly("extra", &BeamContents::extra)
        .def_property_readonly("ending", [](const BeamContents& self) {
                return self.ending < 0 ? std::optional<std::int32_t>() : self.ending;
            })
        .def_readonly("slots", &BeamContents::slots);

    py::class_<RoundContents>(module, "BeamsOfRound")
        .def_readonly("candidates", &RoundContents::candidates)
        .def_readonly("kept", &RoundContents::kept);

    py::class_<Beams>(module, "Beams")
        .def(py::init([](std::vector<std::int32_t> prompt,
                         const std::vector<std::pair<std::int32_t, std::int32_t>>& guide_prompts,
                         std::int32_t first_candidates, std::vector<std::int32_t> widths,
                         std::vector<std::int32_t> successors, std::vector<std::int32_t> chunks,
                         std::int32_t max_new_tokens,
                         bool hold, bool mean, bool dedup, bool uses_guides, bool trace, bool copies,
                         std::vector<std::int32_t> eos_ids, std::vector<std::int32_t> stop_ids,
                         std::int32_t min_new_tokens, float temperature, std::int64_t top_k, double top_p, double min_p,
                         std::int64_t seed, std::vector<float> betas, float plausibility,
                         bool dynamic, std::optional<double> length_penalty,
                         std::optional<bool> early_stopping) {
                 std::vector<w2s::PromptEnd> ends;
                 for (const auto& [length, last] : guide_prompts) ends.push_back({length, last});
                 return std::make_unique<Beams>(
                     w2s::SearchSettings{first_candidates, std::move(widths),
                                         std::move(successors), std::move(chunks), max_new_tokens,
                                         hold, mean, dedup, uses_guides, trace, copies,
                                         std::move(eos_ids), std::move(stop_ids),
                                         min_new_tokens, temperature, top_k, top_p, min_p, seed, std::move(betas),
                                         plausibility, dynamic,
                                         rule_of(length_penalty, early_stopping)},
                     std::move(prompt), ends);
             }),
             py::arg("prompt"), py::arg("guide_prompts"), py::kw_only(),
             py::arg("first_candidates"), py::arg("widths"), py::arg("successors"),
             py::arg("chunks"), py::arg("max_new_tokens"), py::arg("hold"), py::arg("mean"),
             py::arg("dedup"), py::arg("uses_guides"), py::arg("trace"), py::arg("copies"),
             py::arg("eos_ids"),
             py::arg("stop_ids"), py::arg("min_new_tokens"), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"),
             py::arg("min_p"), py::arg("seed"), py::arg("betas"),
             py::arg("plausibility"), py::arg("dynamic"),
             py::arg("length_penalty") = py::none(), py::arg("early_stopping") = py::none())
        .def_property_readonly("round", &Beams::round)
        .def_property_readonly("open", &Beams::open)
        .def_property_readonly("forked", [](const Beams& self) { return self.forked(); })
        .def_property_readonly("aside", &Beams::aside)
        .def_property_readonly("holds", &Beams::holds)
        .def_property_readonly("done", &Beams::done)
        .def_property_readonly("sampled", &Beams::sampled)
        .def_property_readonly("judged", &Beams::judged)
        .def_property_readonly("chosen", &Beams::chosen)
        .def_property_readonly("scored", &Beams::scored)
        .def_property_readonly("shared", &Beams::shared)
        .def_property_readonly("tokens_left", &Beams::tokens_left)
        .def_property_readonly("grown", &Beams::grown)
        .def_property_readonly("blocks", &Beams::blocks)
        .def("agreed", &Beams::agreed)
        .def_property_readonly("kept", [](const Beams& self) {
                std::vector<BeamContents> beams;
                if (self.open() && self.round() == 1) return beams;  // the root is no hypothesis
                for (std::size_t i = 0; i < self.kept().size(); ++i) {
                    beams.push_back(self.contents(true, i));
                }
                return beams;
            })
        .def_property_readonly("candidates", [](const Beams& self) {
                std::vector<BeamContents> beams;
                for (std::size_t i = 0; i < self.candidates().size(); ++i) {
                    beams.push_back(self.contents(false, i));
                }
                return beams;
            })
        .def("new_texts", [](const Beams& self) {
                py::list found;
                for (w2s::NewText& text : self.new_texts()) {
                    found.append(py::make_tuple(text.beam, text.known, std::move(text.tokens)));
                }
                return found;
            })
        .def("end_text", [](Beams& self, std::size_t candidate, std::int32_t length,
                            std::int32_t ending) {
                self.end_text(candidate, length, ending);
            }, py::arg("candidate"), py::arg("length"), py::arg("ending"))
        .def("pause", &Beams::pause, py::arg("candidate"), py::arg("length"))
        .def("take_text", [](Beams& self, std::size_t candidate,
                             const std::vector<std::int64_t>& tokens, std::int64_t sampled,
                             bool ends) {
                self.take_text(candidate, tokens, sampled, ends);
            }, py::arg("candidate"), py::arg("tokens"), py::kw_only(), py::arg("sampled"),
             py::arg("ends"))
        .def("pause_growing", &Beams::pause_growing)
        .def("trace", &Beams::trace, py::arg("first") = 0)
        .def("slot_of_first", [](const Beams& self, int model) {
                if (self.candidates().empty()) throw py::index_error("no round is under way");
                return self.slot(0, model);
            }, py::arg("model"))
        .def("kept_slots", [](const Beams& self, int model) {
                std::vector<std::int32_t> slots;
                for (std::size_t i = 0; i < self.kept().size(); ++i) {
                    if (!self.kept()[i].finished()) slots.push_back(self.kept_slot(i, model));
                }
                return move_to_numpy(std::move(slots));
            }, py::arg("model"))
        .def("set_kept_slots", [](Beams& self, int model, const Array<std::int32_t>& slots) {
                self.set_kept_slots(model, span(slots));
            }, py::arg("model"), py::arg("slots").noconvert())
        .def("set_extras", [](Beams& self, const Array<double>& extras) {
                self.set_extras(span(extras));
            }, py::arg("extras").noconvert())
        .def("resume", &Beams::resume)
        .def("set_aside", &Beams::set_aside, py::arg("managers"))
        .def("start_over", &Beams::start_over, py::arg("managers"))
        .def("abort", &Beams::abort, py::arg("managers"));

    module.attr("SHORTEST_SEGMENT") = w2s::kShortestSegment;
    module.def("cut_levels", [](const std::vector<std::pair<Array<std::int32_t>,
                                                            Array<std::int32_t>>>& levels,
                                std::size_t rows) {
        std::vector<w2s::TreeLevel> given;
        for (const auto& [groups, ends] : levels) given.push_back({span(groups), span(ends)});
        return to_numpy(w2s::cut_levels(given, rows));
    }, py::arg("levels"), py::arg("rows"));
    module.def("begin_rounds", &w2s::begin_rounds, py::arg("requests"));
    module.def("tokens_left", &w2s::tokens_left, py::arg("requests"));
    module.def("entering", [](const Requests& requests, const Beams::Managers& managers) {
        return indices(w2s::entering(requests, managers));
    }, py::arg("requests"), py::arg("managers"));
    module.def("progress", [](const Requests& requests) {
        const auto [sampled, scored] = w2s::progress(requests);
        return py::make_tuple(sampled, scored);
    }, py::arg("requests"));
    module.def("in_rounds", [](const Requests& requests) {
        return flags(requests, [](const Beams& beams) { return beams.open(); });
    }, py::arg("requests"));
    module.def("are_done", [](const Requests& requests) {
        return flags(requests, [](const Beams& beams) { return beams.done(); });
    }, py::arg("requests"));
    module.def("lacking", [](const Requests& requests, const PageManager& manager, int model) {
        return move_to_numpy(w2s::lacking(requests, manager, model)).attr("view")("bool");
    }, py::arg("requests"), py::arg("manager"), py::arg("model"));
    module.def("lay_out_sources", [](const Requests& requests, const PageManager& manager,
                                     int model) {
        w2s::Sources found = w2s::lay_out_sources(requests, manager, model);
        return py::make_tuple(move_to_numpy(std::move(found.slots)),
                              move_to_numpy(std::move(found.counts)),
                              move_to_numpy(std::move(found.children)),
                              move_to_numpy(std::move(found.tokens)),
                              to_numpy(found.levels.tree()));
    }, py::arg("requests"), py::arg("manager"), py::arg("model"));
    module.def("fork_beams", [](const Requests& requests, PageManager& manager, int model) {
        return to_numpy(w2s::fork_beams(requests, manager, model));
    }, py::arg("requests"), py::arg("manager"), py::arg("model"));
    module.def("fork_in_guides", [](const Requests& requests, const Beams::Managers& managers) {
        py::list found;
        for (std::size_t m = 0; m < managers.size(); ++m) {
            found.append(to_numpy(w2s::fork_beams(requests, *managers[m], static_cast<int>(m + 1))));
        }
        return found;
    }, py::arg("requests"), py::arg("managers"));
    module.def("lay_out_rows", [](const Requests& requests, int model) {
        w2s::GrowingRows rows = w2s::lay_out_rows(requests, model);
        return py::make_tuple(
            move_to_numpy(std::move(rows.slots)),
            py::make_tuple(move_to_numpy(std::move(rows.temperature)),
                           move_to_numpy(std::move(rows.top_k)),
                           move_to_numpy(std::move(rows.top_p)),
                           move_to_numpy(std::move(rows.min_p)),
                           move_to_numpy(std::move(rows.seed)),
                           move_to_numpy(std::move(rows.candidate)),
                           move_to_numpy(std::move(rows.position))),
            to_numpy(rows.levels.tree()),
            py::make_tuple(move_to_numpy(std::move(rows.betas)),
                           move_to_numpy(std::move(rows.plausibility)),
                           move_to_numpy(std::move(rows.dynamic)).attr("view")("bool")));
    }, py::arg("requests"), py::arg("model"));
    module.def("release_finished", &w2s::release_finished, py::arg("requests"),
               py::arg("manager"), py::arg("model"));
    module.def("end_rounds", [](const Requests& requests, const Array<std::int64_t>& kept,
                                const Beams::Managers& managers) {
        py::list found;
        for (const auto& copies : w2s::end_rounds(requests, span(kept), managers)) {
            found.append(to_numpy(copies));
        }
        return found;
    }, py::arg("requests"), py::arg("kept").noconvert(), py::arg("managers"));
    module.def("keep_all", &w2s::keep_all, py::arg("requests"), py::arg("managers"));
    module.def("round_rows", &w2s::round_rows, py::arg("requests"));
    module.def("growing", &w2s::growing, py::arg("requests"));
    module.def("round_pages", [](const Requests& requests,
                                 const std::vector<std::int64_t>& page_sizes) {
        std::vector<std::vector<std::int64_t>> found;
        for (const Beams* request : requests) {
            found.push_back(w2s::round_pages(*request, page_sizes));
        }
        return found;
    }, py::arg("requests"), py::arg("page_sizes"));
    module.def("held_slots", [](const Requests& requests, int model) {
        return move_to_numpy(w2s::held_slots(requests, model));
    }, py::arg("requests"), py::arg("model"));
}

}  // namespace w2s
