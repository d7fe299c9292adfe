#include "beams.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

namespace w2s {

namespace {

// A step of decoding brings no more tokens than this, see w2s_fast/search/search.py: a longer block
// would stay empty where responses end early.
constexpr std::int32_t kMostInBlock = 16;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

bool contains(const std::vector<std::int32_t>& ids, std::int32_t token) {
    return std::ranges::find(ids, token) != ids.end();
}

std::int32_t block_size_of(const SearchSettings& settings) {
    for (const auto* by_round : {&settings.widths, &settings.successors, &settings.chunks}) {
        if (by_round->empty() || std::ranges::min(*by_round) < 1 || settings.first_candidates < 1) {
            throw std::invalid_argument("a round has candidates, keeps some, and they grow");
        }
    }
    return std::min(std::ranges::max(settings.chunks), kMostInBlock);
}

}  // namespace

Beams::Beams(SearchSettings settings, std::vector<std::int32_t> prompt,
             const std::vector<PromptEnd>& guide_prompts)
    : settings_(std::move(settings)),
      prompt_(std::move(prompt)),
      block_size_(block_size_of(settings_)) {
    if (prompt_.empty()) throw std::invalid_argument("a prompt has at least one token");
    prompt_ends_.push_back({static_cast<std::int32_t>(prompt_.size()), prompt_.back()});
    prompt_ends_.insert(prompt_ends_.end(), guide_prompts.begin(), guide_prompts.end());
    forked_.resize(prompt_ends_.size());
}

// ---- blocks ----

std::int32_t Beams::new_block(std::int32_t before) {
    std::int32_t block = free_block_;
    if (block == Beam::kNone) {
        block = static_cast<std::int32_t>(blocks_.size());
        const std::size_t size = (blocks_.size() + 1) * static_cast<std::size_t>(block_size_);
        tokens_.resize(size);
        logprobs_.resize(size);
        if (settings_.uses_guides) scores_.resize(size);
        blocks_.push_back({});
    } else {
        free_block_ = blocks_[block].free_after;
        ask_for(free_block_);  // it will be the next one
    }
    blocks_[block] = {before, 1, 0, Beam::kNone};
    return block;
}

// Brings what take will write to into the cache: in a long search, each block lies elsewhere.
void Beams::ask_for(std::int32_t block) const {
    if (block == Beam::kNone) return;
    const auto at = std::int64_t{block} * block_size_;
    __builtin_prefetch(&blocks_[block]);
    __builtin_prefetch(&tokens_[at]);
    __builtin_prefetch(&logprobs_[at]);
}

// A new block with the first tokens of another.
std::int32_t Beams::part_of(std::int32_t block, std::int32_t count) {
    const std::int32_t part = new_block(blocks_[block].before);
    hold_block(blocks_[part].before);
    blocks_[part].count = count;
    const auto from = std::int64_t{block} * block_size_, to = std::int64_t{part} * block_size_;
    std::copy_n(tokens_.begin() + from, count, tokens_.begin() + to);
    std::copy_n(logprobs_.begin() + from, count, logprobs_.begin() + to);
    if (settings_.uses_guides) std::copy_n(scores_.begin() + from, count, scores_.begin() + to);
    return part;
}

void Beams::hold_block(std::int32_t block) {
    if (block != Beam::kNone) ++blocks_[block].references;
}

void Beams::drop_block(std::int32_t block) {
    while (block != Beam::kNone && --blocks_[block].references == 0) {
        blocks_[block].free_after = std::exchange(free_block_, block);
        block = blocks_[block].before;
    }
}

void Beams::drop(const std::vector<Beam>& beams) {
    for (const Beam& beam : beams) drop_block(beam.block);
}

bool Beams::same_tokens(const Beam& a, const Beam& b) const {
    if (a.length != b.length || a.hash != b.hash) return false;
    if (a.block == b.block) return true;
    std::vector<std::int32_t> left(static_cast<std::size_t>(a.length)), right(left.size());
    copy_tokens(a, 0, left.data());
    copy_tokens(b, 0, right.data());
    return left == right;
}

// ---- the state of the search ----

bool Beams::done() const {
    return !open_ && !kept_.empty() &&
           std::ranges::all_of(kept_, [](const Beam& beam) { return beam.finished(); });
}

std::int32_t Beams::tokens_left() const {
    std::int32_t left = INT32_MAX;
    for (const Beam& beam : candidates_) {
        if (!beam.grows()) continue;
        const std::int32_t end =
            std::min(beam.inherited + settings_.chunk_in(round_), settings_.max_new_tokens);
        left = std::min(left, end - beam.length);
    }
    return left == INT32_MAX ? 0 : left;
}

std::int32_t Beams::grown() const {
    std::int32_t grown = INT32_MAX;
    for (const Beam& beam : candidates_) {
        if (beam.grows()) grown = std::min(grown, beam.length);
    }
    return grown == INT32_MAX ? 0 : grown;
}

std::vector<std::int32_t> Beams::agreed() const {
    const std::vector<Beam>& beams = open_ ? candidates_ : kept_;
    if (beams.empty()) return {};
    const Beam& first = beams.front();
    std::int32_t agreed = first.length;
    std::vector<std::int32_t> left, right;
    bool best_passed = false;
    for (const Beam& other : beams) {
        // No finished beam of a beam search passes the best one, which is the first.
        if (settings_.beam_search && other.finished() && std::exchange(best_passed, true)) break;
        // Back to where both have the same block: from there on they are one.
        std::int32_t a = first.block, b = other.block;
        std::int32_t a_end = first.length, b_end = other.length;
        while (a != b) {
            if (a_end >= b_end) {
                a_end -= blocks_[a].count;
                a = blocks_[a].before;
            } else {
                b_end -= blocks_[b].count;
                b = blocks_[b].before;
            }
        }
        const std::int32_t shared = std::min(a_end, b_end);
        left.resize(static_cast<std::size_t>(first.length - shared));
        right.resize(static_cast<std::size_t>(other.length - shared));
        copy_tokens(first, shared, left.data());
        copy_tokens(other, shared, right.data());
        const auto differ = std::ranges::mismatch(left, right).in1;
        agreed = std::min(agreed, shared + static_cast<std::int32_t>(differ - left.begin()));
    }
    std::vector<std::int32_t> tokens(static_cast<std::size_t>(first.length));
    copy_tokens(first, 0, tokens.data());
    tokens.resize(static_cast<std::size_t>(agreed));
    return tokens;
}

std::int32_t Beams::first_alike(std::size_t beam) const {
    std::size_t first = 0;
    while (!same_tokens(kept_[first], kept_[beam])) ++first;
    return static_cast<std::int32_t>(first);
}

void Beams::append_new(const Beam& candidate, std::vector<std::int32_t>& tokens,
                       std::vector<float>& logprobs) const {
    const auto count = static_cast<std::size_t>(candidate.length - candidate.inherited);
    tokens.resize(tokens.size() + count);
    logprobs.resize(logprobs.size() + count);
    copy_tokens(candidate, candidate.inherited, tokens.data() + tokens.size() - count);
    copy_elements(logprobs_, candidate.block, candidate.length, candidate.inherited,
                  logprobs.data() + logprobs.size() - count);
}

BeamContents Beams::contents(const Beam& beam, const std::int32_t* slots, bool scored) const {
    BeamContents found{beam.parent, {},          {}, {}, beam.total,
                       beam.extra,  beam.finish, {}, beam.ending};
    const auto length = static_cast<std::size_t>(beam.length);
    found.tokens.resize(length);
    found.logprobs.resize(length);
    copy_tokens(beam, 0, found.tokens.data());
    copy_elements(logprobs_, beam.block, beam.length, 0, found.logprobs.data());
    if (settings_.uses_guides) {
        found.token_scores.resize(length);
        copy_elements(scores_, beam.block, beam.length, 0, found.token_scores.data());
        if (!scored) found.token_scores.resize(static_cast<std::size_t>(beam.inherited));
    }
    if (slots != nullptr) found.slots.assign(slots, slots + models());
    return found;
}

BeamContents Beams::contents(bool of_kept, std::size_t beam) const {
    const std::vector<std::int32_t>& slots = of_kept ? kept_slots_ : slots_;
    return contents((of_kept ? kept_ : candidates_).at(beam),
                    slots.data() + beam * prompt_ends_.size(), of_kept);
}

std::vector<RoundContents> Beams::trace(std::size_t first) const {
    std::vector<RoundContents> rounds;
    for (std::size_t i = first; i < recorded_.size(); ++i) {
        const Recorded& recorded = recorded_[i];
        RoundContents& round = rounds.emplace_back();
        round.kept = recorded.kept;
        for (const Beam& beam : recorded.candidates) {
            round.candidates.push_back(contents(beam, nullptr, true));
        }
    }
    return rounds;
}

std::int64_t Beams::rows() const {
    // It may fill its width again from one beam.
    if (settings_.beam_search) return settings_.width_in(1);
    if (from_prompt()) return settings_.first_candidates;
    const auto alive = std::ranges::count_if(kept_, [](const Beam& b) { return !b.finished(); });
    return std::int64_t{alive} * settings_.successors_in(round_ahead());
}

// P + W h + W K L tokens' worth: the full pages that all rows share, the other full pages of each
// hypothesis, and those of each candidate behind them.
std::int64_t Beams::round_pages(int model, std::int64_t page_size) const {
    // The base forks when the last token of the text has been run, the guides before that; both run
    // the chunk's tokens but the last.
    const std::int64_t prompt = prompt_ends_[model].length - (model != 0);
    // Where a candidate may be kept more than once, each copy ends in a page of its own. Losers give
    // theirs back first; what the width has beyond the rows are more copies than losers.
    const std::int64_t width = settings_.copies ? settings_.width_in(round_ahead()) : 0;
    std::int64_t hypotheses = 0, shortest = INT64_MAX, histories = 0, ends = 0;
    const auto add = [&](std::int64_t tokens) {
        const std::int64_t history = prompt + tokens;
        const std::int64_t chunk = std::min<std::int64_t>(settings_.chunk_in(round_ahead()),
                                                          settings_.max_new_tokens - tokens);
        const std::int64_t end = ceil_div(history % page_size + chunk - (model == 0), page_size);
        ++hypotheses;
        shortest = std::min(shortest, history);
        histories += history / page_size;
        ends += std::max<std::int64_t>(end, settings_.copies);
    };
    if (from_prompt()) {
        add(0);
    } else {
        for (const Beam& beam : kept_) {
            if (!beam.finished()) add(beam.length);
        }
    }
    if (hypotheses == 0) return 0;
    const std::int64_t shared = from_prompt() ? 0 : shared_;
    const std::int64_t common = std::min(prompt + shared, shortest) / page_size;
    // All have as many children; in a beam search, where all are of one length, there are as many as
    // rows, whoever has them.
    return common + histories - hypotheses * common + ends * rows() / hypotheses +
           std::max<std::int64_t>(0, width - rows());
}

// ---- what a round does ----

void Beams::add_child(std::size_t parent) {
    Beam child = kept_[parent];
    child.parent = round_ == 1 ? Beam::kNone : static_cast<std::int32_t>(parent);
    child.inherited = child.length;
    child.before_token = child.last_token;
    hold_block(child.block);
    candidates_.push_back(child);
}

void Beams::begin_round() {
    if (open_) throw std::logic_error("a round is under way");
    if (kept_.empty()) {
        kept_.emplace_back();
        kept_slots_.assign(prompt_ends_.size(), kNoSlot);
    }
    candidates_.clear();
    first_child_.assign(1, 0);
    const std::int32_t successors = settings_.successors_in(++round_);
    for (std::size_t p = 0; p < kept_.size(); ++p) {
        const bool held = kept_[p].finished() && settings_.hold;
        // Which children a beam has, a beam search knows when its continuations are there.
        const std::int32_t count = settings_.beam_search || held ? 1
                                   : round_ == 1                 ? settings_.first_candidates
                                                                 : successors;
        for (std::int32_t i = 0; i < count; ++i) add_child(p);
        first_child_.push_back(static_cast<std::int32_t>(candidates_.size()));
    }
    slots_.assign(candidates_.size() * prompt_ends_.size(), kNoSlot);
    forked_.assign(prompt_ends_.size(), 0);
    open_ = true;
}

void Beams::set_kept_slots(int model, std::span<const std::int32_t> slots) {
    auto next = slots.begin();
    for (std::size_t i = 0; i < kept_.size(); ++i) {
        if (kept_[i].finished()) continue;
        if (next == slots.end()) throw std::invalid_argument("a slot for each beam that goes on");
        kept_slots_[i * prompt_ends_.size() + model] = *next++;
    }
}

std::size_t Beams::give_slots(int model, const std::int32_t* next) {
    const std::int32_t* const begin = next;
    const std::size_t models = prompt_ends_.size();
    for (std::size_t p = 0; p < kept_.size(); ++p) {
        if (kept_[p].finished()) continue;
        for (std::int32_t c = first_child_[p]; c < first_child_[p + 1]; ++c) {
            slots_[c * models + model] = c == first_child_[p]
                                             ? std::exchange(kept_slots_[p * models + model], kNoSlot)
                                             : *next++;
        }
    }
    return static_cast<std::size_t>(next - begin);
}

std::size_t Beams::branch(std::span<const Child> children, const std::int32_t* next) {
    const std::int32_t* const begin = next;
    const std::size_t models = prompt_ends_.size();
    drop(candidates_);
    candidates_.clear();
    first_child_.assign(1, 0);
    slots_.assign(children.size() * models, kNoSlot);
    auto child = children.begin();
    for (std::size_t p = 0; p < kept_.size(); ++p) {
        for (; child != children.end() && child->parent == static_cast<std::int32_t>(p); ++child) {
            const std::size_t c = candidates_.size();
            add_child(p);
            candidates_[c].total = child->total;
            if (child->token != Beam::kNone) {
                const std::int64_t token = child->token;
                take(c, {&token, 1}, {&child->logprob, 1});
            }
            if (child->ending != Beam::kNone) end_text(c, child->length, child->ending);
            if (!child->goes_on) continue;
            std::int32_t& own = kept_slots_[p * models];
            slots_[c * models] = own != kNoSlot ? std::exchange(own, kNoSlot) : *next++;
        }
        first_child_.push_back(static_cast<std::int32_t>(candidates_.size()));
    }
    return static_cast<std::size_t>(next - begin);
}

void Beams::collect_childless(std::span<const std::int32_t> branches,
                              std::vector<std::int32_t>& released) {
    for (std::size_t p = 0; p < kept_.size(); ++p) {
        std::int32_t& slot = kept_slots_[p * prompt_ends_.size()];
        if (branches[p] == 0 && slot != kNoSlot) released.push_back(std::exchange(slot, kNoSlot));
    }
}

Finish Beams::finish_of(std::int32_t token, std::int32_t length) const {
    if (contains(settings_.eos_ids, token)) return Finish::eos;
    if (contains(settings_.stop_ids, token)) return Finish::stop;
    return length == settings_.max_new_tokens ? Finish::length : Finish::no;
}

bool Beams::ends_too_soon(std::int32_t token, std::int32_t length) const {
    return length <= settings_.min_new_tokens &&
           (contains(settings_.eos_ids, token) || contains(settings_.stop_ids, token));
}

bool Beams::take(std::size_t candidate, std::span<const std::int64_t> tokens,
                 std::span<const float> logprobs, std::span<const double> scores) {
    Beam& beam = candidates_[candidate];
    for (std::size_t i = 0; i < tokens.size() && beam.grows(); ++i) {
        if (!std::isfinite(logprobs[i]) || (!scores.empty() && !std::isfinite(scores[i]))) {
            return false;
        }
        const auto token = static_cast<std::int32_t>(tokens[i]);
        // What is inherited ends in a block that siblings have, too.
        if (beam.length == beam.inherited || blocks_[beam.block].count == block_size_) {
            beam.block = new_block(beam.block);
        }
        const std::int64_t at = std::int64_t{beam.block} * block_size_ + blocks_[beam.block].count++;
        tokens_[at] = token;
        logprobs_[at] = logprobs[i];
        if (!scores.empty()) {
            scores_[at] = scores[i];
            beam.total += scores[i];
            ++scored_;
        }
        beam.last_token = token;
        beam.hash = hash_with(beam.hash, token);
        beam.finish = finish_of(token, ++beam.length);
        ++sampled_;
    }
    return true;
}

void Beams::take_text(std::size_t candidate, std::span<const std::int64_t> tokens,
                      std::int64_t sampled, bool ends) {
    Beam& beam = candidates_.at(candidate);
    if (!beam.grows() || sampled < 0) throw std::invalid_argument("only who grows gets a text");
    const std::int64_t before = sampled_;
    take(candidate, tokens, std::vector<float>(tokens.size()));
    sampled_ = before + sampled;
    if (ends && !beam.finished()) beam.finish = Finish::length;
}

void Beams::set_scores(std::size_t candidate, std::span<const double> token_scores, double total) {
    Beam& beam = candidates_[candidate];
    beam.total = total;
    scored_ += std::ssize(token_scores);
    auto next = token_scores.end();
    std::int32_t block = beam.block;
    while (next != token_scores.begin()) {
        double* const scores = scores_.data() + std::int64_t{block} * block_size_;
        for (std::int32_t i = blocks_[block].count; i > 0;) scores[--i] = *--next;
        block = blocks_[block].before;
    }
}

void Beams::set_extras(std::span<const double> extras) {
    if (extras.size() != candidates_.size()) throw std::invalid_argument("extras must be [C]");
    for (std::size_t c = 0; c < extras.size(); ++c) candidates_[c].extra = extras[c];
}

std::vector<std::vector<PageCopy>> Beams::end_round(std::vector<std::int32_t> winners,
                                                    const Managers& managers) {
    const std::size_t models = prompt_ends_.size(), width = winners.size();
    std::vector<std::int32_t> common(width * width);
    const std::size_t parents = kept_.size();
    for (std::size_t i = 0; i < width; ++i) {
        const Beam& a = candidates_.at(static_cast<std::size_t>(winners[i]));
        for (std::size_t j = 0; j < width; ++j) {
            const Beam& b = candidates_.at(static_cast<std::size_t>(winners[j]));
            // Beams of the same parent share what they inherited, others what their parents did, and
            // copies of a candidate all that stands in the KV.
            common[i * width + j] = i == j                   ? a.length
                                    : winners[i] == winners[j] ? a.length - 1
                                    : a.parent == b.parent ? a.inherited
                                                           : common_[a.parent * parents + b.parent];
        }
    }
    std::vector<bool> goes_on(candidates_.size(), false);
    std::map<std::size_t, std::vector<std::size_t>> copies;  // of a winner, among the kept
    std::vector<Beam> kept;
    std::vector<std::int32_t> kept_slots(width * models, kNoSlot);
    for (std::size_t i = 0; i < width; ++i) {
        const auto winner = static_cast<std::size_t>(winners[i]);
        kept.push_back(candidates_[winner]);
        kept.back().paused = false;
        hold_block(candidates_[winner].block);
        if (candidates_[winner].finished()) continue;
        if (goes_on[winner]) {
            copies[winner].push_back(i);
            continue;
        }
        goes_on[winner] = true;
        std::copy_n(slots_.begin() + winner * models, models, kept_slots.begin() + i * models);
    }
    std::vector<std::int32_t> released;
    for (std::size_t m = 0; m < models; ++m) {
        released.clear();
        for (std::size_t c = 0; c < candidates_.size(); ++c) {
            const std::int32_t slot = slots_[c * models + m];
            if (slot != kNoSlot && !goes_on[c]) released.push_back(slot);
        }
        if (!released.empty()) managers.at(m)->release(released);
    }
    // There is room: at most as many copies as losers, or else what round_pages adds for them.
    std::vector<std::vector<PageCopy>> to_copy(managers.size());
    // Without any, no model of this process has the beams.
    for (std::size_t m = 0; m < std::min(models, managers.size()) && !copies.empty(); ++m) {
        std::vector<std::int32_t> parents, counts;
        for (const auto& [winner, own] : copies) {
            parents.push_back(slots_[winner * models + m]);
            counts.push_back(static_cast<std::int32_t>(own.size()));
        }
        ForkResult forks = managers.at(m)->fork(parents, counts);
        auto next = forks.children.begin();
        for (const auto& [winner, own] : copies) {
            for (const std::size_t i : own) kept_slots[i * models + m] = *next++;
        }
        to_copy[m] = std::move(forks.copies);
    }
    judged_ += std::ssize(candidates_);
    chosen_ += std::ssize(kept);
    if (settings_.trace) {
        recorded_.push_back({candidates_, winners});  // it takes over their blocks
    } else {
        drop(candidates_);
    }
    drop(kept_);
    kept_ = std::move(kept);
    kept_slots_ = std::move(kept_slots);
    common_ = std::move(common);
    candidates_.clear();
    slots_.clear();
    open_ = false;

    shared_ = INT32_MAX;
    bool any = false;
    for (std::size_t i = 0; i < width; ++i) {
        for (std::size_t j = 0; j < width; ++j) {
            if (kept_[i].finished() || kept_[j].finished()) continue;
            shared_ = std::min(shared_, common_[i * width + j]);
            any = true;
        }
    }
    if (!any) shared_ = 0;
    return to_copy;
}

void Beams::collect_finished(int model, std::vector<std::int32_t>& released) {
    for (std::size_t c = 0; c < candidates_.size(); ++c) {
        std::int32_t& slot = slots_[c * prompt_ends_.size() + model];
        if (slot == kNoSlot || !candidates_[c].finished()) continue;
        released.push_back(std::exchange(slot, kNoSlot));
    }
}

void Beams::collect_paused(int model, std::vector<std::int32_t>& slots,
                           std::vector<std::int32_t>& lengths) const {
    for (std::size_t c = 0; c < candidates_.size(); ++c) {
        const std::int32_t slot = slots_[c * prompt_ends_.size() + model];
        if (slot == kNoSlot || !candidates_[c].paused) continue;
        slots.push_back(slot);
        lengths.push_back(prompt_ends_[model].length + candidates_[c].length - 1);
    }
}

// ---- interruptions ----

void Beams::collect_held(int model, std::vector<std::int32_t>& out) {
    const std::size_t models = prompt_ends_.size();
    if (aside_) std::ranges::fill(kept_slots_, kNoSlot);
    if (!holds()) return;
    for (const std::vector<std::int32_t>* slots : {&kept_slots_, &slots_}) {
        for (std::size_t i = static_cast<std::size_t>(model); i < slots->size(); i += models) {
            if ((*slots)[i] != kNoSlot) out.push_back((*slots)[i]);
        }
    }
}

void Beams::release_all(const Managers& managers) {
    std::vector<std::int32_t> held;
    for (int m = 0; m < models(); ++m) {
        held.clear();
        collect_held(m, held);
        if (!held.empty()) managers.at(static_cast<std::size_t>(m))->release(held);
    }
    std::ranges::fill(kept_slots_, kNoSlot);
    std::ranges::fill(slots_, kNoSlot);
}

void Beams::set_aside(const Managers& managers) {
    release_all(managers);
    share_less();
    aside_ = true;
}

void Beams::share_less() {
    const std::size_t kept = kept_.size();
    for (std::size_t i = 0; i < common_.size(); ++i) {
        if (i % kept != i / kept) common_[i] = std::min(common_[i], shared_);
    }
}

void Beams::start_over(const Managers& managers) {
    release_all(managers);
    drop(candidates_);
    candidates_.clear();
    slots_.clear();
    if (open_ && --round_ == 0) {
        drop(kept_);
        kept_.clear();
    }
    share_less();
    open_ = false;
    aside_ = !kept_.empty();
}

void Beams::abort(const Managers& managers) {
    start_over(managers);
    aside_ = false;
}

}  // namespace w2s
