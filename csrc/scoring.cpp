#include "scoring.h"

#include <algorithm>
#include <stdexcept>
#include <type_traits>
#include <unordered_map>
#include <utility>

#include "expect.h"

namespace w2s {

namespace {

// The same number for candidates that are shorter than their parents where all of their tokens are
// equal; that of the parent's equals, where there is one that has ended with these tokens.
std::int64_t alike_to_shorter(const Beams& request, std::size_t candidate) {
    const Beam& beam = request.candidates()[candidate];
    for (std::size_t p = 0; p < request.kept().size(); ++p) {
        if (request.kept()[p].finished() && request.same_tokens(request.kept()[p], beam)) {
            return request.first_alike(p);
        }
    }
    std::size_t first = 0;
    const auto& others = request.candidates();
    while (others[first].length > others[first].inherited ||
           !request.same_tokens(others[first], beam)) {
        ++first;
    }
    return -1 - static_cast<std::int64_t>(first);
}

// Room for as much as there is where all chunks are drawn.
void reserve(Scoring& found, const Requests& requests, std::int64_t steps) {
    std::size_t candidates = 0;
    for (const Beams* request : requests) candidates += request->candidates().size();
    const std::size_t tokens = candidates * static_cast<std::size_t>(std::max<std::int64_t>(steps, 1));
    found.counts.reserve(candidates);
    found.targets.reserve(tokens);
    found.tokens.reserve(candidates);
    found.logprobs.reserve(candidates);
    found.cu_tokens.reserve(candidates + 1);
    found.previous.reserve(candidates);
    found.lengths.reserve(candidates);
    found.parents.reserve(candidates);
    found.siblings.reserve(candidates);
    for (std::size_t m = 0; m < found.inputs.size(); ++m) {
        found.inputs[m].reserve(tokens);
        found.slots[m].reserve(candidates);
        found.levels[m].reserve(candidates);
    }
}

}  // namespace

Scoring lay_out_scoring(const Requests& requests, const Requests& drawing, std::int64_t steps,
                        std::vector<double> weights) {
    std::unordered_map<const Beams*, std::int64_t> first_rows;
    std::int64_t rows = 0;
    for (const Beams* request : drawing) {
        first_rows.emplace(request, rows);
        for (const Beam& beam : request->candidates()) rows += beam.grows();
    }
    Scoring found;
    found.steps = steps;
    found.rows = rows;
    found.weights = std::move(weights);
    const int models = requests.empty() ? 1 : requests.front()->models();
    found.inputs.resize(static_cast<std::size_t>(models - 1));
    found.slots.resize(found.inputs.size());
    found.levels.resize(found.inputs.size());
    reserve(found, requests, steps);
    std::vector<Leveller> trees;
    for (RowLevels& levels : found.levels) trees.emplace_back(levels);
    const auto know = [&](std::int64_t token, float logprob) {
        found.tokens.push_back(token);
        found.logprobs.push_back(logprob);
        return rows * steps + std::ssize(found.tokens) - 1;
    };
    found.cu_tokens.push_back(0);
    found.cu_candidates.push_back(0);
    found.cu_stops.push_back(0);
    Int64s chunk;
    std::vector<std::int32_t> tokens;
    std::vector<float> logprobs;
    for (const Beams* request : requests) {
        expect(request->open() && request->models() == models, "a round with all guides is open");
        const auto drawn = first_rows.find(request);
        std::int64_t row = drawn == first_rows.end() ? 0 : drawn->second;
        const SearchSettings& settings = request->settings();
        for (std::size_t p = 0; p < request->kept().size(); ++p) {
            const bool runs = !request->kept()[p].finished();
            const std::int32_t alike = request->first_alike(p);
            const auto end = static_cast<std::size_t>(request->first_child(p + 1));
            for (auto c = static_cast<std::size_t>(request->first_child(p)); c < end; ++c) {
                const Beam& beam = request->candidates()[c];
                chunk.clear();
                tokens.clear();
                logprobs.clear();
                request->append_new(beam, tokens, logprobs);
                for (std::size_t i = 0; i < tokens.size(); ++i) {
                    chunk.push_back(know(tokens[i], logprobs[i]));
                }
                if (drawn != first_rows.end() && beam.grows()) {
                    for (std::int64_t step = 0; step < steps; ++step) {
                        chunk.push_back(step * rows + row);
                    }
                    ++row;
                }
                found.cu_tokens.push_back(found.cu_tokens.back() + std::ssize(chunk));
                found.previous.push_back(beam.total);
                // A mean is over one token at least.
                const bool empty = chunk.empty() && beam.length == 0;
                found.lengths.push_back(empty ? 1 : beam.inherited);
                found.parents.push_back(beam.parent);
                const bool shorter = runs && beam.inherited < request->kept()[p].length;
                found.siblings.push_back(shorter ? alike_to_shorter(*request, c) : alike);
                // A text that has ended before its first new token: nothing is run for it.
                if (!runs || (chunk.empty() && beam.ending != Beam::kNone)) continue;
                expect(!chunk.empty(), "a candidate that runs has new tokens");
                found.counts.push_back(static_cast<std::int32_t>(chunk.size()));
                found.targets.insert(found.targets.end(), chunk.begin(), chunk.end());
                const std::int64_t before =
                    beam.inherited > 0 ? know(beam.before_token, 0.0F) : std::int64_t{-1};
                for (int m = 1; m < models; ++m) {
                    const PromptEnd& prompt = request->prompt_end(m);
                    Int64s& inputs = found.inputs[m - 1];
                    // The guides' last token of the prompt is run with the first chunk.
                    inputs.push_back(before >= 0 ? before : know(prompt.last_token, 0.0F));
                    inputs.insert(inputs.end(), chunk.begin(), chunk.end() - 1);
                    found.slots[m - 1].push_back(request->slot(c, m));
                    trees[m - 1].add(*request, beam, prompt.length - 1);
                }
            }
        }
        const auto count = std::ssize(request->candidates());
        found.cu_candidates.push_back(found.cu_candidates.back() + count);
        for (const auto* ids : {&settings.eos_ids, &settings.stop_ids}) {
            found.stops.insert(found.stops.end(), ids->begin(), ids->end());
        }
        found.cu_stops.push_back(std::ssize(found.stops));
        const std::int64_t width = settings.width_in(request->round());
        found.width.push_back(width);
        found.mean.push_back(settings.mean);
        found.dedup.push_back(settings.dedup);
        found.max_candidates = std::max<std::int64_t>(found.max_candidates, count);
        found.max_width = std::max(found.max_width, width);
    }
    return found;
}

ScoringPasses::ScoringPasses(const Scoring& scoring, const Beams::Managers& managers,
                             std::int64_t split_keys, std::int64_t split_queries) {
    expect(managers.size() == scoring.slots.size(), "a manager for each model of the guides");
    passes_.reserve(managers.size());
    for (std::size_t m = 0; m < managers.size(); ++m) {
        const Int32s& slots = scoring.slots[m];
        copies_.push_back(managers[m]->reserve(slots, scoring.counts));
        const TreeSegments tree = scoring.levels[m].tree();
        passes_.emplace_back(*managers[m], slots, scoring.counts, view(tree), split_keys,
                             split_queries, 0);
        managers[m]->extend(slots, scoring.counts);
    }
}

void write_columns(const Scoring& scoring, std::span<std::byte> buffer,
                   std::span<const std::int64_t> offsets, std::span<const std::int64_t> items,
                   std::int64_t room) {
    expect(offsets.size() == items.size(), "an offset for each column");
    expect(room >= scoring.rows, "more rows were drawn than there is room for");
    const std::int64_t drawn = scoring.steps * scoring.rows;
    const auto place = [&](std::int64_t token) {
        if (token >= drawn) return token - drawn + scoring.steps * room;
        return token / scoring.rows * room + token % scoring.rows;
    };
    std::size_t column = 0;
    scoring.columns([&](const std::string&, const auto& values, auto spare, bool names_tokens) {
        using Value = decltype(spare);
        expect(column < items.size() && std::ssize(values) <= items[column],
               "a column does not fit into its buffer");
        Value* const target = field_of<Value>(buffer, offsets[column], items[column]);
        fill(target, values, items[column], spare);
        if constexpr (std::is_same_v<Value, std::int64_t>) {
            if (names_tokens && room != scoring.rows) {
                const Value none = place(0);
                std::transform(values.begin(), values.end(), target, place);
                std::fill(target + values.size(), target + items[column], none);
            }
        }
        ++column;
    });
    expect(column == items.size(), "there are other columns");
}

}  // namespace w2s
