#include "rounds.h"

#include <algorithm>
#include <stdexcept>

namespace w2s {

namespace {

// Adds the rows of one request after the other to the levels of a tree.
class Leveller {
public:
    explicit Leveller(RowLevels& levels) : levels_(levels) {}

    // `prompt`: tokens of it that stand in the KV.
    void add(const Beams& request, const Beam& beam, std::int32_t prompt) {
        const bool other = &request != request_;
        if (other) ++requests_;
        if (other || beam.parent != parent_) ++families_;
        request_ = &request;
        parent_ = beam.parent;
        levels_.requests.push_back(requests_);
        levels_.families.push_back(families_);
        levels_.together.push_back(prompt + std::min(request.shared(), beam.inherited));
        levels_.inherited.push_back(prompt + beam.inherited);
    }

private:
    RowLevels& levels_;
    const Beams* request_ = nullptr;
    std::int32_t parent_ = Beam::kNone;
    std::int32_t requests_ = -1;
    std::int32_t families_ = -1;
};

// Calls do(request, candidate's index, candidate) for those that grow.
template <typename Do>
void for_growing(const Requests& requests, Do do_with) {
    for (const Beams* request : requests) {
        const std::vector<Beam>& candidates = request->candidates();
        for (std::size_t c = 0; c < candidates.size(); ++c) {
            if (!candidates[c].finished()) do_with(*request, c, candidates[c]);
        }
    }
}

// Calls do(request, candidate's index, candidate) for those whose parents are not finished: the
// ones that had tokens to draw in this round, whether or not they have ended since.
template <typename Do>
void for_drawn(const Requests& requests, Do do_with) {
    for (const Beams* request : requests) {
        for (std::size_t p = 0; p < request->kept().size(); ++p) {
            if (!request->open() || request->kept()[p].finished()) continue;
            const auto end = static_cast<std::size_t>(request->first_child(p + 1));
            for (auto c = static_cast<std::size_t>(request->first_child(p)); c < end; ++c) {
                do_with(*request, c, request->candidates()[c]);
            }
        }
    }
}

void expect(bool right, const char* what) {
    if (!right) throw std::invalid_argument(what);
}

}  // namespace

void begin_rounds(const Requests& requests) {
    for (Beams* request : requests) {
        if (!request->open()) request->begin_round();
    }
}

Int32s tokens_left(const Requests& requests) {
    Int32s left;
    left.reserve(requests.size());
    for (const Beams* request : requests) left.push_back(request->tokens_left());
    return left;
}

Sources lay_out_sources(const Requests& requests, const PageManager& base) {
    Sources found;
    Leveller tree(found.levels);
    for (const Beams* request : requests) {
        const std::int32_t prompt = request->prompt_end(0).length;
        if (request->forked()) {  // in the middle of a round: each candidate goes on by itself
            for (std::size_t c = 0; c < request->candidates().size(); ++c) {
                const Beam& beam = request->candidates()[c];
                if (beam.finished()) continue;
                found.slots.push_back(request->slot(c, 0));
                found.counts.push_back(1);
                found.children.push_back(1);
                found.tokens.push_back(beam.last_token);
                tree.add(*request, beam, prompt);
            }
            continue;
        }
        for (std::size_t p = 0; p < request->kept().size(); ++p) {
            const Beam& parent = request->kept()[p];
            if (parent.finished()) continue;
            const std::int32_t slot = request->kept_slot(p, 0);
            found.slots.push_back(slot);
            found.children.push_back(request->first_child(p + 1) - request->first_child(p));
            if (request->round() > 1) {
                found.counts.push_back(1);
                found.tokens.push_back(parent.last_token);
                tree.add(*request, parent, prompt);
                continue;
            }
            const std::int32_t held = base.lengths()[slot];  // of its prompt, which is yet to be run
            found.counts.push_back(prompt - held);
            found.tokens.insert(found.tokens.end(), request->prompt().begin() + held,
                                request->prompt().end());
            tree.add(*request, parent, 0);
        }
    }
    return found;
}

std::vector<PageCopy> fork_beams(const Requests& requests, PageManager& manager, int model) {
    Int32s slots, counts;
    for (const Beams* request : requests) {
        if (model == 0 && request->forked()) continue;
        for (std::size_t p = 0; p < request->kept().size(); ++p) {
            if (request->kept()[p].finished()) continue;
            slots.push_back(request->kept_slot(p, model));
            counts.push_back(request->first_child(p + 1) - request->first_child(p) - 1);
        }
    }
    ForkResult forks = manager.fork(slots, counts);
    const std::int32_t* next = forks.children.data();
    for (Beams* request : requests) {
        if (model == 0 && request->forked()) continue;
        next += request->give_slots(model, next);
        if (model == 0) request->set_forked();
    }
    return std::move(forks.copies);
}

GrowingRows lay_out_rows(const Requests& requests) {
    GrowingRows rows;
    Leveller tree(rows.levels);
    for_growing(requests, [&](const Beams& request, std::size_t c, const Beam& beam) {
        const SearchSettings& settings = request.settings();
        rows.slots.push_back(request.slot(c, 0));
        rows.temperature.push_back(settings.temperature);
        rows.top_k.push_back(settings.top_k);
        rows.top_p.push_back(settings.top_p);
        rows.min_p.push_back(settings.min_p);
        rows.seed.push_back(settings.seed);
        rows.candidate.push_back(static_cast<std::int64_t>(c));
        rows.position.push_back(beam.length);
        tree.add(request, beam, request.prompt_end(0).length);
    });
    return rows;
}

std::vector<BrokenNumber> take_tokens(const Requests& requests,
                                      std::span<const std::int64_t> tokens,
                                      std::span<const float> logprobs, std::int64_t steps) {
    std::int64_t rows = 0;
    for_growing(requests, [&](const Beams&, std::size_t, const Beam&) { ++rows; });
    expect(std::ssize(tokens) == rows * steps && std::ssize(logprobs) == rows * steps,
           "tokens and log-probs must be [rows, steps]");
    std::vector<BrokenNumber> broken;
    std::size_t next = 0;
    const auto count = static_cast<std::size_t>(steps);
    for (std::size_t r = 0; r < requests.size(); ++r) {
        bool sound = true;
        for (std::size_t c = 0; c < requests[r]->candidates().size(); ++c) {
            const Beam& beam = requests[r]->candidates()[c];
            if (beam.finished()) continue;
            const bool fine = requests[r]->take(c, tokens.subspan(next, count),
                                                logprobs.subspan(next, count));
            if (!fine && sound) broken.push_back({static_cast<std::int32_t>(r), -1, beam.length});
            sound = sound && fine;
            next += count;
        }
    }
    return broken;
}

void release_finished(const Requests& requests, PageManager& manager, int model) {
    Int32s released;
    for (Beams* request : requests) request->collect_finished(model, released);
    manager.release(released);
}

Chunks lay_out_chunks(const Requests& requests) {
    Chunks chunks;
    for_drawn(requests, [&](const Beams& request, std::size_t, const Beam& beam) {
        chunks.counts.push_back(beam.length - beam.inherited);
        request.append_new_tokens(beam, chunks.tokens);
    });
    return chunks;
}

ChunkRows lay_out_chunk_rows(const Requests& requests, int model) {
    ChunkRows rows;
    Leveller tree(rows.levels);
    for_drawn(requests, [&](const Beams& request, std::size_t c, const Beam& beam) {
        const PromptEnd& prompt = request.prompt_end(model);
        rows.slots.push_back(request.slot(c, model));
        // The guides' last token of the prompt is run with the first chunk.
        rows.inputs.push_back(beam.inherited > 0 ? beam.before_token : prompt.last_token);
        request.append_new_tokens(beam, rows.inputs);
        rows.inputs.pop_back();
        tree.add(request, beam, prompt.length - 1);
    });
    return rows;
}

CandidateColumns lay_out_candidates(const Requests& requests) {
    CandidateColumns columns;
    columns.cu_tokens.push_back(0);
    columns.cu_candidates.push_back(0);
    for (const Beams* request : requests) {
        const SearchSettings& settings = request->settings();
        for (std::size_t p = 0; p < request->kept().size(); ++p) {
            const std::int32_t alike = request->first_alike(p);
            const auto end = static_cast<std::size_t>(request->first_child(p + 1));
            for (auto c = static_cast<std::size_t>(request->first_child(p)); c < end; ++c) {
                const Beam& beam = request->candidates()[c];
                columns.cu_tokens.push_back(columns.cu_tokens.back() + beam.length -
                                            beam.inherited);
                columns.previous.push_back(beam.total);
                columns.lengths.push_back(beam.length);
                columns.parents.push_back(beam.parent);
                columns.siblings.push_back(alike);
            }
        }
        const auto count = std::ssize(request->candidates());
        columns.cu_candidates.push_back(columns.cu_candidates.back() + count);
        columns.width.push_back(settings.width);
        columns.mean.push_back(settings.mean);
        columns.dedup.push_back(settings.dedup);
        columns.max_candidates = std::max<std::int64_t>(columns.max_candidates, count);
        columns.max_width = std::max<std::int64_t>(columns.max_width, settings.width);
    }
    return columns;
}

std::vector<BrokenNumber> take_scores(const Requests& requests,
                                      std::span<const double> token_scores,
                                      std::span<const double> scores,
                                      std::span<const std::int32_t> broken) {
    std::size_t tokens = 0, candidates = 0;
    for (const Beams* request : requests) {
        candidates += request->candidates().size();
        for (const Beam& beam : request->candidates()) {
            tokens += static_cast<std::size_t>(beam.length - beam.inherited);
        }
    }
    expect(token_scores.size() == tokens && scores.size() == candidates &&
               broken.size() == candidates,
           "scores must be [T], [C] and [C]");
    std::vector<BrokenNumber> found;
    std::size_t candidate = 0, token = 0;
    for (std::size_t r = 0; r < requests.size(); ++r) {
        bool sound = true;
        for (std::size_t c = 0; c < requests[r]->candidates().size(); ++c, ++candidate) {
            const Beam& beam = requests[r]->candidates()[c];
            const auto count = static_cast<std::size_t>(beam.length - beam.inherited);
            if (broken[candidate] >= 0 && sound) {
                const auto offset = broken[candidate] - static_cast<std::int32_t>(token);
                found.push_back({static_cast<std::int32_t>(r), broken[candidate],
                                 beam.inherited + offset});
                sound = false;
            }
            requests[r]->set_scores(c, token_scores.subspan(token, count), scores[candidate]);
            token += count;
        }
    }
    return found;
}

void end_rounds(const Requests& requests, std::span<const std::int32_t> kept,
                const Beams::Managers& managers) {
    if (requests.empty()) return;
    expect(kept.size() % requests.size() == 0, "kept must be [R, width]");
    const std::size_t width = kept.size() / requests.size();
    for (std::size_t r = 0; r < requests.size(); ++r) {
        const auto row = kept.subspan(r * width, width);
        requests[r]->end_round({row.begin(), std::ranges::find(row, -1)}, managers);
    }
}

void keep_all(const Requests& requests, const Beams::Managers& managers) {
    for (Beams* request : requests) {
        Int32s all(request->candidates().size());
        for (std::size_t c = 0; c < all.size(); ++c) all[c] = static_cast<std::int32_t>(c);
        request->end_round(std::move(all), managers);
    }
}

Int64s round_pages(const Requests& requests, std::span<const std::int64_t> page_sizes) {
    Int64s pages;
    for (const Beams* request : requests) {
        for (int m = 0; m < static_cast<int>(page_sizes.size()); ++m) {
            const bool runs = m == 0 || request->settings().uses_guides;
            pages.push_back(runs ? request->round_pages(m, page_sizes[m]) : 0);
        }
    }
    return pages;
}

Int32s held_slots(const Requests& requests, int model) {
    Int32s held;
    for (Beams* request : requests) {
        if (model < request->models()) request->collect_held(model, held);
    }
    return held;
}

}  // namespace w2s
