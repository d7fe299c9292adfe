#include "rounds.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <unordered_map>

#include "expect.h"

namespace w2s {

namespace {

// Calls do(request, candidate's index, candidate) for those that grow.
template <typename Do>
void for_growing(const Requests& requests, Do do_with) {
    for (const Beams* request : requests) {
        const std::vector<Beam>& candidates = request->candidates();
        for (std::size_t c = 0; c < candidates.size(); ++c) {
            if (candidates[c].grows()) do_with(*request, c, candidates[c]);
        }
    }
}

bool lacks_texts(const Beams& request, const PageManager& manager, int model) {
    for (std::size_t p = 0; p < request.kept().size(); ++p) {
        const Beam& beam = request.kept()[p];
        if (beam.finished()) continue;
        const std::int32_t slot = request.kept_slot(p, model);
        if (slot == Beams::kNoSlot) return true;
        const std::int32_t whole = request.prompt_end(model).length + beam.length - 1;
        if (manager.lengths()[slot] < whole) return true;
    }
    return false;
}

}  // namespace

void begin_rounds(const Requests& requests) {
    for (Beams* request : requests) {
        if (request->aside()) request->resume();
        if (!request->open()) request->begin_round();
    }
}

Progress progress(const Requests& requests) {
    Progress found;
    for (const Beams* request : requests) {
        found.sampled += request->sampled();
        found.scored += request->scored();
    }
    return found;
}

Int32s tokens_left(const Requests& requests) {
    Int32s left;
    left.reserve(requests.size());
    for (const Beams* request : requests) left.push_back(request->tokens_left());
    return left;
}

std::vector<std::uint8_t> entering(const Requests& requests, const Beams::Managers& managers) {
    std::vector<std::uint8_t> found;
    found.reserve(requests.size());
    for (const Beams* request : requests) {
        const SearchSettings& settings = request->settings();
        const bool all = settings.uses_guides && (request->round() > 1 || settings.fuses());
        const int models = request->forked() ? 0 : all ? request->models() : 1;
        bool lacks = false;
        for (int m = 0; m < models && !lacks; ++m) {
            lacks = lacks_texts(*request, *managers.at(static_cast<std::size_t>(m)), m);
        }
        found.push_back(lacks);
    }
    return found;
}

std::vector<std::uint8_t> lacking(const Requests& requests, const PageManager& manager, int model) {
    std::vector<std::uint8_t> found;
    found.reserve(requests.size());
    for (const Beams* request : requests) found.push_back(lacks_texts(*request, manager, model));
    return found;
}

Sources lay_out_sources(const Requests& requests, const PageManager& manager, int model) {
    Sources found;
    Leveller tree(found.levels);
    for (const Beams* request : requests) {
        const auto [prompt, last_of_prompt] = request->prompt_end(model);
        if (request->forked(model)) {  // in the middle of a round: each candidate goes on by itself
            for (std::size_t c = 0; c < request->candidates().size(); ++c) {
                const Beam& beam = request->candidates()[c];
                if (!beam.grows()) continue;
                found.slots.push_back(request->slot(c, model));
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
            const std::int32_t slot = request->kept_slot(p, model);
            found.slots.push_back(slot);
            found.children.push_back(request->first_child(p + 1) - request->first_child(p));
            if (request->round() > 1) {
                found.counts.push_back(1);
                found.tokens.push_back(parent.last_token);
                tree.add(*request, parent, prompt);
                continue;
            }
            // Of its prompt, which is yet to be run.
            const std::int32_t held = manager.lengths()[slot];
            found.counts.push_back(prompt - held);
            if (model == 0) {
                found.tokens.insert(found.tokens.end(), request->prompt().begin() + held,
                                    request->prompt().end());
            } else {
                expect(held == prompt - 1, "a guide has all but the last token of its prompt");
                found.tokens.push_back(last_of_prompt);
            }
            tree.add(*request, parent, 0);
        }
    }
    return found;
}

std::vector<PageCopy> fork_beams(const Requests& requests, PageManager& manager, int model) {
    Int32s slots, counts;
    for (const Beams* request : requests) {
        if (request->forked(model)) continue;
        for (std::size_t p = 0; p < request->kept().size(); ++p) {
            if (request->kept()[p].finished()) continue;
            slots.push_back(request->kept_slot(p, model));
            counts.push_back(request->first_child(p + 1) - request->first_child(p) - 1);
        }
    }
    ForkResult forks = manager.fork(slots, counts);
    const std::int32_t* next = forks.children.data();
    for (Beams* request : requests) {
        if (request->forked(model)) continue;
        next += request->give_slots(model, next);
        request->set_forked(model);
    }
    return std::move(forks.copies);
}

GrowingRows lay_out_rows(const Requests& requests, int model) {
    GrowingRows rows;
    std::size_t most = 0;
    for (const Beams* request : requests) most += request->candidates().size();
    rows.slots.reserve(most);
    rows.temperature.reserve(most);
    for (auto* column : {&rows.top_k, &rows.seed, &rows.candidate, &rows.position}) {
        column->reserve(most);
    }
    for (auto* column : {&rows.top_p, &rows.min_p}) column->reserve(most);
    rows.levels.reserve(most);
    Leveller tree(rows.levels);
    for_growing(requests, [&](const Beams& request, std::size_t c, const Beam& beam) {
        const SearchSettings& settings = request.settings();
        rows.slots.push_back(request.slot(c, model));
        rows.temperature.push_back(settings.temperature);
        rows.top_k.push_back(settings.top_k);
        rows.top_p.push_back(settings.top_p);
        rows.min_p.push_back(settings.min_p);
        rows.seed.push_back(settings.seed);
        rows.candidate.push_back(static_cast<std::int64_t>(c));
        rows.position.push_back(beam.length);
        tree.add(request, beam, request.prompt_end(model).length);
        if (!settings.fuses()) return;
        rows.betas.insert(rows.betas.end(), settings.betas.begin(), settings.betas.end());
        rows.plausibility.push_back(settings.plausibility);
        rows.dynamic.push_back(settings.dynamic);
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
            if (!beam.grows()) continue;
            const bool fine = requests[r]->take(c, tokens.subspan(next, count),
                                                logprobs.subspan(next, count));
            if (!fine && sound) broken.push_back({static_cast<std::int32_t>(r), -1, beam.length});
            sound = sound && fine;
            next += count;
        }
    }
    return broken;
}

namespace {

// log p_tuned - log p_untuned, 0 where both are -inf.
double log_ratio(double tuned, double untuned) {
    return tuned == untuned && std::isinf(tuned) && tuned < 0 ? 0.0 : tuned - untuned;
}

}  // namespace

std::vector<BrokenNumber> take_fused(const Requests& requests, const FusedDraws& drawn,
                                     const std::vector<GuideTerm>& guides) {
    const auto steps = static_cast<std::size_t>(drawn.steps);
    const std::size_t tokens = drawn.tokens.size();
    std::int64_t rows = 0;
    for_growing(requests, [&](const Beams&, std::size_t, const Beam&) { ++rows; });
    expect(rows == drawn.rows && tokens == steps * static_cast<std::size_t>(rows) &&
               drawn.logprobs.size() == tokens &&
               (tokens == 0 ? drawn.others.empty() : drawn.others.size() % tokens == 0),
           "tokens and log-probs must be [rows, steps]");
    const std::size_t others = tokens == 0 ? 0 : drawn.others.size() / tokens;
    for (const GuideTerm& guide : guides) {
        expect(guide.tuned >= 0 && guide.untuned >= -1 &&
                   std::max(guide.tuned, guide.untuned) <= static_cast<int>(others),
               "a guide has models that are not there");
    }
    const auto logprob = [&](std::size_t token, int model) -> double {
        return model == 0 ? drawn.logprobs[token]
                          : drawn.others[token * others + static_cast<std::size_t>(model - 1)];
    };
    const auto first_broken = [&](std::size_t token) -> std::int64_t {
        for (int model = 0; model <= static_cast<int>(others); ++model) {
            const double value = logprob(token, model);
            if (!std::isfinite(value) && !(model == 0 && value > 0)) return model;
        }
        return kFused;
    };
    std::vector<double> scores(steps);
    std::vector<BrokenNumber> broken;
    std::size_t next = 0;
    for (std::size_t r = 0; r < requests.size(); ++r) {
        bool sound = true;
        for (std::size_t c = 0; c < requests[r]->candidates().size(); ++c) {
            const Beam& beam = requests[r]->candidates()[c];
            if (!beam.grows()) continue;
            for (std::size_t step = 0; step < steps; ++step) {
                scores[step] = 0.0;
                for (const auto& [weight, tuned, untuned] : guides) {
                    const double own = logprob(next + step, tuned);
                    scores[step] += weight * (untuned < 0
                                                  ? own
                                                  : log_ratio(own, logprob(next + step, untuned)));
                }
            }
            const std::int32_t before = beam.length;
            const bool fine = requests[r]->take(c, drawn.tokens.subspan(next, steps),
                                                drawn.logprobs.subspan(next, steps), scores);
            if (!fine && sound) {
                const auto at = next + static_cast<std::size_t>(beam.length - before);
                broken.push_back({static_cast<std::int32_t>(r), first_broken(at), beam.length});
            }
            sound = sound && fine;
            next += steps;
        }
    }
    return broken;
}

std::vector<BrokenNumber> take_selected(const Requests& requests, const Requests& drawing,
                                        std::span<const std::int64_t> cu_tokens,
                                        std::span<const std::int64_t> tokens,
                                        std::span<const double> logprobs, std::int64_t steps) {
    std::unordered_map<const Beams*, std::int32_t> places;
    for (const Beams* request : drawing) {
        places.emplace(request, static_cast<std::int32_t>(places.size()));
    }
    expect(places.size() == drawing.size(), "a request draws twice");
    std::size_t found = 0, candidates = 0;
    for (const Beams* request : requests) {
        const bool draws = places.contains(request);
        found += draws;
        for (const Beam& beam : request->candidates()) {
            expect(++candidates < cu_tokens.size(), "there are more candidates");
            expect(!draws || !beam.grows() ||
                       cu_tokens[candidates] - cu_tokens[candidates - 1] >= steps,
                   "more tokens were drawn than chunks have");
        }
    }
    expect(found == drawing.size(), "who draws is not among those that are selected from");
    expect(steps >= 0 && candidates + 1 == cu_tokens.size() &&
               cu_tokens.back() <= std::ssize(tokens) && tokens.size() == logprobs.size(),
           "tokens and log-probs must be [T]");
    std::vector<BrokenNumber> broken;
    std::vector<float> chunk(static_cast<std::size_t>(steps));
    std::size_t candidate = 0;
    for (Beams* request : requests) {
        const auto place = places.find(request);
        bool sound = true;
        for (std::size_t c = 0; c < request->candidates().size(); ++c) {
            ++candidate;
            const Beam& beam = request->candidates()[c];
            if (place == places.end() || !beam.grows()) continue;
            const auto begin = static_cast<std::size_t>(cu_tokens[candidate] - steps);
            std::ranges::transform(logprobs.subspan(begin, chunk.size()), chunk.begin(),
                                   [](double value) { return static_cast<float>(value); });
            const bool fine = request->take(c, tokens.subspan(begin, chunk.size()), chunk);
            if (!fine && sound) broken.push_back({place->second, -1, beam.length});
            sound = sound && fine;
        }
    }
    return broken;
}

void release_finished(const Requests& requests, PageManager& manager, int model) {
    Int32s released, paused, lengths;
    for (Beams* request : requests) {
        request->collect_finished(model, released);
        request->collect_paused(model, paused, lengths);
    }
    manager.release(released);
    if (!paused.empty()) manager.truncate(paused, lengths);
}

std::vector<BrokenNumber> take_scores(const Requests& requests,
                                      std::span<const std::int64_t> cu_tokens,
                                      std::span<const double> token_scores,
                                      std::span<const double> scores,
                                      std::span<const std::int64_t> broken) {
    std::size_t candidates = 0;
    for (const Beams* request : requests) {
        for (const Beam& beam : request->candidates()) {
            expect(++candidates < cu_tokens.size() &&
                       cu_tokens[candidates - 1] + beam.length - beam.inherited <=
                           cu_tokens[candidates],
                   "scores must be those of the new tokens");
        }
    }
    expect(scores.size() == candidates && broken.size() == candidates &&
               std::ssize(token_scores) >= cu_tokens[candidates],
           "scores must be [T], [C] and [C]");
    std::vector<BrokenNumber> found;
    std::size_t candidate = 0;
    for (std::size_t r = 0; r < requests.size(); ++r) {
        bool sound = true;
        for (std::size_t c = 0; c < requests[r]->candidates().size(); ++c, ++candidate) {
            const Beam& beam = requests[r]->candidates()[c];
            const auto begin = static_cast<std::size_t>(cu_tokens[candidate]);
            if (broken[candidate] >= 0 && sound) {
                const auto offset = static_cast<std::int32_t>(broken[candidate] - cu_tokens[candidate]);
                found.push_back({static_cast<std::int32_t>(r), broken[candidate],
                                 beam.inherited + offset});
                sound = false;
            }
            const auto count = static_cast<std::size_t>(beam.length - beam.inherited);
            requests[r]->set_scores(c, token_scores.subspan(begin, count), scores[candidate]);
        }
    }
    return found;
}

std::vector<std::vector<PageCopy>> end_rounds(const Requests& requests,
                                              std::span<const std::int64_t> kept,
                                              const Beams::Managers& managers) {
    std::vector<std::vector<PageCopy>> copies(managers.size());
    if (requests.empty()) return copies;
    expect(kept.size() % requests.size() == 0, "kept must be [R, width]");
    const std::size_t width = kept.size() / requests.size();
    for (std::size_t r = 0; r < requests.size(); ++r) {
        const auto row = kept.subspan(r * width, width);
        const auto own =
            requests[r]->end_round({row.begin(), std::ranges::find(row, -1)}, managers);
        for (std::size_t m = 0; m < own.size(); ++m) {
            copies[m].insert(copies[m].end(), own[m].begin(), own[m].end());
        }
    }
    return copies;
}

void keep_all(const Requests& requests, const Beams::Managers& managers) {
    for (Beams* request : requests) {
        Int32s all(request->candidates().size());
        for (std::size_t c = 0; c < all.size(); ++c) all[c] = static_cast<std::int32_t>(c);
        request->end_round(std::move(all), managers);
    }
}

Int64s growing(const Requests& requests) {
    Int64s rows;
    for (const Beams* request : requests) {
        rows.push_back(std::ranges::count_if(request->candidates(),
                                             [](const Beam& beam) { return beam.grows(); }));
    }
    return rows;
}

Int64s round_rows(const Requests& requests) {
    Int64s rows;
    rows.reserve(requests.size());
    for (const Beams* request : requests) rows.push_back(request->rows());
    return rows;
}

Int64s round_pages(const Beams& request, std::span<const std::int64_t> page_sizes) {
    Int64s pages;
    pages.reserve(page_sizes.size());
    for (int m = 0; m < static_cast<int>(page_sizes.size()); ++m) {
        const bool runs = m == 0 || request.settings().uses_guides;
        pages.push_back(runs ? request.round_pages(m, page_sizes[m]) : 0);
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
