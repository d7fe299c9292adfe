// Beams and rounds for Python: NumPy arrays come out, laid out for passes and operators.
#include "bindings_beams.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "arrays.h"
#include "draw.h"
#include "rounds.h"
#include "scoring.h"

namespace py = pybind11;
using w2s::BeamContents;
using w2s::Beams;
using w2s::Finish;
using w2s::move_to_numpy;
using w2s::Requests;
using w2s::RoundContents;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
std::span<const T> span(const Array<T>& array) {
    return {array.data(), static_cast<std::size_t>(array.size())};
}

const char* name(Finish finish) {
    switch (finish) {
        case Finish::eos: return "eos";
        case Finish::stop: return "stop";
        case Finish::length: return "length";
        default: return nullptr;
    }
}

py::tuple tree(w2s::TreeSegments&& segments) {
    return py::make_tuple(
        move_to_numpy(std::move(segments.first)), move_to_numpy(std::move(segments.count)),
        move_to_numpy(std::move(segments.begin)), move_to_numpy(std::move(segments.end)),
        move_to_numpy(std::move(segments.own)));
}

py::list broken(const std::vector<w2s::BrokenNumber>& numbers) {
    py::list found;
    for (const auto& [request, token, position] : numbers) {
        found.append(py::make_tuple(request, token, position));
    }
    return found;
}

py::array_t<std::int32_t> copies(const std::vector<w2s::PageCopy>& pages) {
    std::vector<std::int32_t> flat;
    flat.reserve(2 * pages.size());
    for (const auto [source, destination] : pages) {
        flat.push_back(source);
        flat.push_back(destination);
    }
    const auto rows = static_cast<py::ssize_t>(pages.size());
    return move_to_numpy(std::move(flat), {rows, 2});
}

template <typename T>
constexpr const char* dtype_of() {
    if constexpr (std::is_same_v<T, double>) return "float64";
    if constexpr (std::is_same_v<T, float>) return "float32";
    if constexpr (std::is_same_v<T, std::int64_t>) return "int64";
    if constexpr (std::is_same_v<T, std::int32_t>) return "int32";
    return "bool";
}

std::span<std::byte> bytes(Array<std::uint8_t>& buffer) {
    return std::as_writable_bytes(std::span(buffer.mutable_data(),
                                            static_cast<std::size_t>(buffer.size())));
}

py::tuple bounds(const w2s::PassLayout& pass) {
    const w2s::PassShape& shape = pass.shape();
    return py::make_tuple(shape.rows, shape.tokens, shape.splits, shape.pages, pass.max_q(),
                          pass.max_k(), pass.max_own(), pass.max_tokens(), pass.max_parts());
}

// A Scoring for Python. Without a recording, models run it themselves, and its columns travel in a
// buffer as long as they are.
class ScoringLayout {
public:
    ScoringLayout(const Requests& requests, const Requests& drawing, std::int64_t steps,
                  std::vector<double> weights)
        : scoring_(w2s::lay_out_scoring(requests, drawing, steps, std::move(weights))) {}

    const w2s::Scoring& scoring() const { return scoring_; }

    // Of each model its slots, what they share, and how many tokens each holds.
    py::list rows() const {
        py::list found;
        for (std::size_t m = 0; m < scoring_.slots.size(); ++m) {
            const w2s::RowLevels& levels = scoring_.levels[m];
            found.append(py::make_tuple(copied(scoring_.slots[m]), tree(levels.tree()),
                                        copied(levels.inherited)));
        }
        return found;
    }

    // (name, dtype, items) of each column.
    py::list columns() const {
        py::list found;
        scoring_.columns([&](const std::string& name, const auto& values, auto spare, bool) {
            found.append(py::make_tuple(name, dtype_of<decltype(spare)>(), values.size()));
        });
        return found;
    }

    py::tuple sizes() const {
        return py::make_tuple(scoring_.width.size(), scoring_.previous.size(),
                              scoring_.targets.size(), scoring_.stops.size(),
                              scoring_.tokens.size(), scoring_.max_candidates,
                              scoring_.max_width);
    }

    // Room for the guides' new tokens, which count from now on; pages to be copied, of each model.
    py::list begin(const Beams::Managers& managers, std::int64_t split_keys,
                   std::int64_t split_queries) {
        passes_.emplace(scoring_, managers, split_keys, split_queries);
        py::list found;
        for (const auto& own : passes_->copies()) found.append(copies(own));
        return found;
    }

    py::list bounds_of_passes() const {
        py::list found;
        for (const w2s::PassLayout& pass : passes_.value().passes()) found.append(bounds(pass));
        return found;
    }

    void write(Array<std::uint8_t> buffer, const Array<std::int64_t>& offsets,
               const Array<std::int64_t>& items, std::int64_t room,
               const std::vector<const w2s::PassRoom*>& rooms) const {
        w2s::write_columns(scoring_, bytes(buffer), span(offsets), span(items), room);
        for (std::size_t m = 0; m < rooms.size(); ++m) {
            passes_.value().passes().at(m).write(bytes(buffer), rooms[m]->offsets, rooms[m]->shape,
                                                 false);
        }
    }

private:
    template <typename T>
    static py::array_t<T> copied(const std::vector<T>& values) {
        return move_to_numpy(std::vector<T>(values));
    }

    w2s::Scoring scoring_;
    std::optional<w2s::ScoringPasses> passes_;
};

// What score_select answers (kernels/score_select.py), with room for so many candidates, tokens, and
// kept in all.
struct SelectionWords {
    std::span<const double> scores;        // [candidates]
    std::span<const std::int64_t> broken;  // [candidates]
    std::span<const std::int64_t> tokens;  // [tokens]
    std::span<const double> logprobs, token_scores;

    SelectionWords(const Array<std::int64_t>& packed, std::int64_t kept, std::int64_t candidates,
                   std::int64_t count) {
        const std::span<const std::int64_t> words = span(packed);
        if (kept < 0 || candidates < 0 || count < 0 ||
            std::ssize(words) != 2 * kept + 4 * candidates + 3 * count) {
            throw py::value_error("a selection has other words");
        }
        const auto part = [&](std::int64_t begin, std::int64_t size) {
            return words.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(size));
        };
        const auto floats = [&](std::int64_t begin, std::int64_t size) {
            const auto own = part(begin, size);
            return std::span(reinterpret_cast<const double*>(own.data()), own.size());
        };
        const std::int64_t columns = 2 * kept, rows = columns + 4 * candidates;
        scores = floats(columns, candidates);
        broken = part(columns + 2 * candidates, candidates);
        tokens = part(rows, count);
        logprobs = floats(rows + count, count);
        token_scores = floats(rows + 2 * count, count);
    }
};

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
        .def_readonly("slots", &BeamContents::slots);

    py::class_<RoundContents>(module, "BeamsOfRound")
        .def_readonly("candidates", &RoundContents::candidates)
        .def_readonly("kept", &RoundContents::kept);

    py::class_<Beams>(module, "Beams")
        .def(py::init([](std::vector<std::int32_t> prompt,
                         const std::vector<std::pair<std::int32_t, std::int32_t>>& guide_prompts,
                         std::int32_t first_candidates, std::int32_t width,
                         std::int32_t successors, std::int32_t chunk, std::int32_t max_new_tokens,
                         bool hold, bool mean, bool dedup, bool uses_guides, bool trace,
                         std::vector<std::int32_t> eos_ids, std::vector<std::int32_t> stop_ids,
                         float temperature, std::int64_t top_k, double top_p, double min_p,
                         std::int64_t seed) {
                 std::vector<w2s::PromptEnd> ends;
                 for (const auto& [length, last] : guide_prompts) ends.push_back({length, last});
                 return std::make_unique<Beams>(
                     w2s::SearchSettings{first_candidates, width, successors, chunk,
                                         max_new_tokens, hold, mean, dedup, uses_guides, trace,
                                         std::move(eos_ids), std::move(stop_ids), temperature,
                                         top_k, top_p, min_p, seed},
                     std::move(prompt), ends);
             }),
             py::arg("prompt"), py::arg("guide_prompts"), py::kw_only(),
             py::arg("first_candidates"), py::arg("width"), py::arg("successors"),
             py::arg("chunk"), py::arg("max_new_tokens"), py::arg("hold"), py::arg("mean"),
             py::arg("dedup"), py::arg("uses_guides"), py::arg("trace"), py::arg("eos_ids"),
             py::arg("stop_ids"), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"),
             py::arg("min_p"), py::arg("seed"))
        .def_property_readonly("round", &Beams::round)
        .def_property_readonly("open", &Beams::open)
        .def_property_readonly("forked", &Beams::forked)
        .def_property_readonly("aside", &Beams::aside)
        .def_property_readonly("holds", &Beams::holds)
        .def_property_readonly("done", &Beams::done)
        .def_property_readonly("sampled", &Beams::sampled)
        .def_property_readonly("scored", &Beams::scored)
        .def_property_readonly("shared", &Beams::shared)
        .def_property_readonly("tokens_left", &Beams::tokens_left)
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
        .def("trace", &Beams::trace)
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
        return tree(w2s::cut_levels(given, rows));
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
    module.def("lay_out_sources", [](const Requests& requests, const PageManager& base) {
        w2s::Sources found = w2s::lay_out_sources(requests, base);
        return py::make_tuple(move_to_numpy(std::move(found.slots)),
                              move_to_numpy(std::move(found.counts)),
                              move_to_numpy(std::move(found.children)),
                              move_to_numpy(std::move(found.tokens)),
                              tree(found.levels.tree()));
    }, py::arg("requests"), py::arg("base"));
    module.def("fork_beams", [](const Requests& requests, PageManager& manager, int model) {
        return copies(w2s::fork_beams(requests, manager, model));
    }, py::arg("requests"), py::arg("manager"), py::arg("model"));
    module.def("lay_out_rows", [](const Requests& requests) {
        w2s::GrowingRows rows = w2s::lay_out_rows(requests);
        return py::make_tuple(
            move_to_numpy(std::move(rows.slots)),
            py::make_tuple(move_to_numpy(std::move(rows.temperature)),
                           move_to_numpy(std::move(rows.top_k)),
                           move_to_numpy(std::move(rows.top_p)),
                           move_to_numpy(std::move(rows.min_p)),
                           move_to_numpy(std::move(rows.seed)),
                           move_to_numpy(std::move(rows.candidate)),
                           move_to_numpy(std::move(rows.position))),
            tree(rows.levels.tree()));
    }, py::arg("requests"));
    // `memory`: of Draws (w2s_fast/decoding/draws.py), [steps, bytes of a step]; tokens begin a step,
    // and log-probs come `logprobs` bytes later.
    module.def("take_tokens", [](const Requests& requests, const Array<std::uint8_t>& memory,
                                 std::int64_t rows, std::int64_t logprobs) {
        if (memory.ndim() != 2 || rows < 0 || logprobs < 8 * rows ||
            logprobs + 4 * rows > memory.shape(1) || logprobs % 4 != 0 ||
            memory.shape(1) % 8 != 0) {
            throw py::value_error("draws have other bytes");
        }
        const py::ssize_t steps = memory.shape(0);
        std::vector<std::int64_t> tokens(static_cast<std::size_t>(rows * steps));
        std::vector<float> found(tokens.size());
        for (py::ssize_t step = 0; step < steps; ++step) {
            const std::uint8_t* const begin = memory.data() + step * memory.shape(1);
            const auto* token = reinterpret_cast<const std::int64_t*>(begin);
            const auto* logprob = reinterpret_cast<const float*>(begin + logprobs);
            for (std::int64_t row = 0; row < rows; ++row) {
                tokens[static_cast<std::size_t>(row * steps + step)] = token[row];
                found[static_cast<std::size_t>(row * steps + step)] = logprob[row];
            }
        }
        return broken(w2s::take_tokens(requests, tokens, found, steps));
    }, py::arg("requests"), py::arg("memory").noconvert(), py::arg("rows"), py::arg("logprobs"));
    module.def("release_finished", &w2s::release_finished, py::arg("requests"),
               py::arg("manager"), py::arg("model"));
    py::class_<w2s::PassRoom>(module, "PassRoom")
        .def(py::init([](const Array<std::int64_t>& offsets, std::int64_t rows,
                         std::int64_t tokens, std::int64_t splits, std::int64_t pages) {
                 return w2s::PassRoom{{offsets.data(), offsets.data() + offsets.size()},
                                      {rows, tokens, splits, pages}};
             }), py::arg("offsets").noconvert(), py::arg("rows"), py::arg("tokens"),
             py::arg("splits"), py::arg("pages"));
    using w2s::DrawLayout;
    py::class_<DrawLayout>(module, "DrawLayout")
        .def(py::init<Requests, PageManager&>(), py::keep_alive<1, 3>(), py::arg("requests"),
             py::arg("base"))
        .def_property_readonly("rows", &DrawLayout::rows)
        .def_property_readonly("tokens", &DrawLayout::tokens)
        .def_property_readonly("max_new", &DrawLayout::max_new)
        .def_property_readonly("num_sources", [](const DrawLayout& self) {
            return self.sources().slots.size();
        })
        .def("begin", &DrawLayout::begin, py::arg("steps"), py::arg("split_keys"),
             py::arg("split_queries"))
        .def_property_readonly("bounds", [](const DrawLayout& self) {
            return py::make_tuple(bounds(self.source_pass()), bounds(self.row_pass()));
        })
        .def_property_readonly("before", [](const DrawLayout& self) {
            return copies(self.before());
        })
        .def_property_readonly("num_before", [](const DrawLayout& self) {
            return self.before().size();
        })
        .def_property_readonly("num_copies", [](const DrawLayout& self) {
            return self.copies().size();
        })
        .def("write_rows", [](const DrawLayout& self, Array<std::uint8_t> buffer,
                              const w2s::PassRoom& room, const Array<std::int64_t>& columns) {
            self.write_rows(bytes(buffer), room, span(columns));
        }, py::arg("buffer").noconvert(), py::arg("room"), py::arg("columns").noconvert())
        .def("write_sources", [](const DrawLayout& self, Array<std::uint8_t> buffer,
                                 const w2s::PassRoom& room, const Array<std::int64_t>& columns,
                                 std::int64_t rows) {
            self.write_sources(bytes(buffer), room, span(columns), rows);
        }, py::arg("buffer").noconvert(), py::arg("room"), py::arg("columns").noconvert(),
           py::arg("rows"));
    py::class_<ScoringLayout>(module, "ScoringLayout")
        .def(py::init<const Requests&, const Requests&, std::int64_t, std::vector<double>>(),
             py::arg("requests"), py::arg("drawing"), py::arg("steps"), py::arg("weights"))
        .def_property_readonly("counts", [](const ScoringLayout& self) {
            return move_to_numpy(std::vector(self.scoring().counts));
        })
        .def_property_readonly("cu_tokens", [](const ScoringLayout& self) {
            return move_to_numpy(std::vector(self.scoring().cu_tokens));
        })
        .def_property_readonly("num_rows", [](const ScoringLayout& self) {
            return self.scoring().counts.size();
        })
        .def_property_readonly("max_new", [](const ScoringLayout& self) {
            const auto& counts = self.scoring().counts;
            return counts.empty() ? 0 : *std::ranges::max_element(counts);
        })
        .def_property_readonly("rows", &ScoringLayout::rows)
        .def_property_readonly("columns", &ScoringLayout::columns)
        .def_property_readonly("sizes", &ScoringLayout::sizes)
        .def("begin", &ScoringLayout::begin, py::keep_alive<1, 2>(), py::arg("managers"), py::arg("split_keys"),
             py::arg("split_queries"))
        .def_property_readonly("bounds", &ScoringLayout::bounds_of_passes)
        .def_property_readonly("num_drawn", [](const ScoringLayout& self) {
            return self.scoring().rows;
        })
        .def("write", &ScoringLayout::write, py::arg("buffer").noconvert(),
             py::arg("offsets").noconvert(), py::arg("items").noconvert(), py::arg("room"),
             py::arg("rooms"));
    // `packed`, and for what it has room: of SelectionWords.
    module.def("take_selected", [](const Requests& requests, const Requests& drawing,
                                   const Array<std::int64_t>& cu_tokens,
                                   const Array<std::int64_t>& packed, std::int64_t kept,
                                   std::int64_t candidates, std::int64_t tokens,
                                   std::int64_t steps) {
        const SelectionWords words(packed, kept, candidates, tokens);
        return broken(w2s::take_selected(requests, drawing, span(cu_tokens), words.tokens,
                                         words.logprobs, steps));
    }, py::arg("requests"), py::arg("drawing"), py::arg("cu_tokens").noconvert(), py::arg("packed").noconvert(),
               py::arg("kept"), py::arg("candidates"), py::arg("tokens"), py::arg("steps"));
    // Whether the score of any token is not finite, of so many candidates that there are.
    module.def("any_broken", [](const Array<std::int64_t>& packed, std::int64_t kept,
                                std::int64_t candidates, std::int64_t tokens, std::int64_t used) {
        const SelectionWords words(packed, kept, candidates, tokens);
        if (used < 0 || used > candidates) throw py::value_error("there are more candidates");
        return std::ranges::any_of(words.broken.first(static_cast<std::size_t>(used)),
                                   [](std::int64_t token) { return token >= 0; });
    }, py::arg("packed").noconvert(), py::arg("kept"), py::arg("candidates"), py::arg("tokens"),
               py::arg("used"));
    module.def("take_scores", [](const Requests& requests, const Array<std::int64_t>& cu_tokens,
                                 const Array<std::int64_t>& packed, std::int64_t kept,
                                 std::int64_t candidates, std::int64_t tokens) {
        const SelectionWords words(packed, kept, candidates, tokens);
        const auto used = static_cast<std::size_t>(std::max<py::ssize_t>(cu_tokens.size() - 1, 0));
        if (used > words.scores.size()) throw py::value_error("there are more candidates");
        return broken(w2s::take_scores(requests, span(cu_tokens), words.token_scores,
                                       words.scores.first(used), words.broken.first(used)));
    }, py::arg("requests"), py::arg("cu_tokens").noconvert(), py::arg("packed").noconvert(),
               py::arg("kept"), py::arg("candidates"), py::arg("tokens"));
    module.def("end_rounds", [](const Requests& requests, const Array<std::int64_t>& kept,
                                const Beams::Managers& managers) {
        w2s::end_rounds(requests, span(kept), managers);
    }, py::arg("requests"), py::arg("kept").noconvert(), py::arg("managers"));
    module.def("keep_all", &w2s::keep_all, py::arg("requests"), py::arg("managers"));
    module.def("round_pages", [](const Requests& requests,
                                 const std::vector<std::int64_t>& page_sizes) {
        const auto rows = static_cast<py::ssize_t>(requests.size());
        const auto models = static_cast<py::ssize_t>(page_sizes.size());
        return move_to_numpy(w2s::round_pages(requests, page_sizes), {rows, models});
    }, py::arg("requests"), py::arg("page_sizes"));
    module.def("held_slots", [](const Requests& requests, int model) {
        return move_to_numpy(w2s::held_slots(requests, model));
    }, py::arg("requests"), py::arg("model"));
}

}  // namespace w2s
