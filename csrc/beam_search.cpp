#include "beam_search.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <utility>

namespace w2s {

namespace {

bool goes_on(const Beam& beam) { return !beam.finished(); }

// Where each request's rows of continuations begin [R + 1], and how many a row has.
struct Rows {
    std::vector<std::size_t> first;
    std::size_t k = 0;
};

Rows rows_of(const Requests& requests, std::size_t size) {
    Rows rows{{0}};
    for (const Beams* request : requests) {
        if (!request->open() || !request->settings().beam_search) {
            throw std::invalid_argument("a beam search goes on in a round of its own");
        }
        const auto own = std::ranges::count_if(request->kept(), goes_on);
        rows.first.push_back(rows.first.back() + static_cast<std::size_t>(own));
    }
    const std::size_t all = rows.first.back();
    if (all > 0) rows.k = size / all;
    if (rows.k * all != size || (all > 0 && rows.k == 0)) {
        throw std::invalid_argument("continuations must be [rows, k]");
    }
    return rows;
}

bool broken(const Beams& request, const Continuations& found, const Rows& rows, std::size_t r) {
    for (std::size_t row = rows.first[r]; row < rows.first[r + 1]; ++row) {
        if (!std::isfinite(found.logprobs[row * rows.k])) return true;
    }
    if (rows.first[r] == rows.first[r + 1]) return false;
    const std::int32_t length = std::ranges::find_if(request.kept(), goes_on)->length + 1;
    for (std::size_t i = rows.first[r] * rows.k; i < rows.first[r + 1] * rows.k; ++i) {
        if (std::isfinite(found.logprobs[i]) && !request.ends_too_soon(found.tokens[i], length)) {
            return false;
        }
    }
    return true;
}

Rows checked_rows(const Requests& requests, const Continuations& found) {
    if (found.tokens.size() != found.logprobs.size()) {
        throw std::invalid_argument("as many tokens as log-probs");
    }
    return rows_of(requests, found.logprobs.size());
}

// A log-prob of so many tokens, as finished beams are ranked.
double ranked(double total, std::int32_t length, const BeamSearch& rule) {
    if (total == 0.0) return 0.0;  // whatever the power is, which may be 0 or infinite
    return total / std::pow(static_cast<double>(length), rule.length_penalty);
}

void sort_by_total(std::vector<Child>& children) {
    std::ranges::stable_sort(children, std::ranges::greater{}, &Child::total);
}

struct Decision {
    std::vector<Child> children;         // parent by parent
    std::vector<std::int32_t> branches;  // of each kept beam, how many of them go on
    std::vector<std::int32_t> kept;      // indices of children
};

// All continuations of one request, best first; and its finished beams.
struct Candidates {
    std::vector<Child> continued, finished;
    std::int32_t length = 0;  // tokens of a continuation
};

Candidates collect(const Beams& request, const Continuations& found, std::size_t k,
                   std::size_t row) {
    Candidates all;
    for (std::size_t p = 0; p < request.kept().size(); ++p) {
        const Beam& beam = request.kept()[p];
        const auto parent = static_cast<std::int32_t>(p);
        if (beam.finished()) {
            all.finished.push_back({parent, Beam::kNone, 0.0F, beam.total, false});
            continue;
        }
        all.length = beam.length + 1;
        for (std::size_t i = row * k; i < (row + 1) * k; ++i) {
            // The base forbids it, and those behind.
            if (!std::isfinite(found.logprobs[i])) break;
            if (request.ends_too_soon(found.tokens[i], all.length)) continue;
            all.continued.push_back({parent, found.tokens[i], found.logprobs[i],
                                     beam.total + double{found.logprobs[i]}, false});
        }
        ++row;
    }
    sort_by_total(all.continued);
    return all;
}

// Whether a full set of finished beams is enough, with this one the best of those that go on.
bool suffices(const SearchSettings& settings, const std::vector<Child>& finished, double best,
              std::int32_t length) {
    const BeamSearch& rule = *settings.beam_search;
    // One beam is greedy decoding, which ends with its first end.
    if (settings.width_in(1) == 1 || rule.early_stopping == EarlyStopping::yes) return true;
    const bool longest = rule.early_stopping == EarlyStopping::never && rule.length_penalty > 0;
    const double hope = ranked(best, longest ? settings.max_new_tokens : length, rule);
    return !(hope > finished.back().total);
}

// `ended`: of this request.
Decision decide(const Beams& request, const Continuations& found, std::size_t k, std::size_t row,
                std::span<const EndedText> ended) {
    const SearchSettings& settings = request.settings();
    const auto width = static_cast<std::size_t>(settings.width_in(1));
    auto [continued, finished, length] = collect(request, found, k, row);
    for (const EndedText& text : ended) {
        Child& child = continued.at(static_cast<std::size_t>(text.rank));
        child.length = text.length;
        child.ending = text.ending;
    }
    std::vector<Child> chosen;
    for (std::size_t i = 0; i < continued.size(); ++i) {
        Child& child = continued[i];
        if (child.ending == Beam::kNone &&
            request.finish_of(child.token, length) == Finish::no) {
            if (chosen.size() == width) continue;
            child.goes_on = true;
            chosen.push_back(child);
        } else if (i < width) {
            child.total = ranked(child.total, length, *settings.beam_search);
            finished.push_back(child);
        }
    }
    sort_by_total(finished);
    if (finished.size() > width) finished.resize(width);
    const bool full = finished.size() == width;
    if (full && !chosen.empty() && suffices(settings, finished, chosen.front().total, length)) {
        chosen.clear();
    }
    chosen.insert(chosen.end(), finished.begin(), finished.end());

    Decision decision;
    std::vector<std::size_t> order(chosen.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::ranges::stable_sort(order, {}, [&](std::size_t i) { return chosen[i].parent; });
    decision.branches.assign(request.kept().size(), 0);
    decision.kept.resize(chosen.size());
    for (const std::size_t i : order) {
        decision.kept[i] = static_cast<std::int32_t>(decision.children.size());
        decision.children.push_back(chosen[i]);
        decision.branches[static_cast<std::size_t>(chosen[i].parent)] += chosen[i].goes_on;
    }
    return decision;
}

}  // namespace

std::vector<BrokenNumber> broken_continuations(const Requests& requests,
                                               const Continuations& found) {
    const Rows rows = checked_rows(requests, found);
    std::vector<BrokenNumber> all;
    for (std::size_t r = 0; r < requests.size(); ++r) {
        if (!broken(*requests[r], found, rows, r)) continue;
        // All beams that go on have the same length.
        const Beam& beam = *std::ranges::find_if(requests[r]->kept(), goes_on);
        all.push_back({static_cast<std::int32_t>(r), -1, beam.length});
    }
    return all;
}

std::vector<RankedContinuation> rank_continuations(const Requests& requests,
                                                   const Continuations& found,
                                                   std::size_t request) {
    const Rows rows = checked_rows(requests, found);
    std::vector<RankedContinuation> ranked;
    const Beams& beams = *requests.at(request);
    if (broken(beams, found, rows, request)) return ranked;
    const auto [continued, _, length] = collect(beams, found, rows.k, rows.first[request]);
    for (const Child& child : continued) {
        const Finish finish = beams.finish_of(child.token, length);
        const bool ends = finish == Finish::eos || finish == Finish::stop;
        ranked.push_back({child.parent, child.token, ends});
    }
    return ranked;
}

std::vector<PageCopy> advance_beams(const Requests& requests, const Continuations& found,
                                    PageManager& base, std::span<const EndedText> ended) {
    const Rows rows = checked_rows(requests, found);
    Requests sound;
    std::vector<Decision> decisions;
    for (std::size_t r = 0; r < requests.size(); ++r) {
        if (broken(*requests[r], found, rows, r)) continue;
        sound.push_back(requests[r]);
        const auto own = std::ranges::equal_range(ended, static_cast<std::int32_t>(r), {},
                                                  &EndedText::request);
        decisions.push_back(decide(*requests[r], found, rows.k, rows.first[r], own));
    }
    // With these slots back, the forks need no more than was promised.
    Int32s released, slots, counts;
    for (std::size_t i = 0; i < sound.size(); ++i) {
        const std::vector<std::int32_t>& branches = decisions[i].branches;
        sound[i]->collect_childless(branches, released);
        for (std::size_t p = 0; p < branches.size(); ++p) {
            if (branches[p] == 0) continue;
            slots.push_back(sound[i]->kept_slot(p, 0));
            counts.push_back(branches[p] - 1);
        }
    }
    base.release(released);
    ForkResult forks = base.fork(slots, counts);
    const std::int32_t* next = forks.children.data();
    for (std::size_t i = 0; i < sound.size(); ++i) {
        next += sound[i]->branch(decisions[i].children, next);
        sound[i]->end_round(std::move(decisions[i].kept), {&base});
    }
    return std::move(forks.copies);
}

}  // namespace w2s
