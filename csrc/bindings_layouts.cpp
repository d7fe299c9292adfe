// What passes and operators are given, and what they answer, for Python: laid out in buffers.
#include "bindings_layouts.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "arrays.h"
#include "beam_search.h"
#include "bucket.h"
#include "draw.h"
#include "rounds.h"
#include "scoring.h"

namespace py = pybind11;
using w2s::Array;
using w2s::Beams;
using w2s::bytes;
using w2s::IntArray;
using w2s::ints;
using w2s::move_to_numpy;
using w2s::PageManager;
using w2s::PassLayout;
using w2s::DrawLayout;
using w2s::Requests;
using w2s::span;
using w2s::to_numpy;

namespace {

py::list broken(const std::vector<w2s::BrokenNumber>& numbers) {
    py::list found;
    for (const auto& [request, token, position] : numbers) {
        found.append(py::make_tuple(request, token, position));
    }
    return found;
}

std::vector<std::span<const std::int64_t>> spans(const std::vector<Array<std::int64_t>>& arrays) {
    std::vector<std::span<const std::int64_t>> found;
    for (const auto& array : arrays) found.push_back(span(array));
    return found;
}

std::span<const w2s::PageCopy> pairs(const IntArray& array) {
    if (array.size() > 0 && (array.ndim() != 2 || array.shape(1) != 2)) {
        throw py::value_error("pairs of pages are int32 [n, 2]");
    }
    static_assert(sizeof(w2s::PageCopy) == 2 * sizeof(std::int32_t));
    return {reinterpret_cast<const w2s::PageCopy*>(array.data()),
            static_cast<std::size_t>(array.size() / 2)};
}

template <typename T>
constexpr const char* dtype_of() {
    if constexpr (std::is_same_v<T, double>) return "float64";
    if constexpr (std::is_same_v<T, float>) return "float32";
    if constexpr (std::is_same_v<T, std::int64_t>) return "int64";
    if constexpr (std::is_same_v<T, std::int32_t>) return "int32";
    return "bool";
}

py::tuple bounds(const PassLayout& pass) {
    const w2s::PassBounds own = pass.bounds();
    return py::make_tuple(own.rows, own.tokens, own.splits, own.pages, own.max_q, own.max_k,
                          own.max_own, own.max_tokens, own.max_parts);
}

py::tuple numbers(const w2s::Bucket& bucket) {
    return py::make_tuple(bucket.rows, bucket.tokens, bucket.max_q, bucket.splits,
                          bucket.max_tokens, bucket.max_parts, bucket.max_own, bucket.pages);
}

py::list numbers(const std::vector<w2s::Bucket>& buckets) {
    py::list found;
    for (const w2s::Bucket& bucket : buckets) found.append(numbers(bucket));
    return found;
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
            found.append(py::make_tuple(copied(scoring_.slots[m]), to_numpy(levels.tree()),
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
        for (const auto& own : passes_->copies()) found.append(to_numpy(own));
        return found;
    }

    // Of each model's pass, with room for so many rows and tokens.
    py::list buckets(const w2s::SplitRule& rule, std::int64_t rows, std::int64_t tokens,
                     const std::vector<std::int64_t>& most_pages) const {
        py::list found;
        for (std::size_t m = 0; m < passes_.value().passes().size(); ++m) {
            const w2s::PassBounds own = passes_.value().passes()[m].bounds();
            found.append(numbers(w2s::bucket_of(rule, own, rows, tokens, most_pages.at(m))));
        }
        return found;
    }

    // `copies`, int32 [n, 2] of each model that there is a room for, go to these offsets.
    void write(Array<std::uint8_t> buffer, const Array<std::int64_t>& offsets,
               const Array<std::int64_t>& items, std::int64_t room,
               const std::vector<const w2s::PassRoom*>& rooms, const std::vector<IntArray>& copies,
               const std::vector<std::int64_t>& of_copies) const {
        if (copies.size() != rooms.size() || of_copies.size() != rooms.size()) {
            throw py::value_error("copies for each model");
        }
        w2s::write_columns(scoring_, bytes(buffer), span(offsets), span(items), room);
        for (std::size_t m = 0; m < rooms.size(); ++m) {
            const w2s::PassShape& shape = rooms[m]->shape;
            passes_.value().passes().at(m).write(bytes(buffer), rooms[m]->offsets, shape, false);
            w2s::write_copies(bytes(buffer), of_copies[m], pairs(copies[m]), shape.rows);
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

}  // namespace

namespace w2s {

void bind_layouts(py::module_& module) {
    py::class_<PassLayout>(module, "PassLayout")
        .def(py::init([](const PageManager& pages, const IntArray& slots, const IntArray& counts,
                         const IntArray& first, const IntArray& count, const IntArray& begin,
                         const IntArray& end, const IntArray& own, std::int64_t split_keys,
                         std::int64_t split_queries, std::int64_t ahead) {
                const w2s::RowTree tree{ints(first), ints(count), ints(begin), ints(end),
                                        ints(own)};
                return std::make_unique<PassLayout>(pages, ints(slots), ints(counts), tree,
                                                    split_keys, split_queries, ahead);
            }), py::keep_alive<1, 2>(), py::arg("pages"), py::arg("slots").noconvert(),
            py::arg("counts").noconvert(), py::arg("first").noconvert(),
            py::arg("count").noconvert(), py::arg("begin").noconvert(),
            py::arg("end").noconvert(), py::arg("own").noconvert(), py::arg("split_keys"),
            py::arg("split_queries"), py::arg("ahead") = 0)
        .def_property_readonly("bounds", &bounds)
        .def("write", [](const PassLayout& self,
                         Array<std::uint8_t> buffer,
                         const Array<std::int64_t>& offsets,
                         std::int64_t rows, std::int64_t tokens, std::int64_t splits,
                         std::int64_t pages, bool back) {
                self.write(bytes(buffer), span(offsets), {rows, tokens, splits, pages}, back);
            }, py::arg("buffer").noconvert(), py::arg("offsets").noconvert(), py::arg("rows"),
            py::arg("tokens"), py::arg("splits"), py::arg("pages"), py::arg("back") = false);

    // Fields of a buffer: (offset in bytes, items, one spare item, NumPy's letter for its kind).
    // Values come first in each, and spare items behind them.
    module.def("fill_fields", [](Array<std::uint8_t> buffer,
                                 const std::vector<std::tuple<std::int64_t, std::int64_t,
                                                              py::bytes, char>>& fields,
                                 const std::vector<py::array>& values) {
        const std::span<std::byte> whole = bytes(buffer);
        if (fields.size() != values.size()) throw w2s::PageMisuse("a value for each field");
        for (std::size_t i = 0; i < fields.size(); ++i) {
            const auto& [offset, items, spare, kind] = fields[i];
            const auto item = static_cast<std::string_view>(spare);
            const auto size = static_cast<std::int64_t>(item.size());
            const auto& value = values[i];
            if (value.itemsize() != size || value.dtype().kind() != kind ||
                value.size() > items || offset < 0 ||
                offset + items * size > static_cast<std::int64_t>(whole.size()) ||
                !(value.flags() & py::array::c_style)) {
                throw w2s::PageMisuse("a value does not fit into its field");
            }
            std::byte* next = whole.data() + offset;
            std::byte* const end = next + items * size;
            if (value.size() > 0) std::memcpy(next, value.data(), value.nbytes());
            next += value.nbytes();
            for (; next < end; next += size) std::memcpy(next, item.data(), item.size());
        }
    }, py::arg("buffer").noconvert(), py::arg("fields"), py::arg("values"));

    py::class_<w2s::SplitRule>(module, "SplitRule")
        .def(py::init([](std::int64_t split_keys, std::int64_t split_queries,
                         std::int64_t few_keys) {
                 return w2s::SplitRule{split_keys, split_queries, few_keys};
             }), py::arg("split_keys"), py::arg("split_queries"), py::arg("few_keys"));
    module.def("smallest_bucket", [](const w2s::SplitRule& rule, std::int64_t rows,
                                     std::int64_t tokens, std::int64_t max_q,
                                     std::int64_t most_pages) {
        return numbers(w2s::smallest_bucket(rule, rows, tokens, max_q, most_pages));
    }, py::arg("rule"), py::arg("rows"), py::arg("tokens"), py::arg("max_q"),
               py::arg("most_pages"));
    module.def("bucket_of", [](const w2s::SplitRule& rule, const std::array<std::int64_t, 9>& of,
                               std::int64_t rows, std::int64_t tokens, std::int64_t most_pages) {
        const w2s::PassBounds pass{of[0], of[1], of[2], of[3], of[4], of[5], of[6], of[7], of[8]};
        return numbers(w2s::bucket_of(rule, pass, rows, tokens, most_pages));
    }, py::arg("rule"), py::arg("bounds"), py::arg("rows"), py::arg("tokens"),
               py::arg("most_pages"));
    module.def("round_up_tokens", &w2s::round_up_tokens, py::arg("count"));
    py::class_<w2s::PassRoom>(module, "PassRoom")
        .def(py::init([](const Array<std::int64_t>& offsets, std::int64_t rows,
                         std::int64_t tokens, std::int64_t splits, std::int64_t pages) {
                 return w2s::PassRoom{{offsets.data(), offsets.data() + offsets.size()},
                                      {rows, tokens, splits, pages}};
             }), py::arg("offsets").noconvert(), py::arg("rows"), py::arg("tokens"),
             py::arg("splits"), py::arg("pages"));
    py::class_<DrawLayout>(module, "DrawLayout")
        .def(py::init<Requests, Beams::Managers>(), py::keep_alive<1, 3>(), py::arg("requests"),
             py::arg("managers"))
        .def_property_readonly("rows", &DrawLayout::rows)
        .def_property_readonly("tokens", &DrawLayout::tokens)
        .def_property_readonly("max_new", &DrawLayout::max_new)
        .def_property_readonly("num_sources", &DrawLayout::num_sources)
        .def_property_readonly("some_plausible", &DrawLayout::some_plausible)
        .def_property_readonly("some_dynamic", &DrawLayout::some_dynamic)
        .def("begin", &DrawLayout::begin, py::arg("steps"), py::arg("split_keys"),
             py::arg("split_queries"))
        .def("buckets", [](const DrawLayout& self, const w2s::SplitRule& rule, std::int64_t rows,
                           std::int64_t sources, std::int64_t most,
                           const std::vector<std::int64_t>& most_pages) {
            const w2s::DrawBuckets found = self.buckets(rule, rows, sources, most, most_pages);
            return py::make_tuple(numbers(found.sources), numbers(found.rows));
        }, py::arg("rule"), py::arg("rows"), py::arg("sources"), py::arg("most"),
           py::arg("most_pages"))
        .def("before", [](const DrawLayout& self, std::size_t model) {
            return to_numpy(self.before(model));
        }, py::arg("model"))
        .def_property_readonly("num_before", [](const DrawLayout& self) {
            std::vector<std::size_t> found;
            for (std::size_t m = 0; m < self.models(); ++m) found.push_back(self.before(m).size());
            return found;
        })
        .def_property_readonly("num_copies", [](const DrawLayout& self) {
            std::vector<std::size_t> found;
            for (std::size_t m = 0; m < self.models(); ++m) found.push_back(self.copies(m).size());
            return found;
        })
        .def("write_rows", [](const DrawLayout& self, Array<std::uint8_t> buffer,
                              const std::vector<const w2s::PassRoom*>& rooms,
                              const std::vector<Array<std::int64_t>>& columns) {
            self.write_rows(bytes(buffer), rooms, spans(columns));
        }, py::arg("buffer").noconvert(), py::arg("rooms"), py::arg("columns"))
        .def("write_sources", [](const DrawLayout& self, Array<std::uint8_t> buffer,
                                 const std::vector<const w2s::PassRoom*>& rooms,
                                 const std::vector<Array<std::int64_t>>& columns,
                                 std::int64_t rows) {
            self.write_sources(bytes(buffer), rooms, spans(columns), rows);
        }, py::arg("buffer").noconvert(), py::arg("rooms"), py::arg("columns"), py::arg("rows"));
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
        .def("begin", &ScoringLayout::begin, py::keep_alive<1, 2>(), py::arg("managers"),
             py::arg("split_keys"), py::arg("split_queries"))
        .def("buckets", &ScoringLayout::buckets, py::arg("rule"), py::arg("rows"),
             py::arg("tokens"), py::arg("most_pages"))
        .def_property_readonly("num_drawn", [](const ScoringLayout& self) {
            return self.scoring().rows;
        })
        .def("write", &ScoringLayout::write, py::arg("buffer").noconvert(),
             py::arg("offsets").noconvert(), py::arg("items").noconvert(), py::arg("room"),
             py::arg("rooms"), py::arg("copies").noconvert() = std::vector<IntArray>(),
             py::arg("of_copies") = std::vector<std::int64_t>());
    // `packed`, and for what it has room: of SelectionWords.
    module.def("take_selected", [](const Requests& requests, const Requests& drawing,
                                   const Array<std::int64_t>& cu_tokens,
                                   const Array<std::int64_t>& packed, std::int64_t kept,
                                   std::int64_t candidates, std::int64_t tokens,
                                   std::int64_t steps) {
        const SelectionWords words(packed, kept, candidates, tokens);
        return broken(w2s::take_selected(requests, drawing, span(cu_tokens), words.tokens,
                                         words.logprobs, steps));
    }, py::arg("requests"), py::arg("drawing"), py::arg("cu_tokens").noconvert(),
               py::arg("packed").noconvert(), py::arg("kept"), py::arg("candidates"),
               py::arg("tokens"), py::arg("steps"));
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
    // The same with log-probs of `models` others, `others` bytes behind a step's beginning: those of
    // one model after the other, each with room for `room` rows. `guides`: weight, tuned, untuned.
    module.def("take_fused", [](const Requests& requests, const Array<std::uint8_t>& memory,
                                std::int64_t rows, std::int64_t logprobs, std::int64_t others,
                                std::int64_t models, std::int64_t room,
                                const std::vector<std::tuple<double, int, int>>& guides) {
        if (memory.ndim() != 2 || rows < 0 || room < rows || models < 0 || logprobs < 8 * rows ||
            others < logprobs + 4 * rows || others + 4 * models * room > memory.shape(1) ||
            logprobs % 4 != 0 || others % 4 != 0 || memory.shape(1) % 8 != 0) {
            throw py::value_error("draws have other bytes");
        }
        const py::ssize_t steps = memory.shape(0);
        std::vector<std::int64_t> tokens(static_cast<std::size_t>(rows * steps));
        std::vector<float> found(tokens.size());
        std::vector<float> of_others(tokens.size() * static_cast<std::size_t>(models));
        for (py::ssize_t step = 0; step < steps; ++step) {
            const std::uint8_t* const begin = memory.data() + step * memory.shape(1);
            const auto* token = reinterpret_cast<const std::int64_t*>(begin);
            const auto* logprob = reinterpret_cast<const float*>(begin + logprobs);
            const auto* other = reinterpret_cast<const float*>(begin + others);
            for (std::int64_t row = 0; row < rows; ++row) {
                const std::int64_t at = row * steps + step;
                tokens[static_cast<std::size_t>(at)] = token[row];
                found[static_cast<std::size_t>(at)] = logprob[row];
                for (std::int64_t m = 0; m < models; ++m) {
                    of_others[static_cast<std::size_t>(at * models + m)] = other[m * room + row];
                }
            }
        }
        std::vector<w2s::GuideTerm> terms;
        for (const auto& [weight, tuned, untuned] : guides) terms.push_back({weight, tuned, untuned});
        return broken(
            w2s::take_fused(requests, {steps, rows, tokens, found, of_others}, terms));
    }, py::arg("requests"), py::arg("memory").noconvert(), py::arg("rows"), py::arg("logprobs"),
               py::arg("others"), py::arg("models"), py::arg("room"), py::arg("guides"));
    module.def("broken_continuations", [](const Requests& requests, const IntArray& tokens,
                                          const Array<float>& logprobs) {
        return broken(w2s::broken_continuations(requests, {span(tokens), span(logprobs)}));
    }, py::arg("requests"), py::arg("tokens").noconvert(), py::arg("logprobs").noconvert());
    module.def("rank_continuations", [](const Requests& requests, const IntArray& tokens,
                                        const Array<float>& logprobs, std::size_t request) {
        py::list found;
        for (const auto& [parent, token, ends] : w2s::rank_continuations(
                 requests, {span(tokens), span(logprobs)}, request)) {
            found.append(py::make_tuple(parent, token, ends));
        }
        return found;
    }, py::arg("requests"), py::arg("tokens").noconvert(), py::arg("logprobs").noconvert(),
               py::arg("request"));
    module.def("advance_beams", [](const Requests& requests, const IntArray& tokens,
                                   const Array<float>& logprobs, PageManager& base,
                                   const std::vector<std::array<std::int32_t, 4>>& ended) {
        std::vector<w2s::EndedText> texts;
        for (const auto& [request, rank, length, ending] : ended) {
            texts.push_back({request, rank, length, ending});
        }
        return to_numpy(w2s::advance_beams(requests, {span(tokens), span(logprobs)}, base, texts));
    }, py::arg("requests"), py::arg("tokens").noconvert(), py::arg("logprobs").noconvert(),
               py::arg("base"), py::arg("ended") = py::list());
}

}  // namespace w2s
