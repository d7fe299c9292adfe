// The beams of one request: what its search holds between two rounds, and within one.
//
// It knows tokens, scores and slots, and nothing of models; the tokens of many requests at once are
// laid out for their passes in rounds.h.
//
// Terms
//   beam        a hypothesis (kept) or a candidate, with a slot in each model that has run it
//   model       0 is the base; 1 + 2 g and 2 + 2 g are the tuned and the untuned model of guide g
//   paused      said of a candidate whose chunk has ended before its full length: it waits for the
//               selection, and goes on from there like any other
//   growing     said of a candidate that is neither finished nor paused; all of a request have got
//               the same number of tokens in a round
//   block       tokens of a beam, stored once; it points to the block before it, and siblings point
//               to the same one. So a candidate costs its own tokens, however long the response is.
//
// Between two rounds `kept` are the hypotheses, best first, and there are no candidates. Within a
// round they are the candidates' parents; in round 1 the only parent is the root, which has no
// tokens. Every model's KV holds the prompt and a beam's tokens without the last one; a finished
// beam holds no slot, since nothing will be appended to it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "page_manager.h"

namespace w2s {

enum class Finish : std::int8_t { no, eos, stop, length };

// When a beam search ends before its length does; see w2s_fast/params.py.
enum class EarlyStopping : std::int8_t { no, yes, never };

struct BeamSearch {
    double length_penalty;
    EarlyStopping early_stopping;
};

// What a request asks for; see w2s_fast/params.py for the meaning of each.
struct SearchSettings {
    std::int32_t first_candidates;
    // An entry a round, from the first on; the last one goes on.
    std::vector<std::int32_t> widths, successors, chunks;
    std::int32_t max_new_tokens;
    bool hold, mean, dedup, uses_guides, trace;
    bool copies;  // a candidate may be kept more than once
    std::vector<std::int32_t> eos_ids, stop_ids;  // what ends a response, and why
    std::int32_t min_new_tokens;                  // before any of them
    float temperature;
    std::int64_t top_k;
    double top_p, min_p;
    std::int64_t seed;
    // Tokens are drawn from logits of all models: factors of the guides', the log of the share of the
    // likeliest token's probability that a token needs, and whether factors are chosen at every token.
    std::vector<float> betas;  // empty: they are drawn from the base alone
    float plausibility;
    bool dynamic;
    std::optional<BeamSearch> beam_search{};  // the base's own, a token a round: see beam_search.h

    bool fuses() const { return !betas.empty(); }

    std::int32_t width_in(std::int32_t round) const { return entry(widths, round); }
    std::int32_t successors_in(std::int32_t round) const { return entry(successors, round); }
    std::int32_t chunk_in(std::int32_t round) const { return entry(chunks, round); }

private:
    static std::int32_t entry(const std::vector<std::int32_t>& by_round, std::int32_t round) {
        return by_round[std::min(static_cast<std::size_t>(round), by_round.size()) - 1];
    }
};

// The prompt of one model: the base's whole, of the guides only what is asked for here.
struct PromptEnd {
    std::int32_t length;
    std::int32_t last_token;
};

struct Beam {
    static constexpr std::int32_t kNone = -1;

    std::int32_t parent = kNone;     // among the kept of the round before; kNone in round 1
    std::int32_t inherited = 0;      // tokens that it has in common with its siblings
    std::int32_t length = 0;         // tokens of the response so far
    std::int32_t last_token = kNone;
    std::int32_t before_token = kNone;  // the last one of those that are inherited
    std::int32_t block = kNone;      // with its last tokens
    Finish finish = Finish::no;
    bool paused = false;             // of a candidate
    std::int32_t ending = kNone;     // which of its request's, where its text has ended
    double total = 0.0;              // sum of the scores, as the selection computed it; of beam search
                                     // the log-prob, and once it is finished what it is ranked by
    double extra = 0.0;              // what others than the guides say of it, weighted
    std::uint64_t hash = 0;          // of all tokens

    bool finished() const { return finish != Finish::no; }
    bool grows() const { return !finished() && !paused; }
};

// What becomes of a kept beam in a beam search.
struct Child {
    std::int32_t parent;
    std::int32_t token;  // one more; kNone where the parent is finished, and stays what it is
    float logprob;
    double total;
    bool goes_on;
    std::int32_t length = Beam::kNone, ending = Beam::kNone;  // see Beams::end_text
};

// The hash of tokens, from that of all but the last one: the finalizer of SplitMix64, in which every
// bit of the input moves about half of the output's.
inline std::uint64_t hash_with(std::uint64_t before, std::int32_t token) {
    std::uint64_t x = before + static_cast<std::uint64_t>(token) + 1;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

// A beam with tokens that nobody has looked at for what ends a text.
struct NewText {
    std::int32_t beam;
    std::int32_t known;                // of its tokens, those that were looked at
    std::vector<std::int32_t> tokens;  // all, but for one that ends the response
};

// A beam as its request's owner sees it: all that is known of it, copied.
struct BeamContents {
    std::int32_t parent;
    std::vector<std::int32_t> tokens;
    std::vector<float> logprobs;       // the base's, at temperature 1
    std::vector<double> token_scores;  // of those that were scored
    double total, extra;
    Finish finish;
    std::vector<std::int32_t> slots;   // in each model; kNoSlot
    std::int32_t ending;
};

struct RoundContents {
    std::vector<BeamContents> candidates;
    std::vector<std::int32_t> kept;
};

class Beams {
public:
    static constexpr std::int32_t kNoSlot = -1;
    using Managers = std::vector<PageManager*>;

    // `prompt`: the base's tokens; `guide_prompts`: of each guide's tuned and untuned model.
    Beams(SearchSettings settings, std::vector<std::int32_t> prompt,
          const std::vector<PromptEnd>& guide_prompts);
    Beams(const Beams&) = delete;
    Beams& operator=(const Beams&) = delete;

    const SearchSettings& settings() const { return settings_; }
    const std::vector<std::int32_t>& prompt() const { return prompt_; }
    const PromptEnd& prompt_end(int model) const { return prompt_ends_[model]; }
    int models() const { return static_cast<int>(prompt_ends_.size()); }

    // ---- the state of the search ----

    std::int32_t round() const { return round_; }  // the one under way, or the last one
    bool open() const { return open_; }            // whether a round is under way
    // Whether candidates have slots of their own in a model.
    bool forked(int model = 0) const { return forked_[model] != 0; }
    bool aside() const { return aside_; }          // its slots were given up between two rounds
    bool holds() const { return open_ || (!kept_.empty() && !aside_); }
    bool done() const;                             // all hypotheses are finished
    std::int64_t sampled() const { return sampled_; }
    // Candidates of all rounds that have ended, and those that were kept.
    std::int64_t judged() const { return judged_; }
    std::int64_t chosen() const { return chosen_; }
    std::int64_t scored() const { return scored_; }
    // Blocks that there is room for: those in use, and those that were given up.
    std::int64_t blocks() const { return std::ssize(blocks_); }
    // How many of their first tokens all kept beams that are not finished have in common, by
    // descent: tokens that came out equal by chance do not count, their keys may differ in the last
    // bits. 0 in the first round.
    std::int32_t shared() const { return shared_; }
    // How many tokens every growing candidate can still sample in this round; one that is long may
    // end with the last of them, and others go on. 0: none is growing.
    std::int32_t tokens_left() const;
    // Tokens of the shortest growing candidate. 0: none grows.
    std::int32_t grown() const;
    // The longest common prefix of all hypotheses that may be the best one in the end.
    std::vector<std::int32_t> agreed() const;

    const std::vector<Beam>& kept() const { return kept_; }
    const std::vector<Beam>& candidates() const { return candidates_; }
    // Candidates first_child(p) : first_child(p + 1) come from the kept beam p.
    std::int32_t first_child(std::size_t parent) const { return first_child_[parent]; }
    std::int32_t kept_slot(std::size_t beam, int model) const {
        return kept_slots_[beam * prompt_ends_.size() + model];
    }
    std::int32_t slot(std::size_t candidate, int model) const {
        return slots_[candidate * prompt_ends_.size() + model];
    }
    // Which kept beam is the first with the same tokens as this one.
    std::int32_t first_alike(std::size_t beam) const;
    bool same_tokens(const Beam& a, const Beam& b) const;
    // The tokens that a candidate has got in this round, and their log-probs, appended.
    void append_new(const Beam& candidate, std::vector<std::int32_t>& tokens,
                    std::vector<float>& logprobs) const;

    BeamContents contents(bool of_kept, std::size_t beam) const;
    std::vector<RoundContents> trace(std::size_t first = 0) const;  // from that round on

    // Whether a response of so many tokens ends with its last one, and why.
    Finish finish_of(std::int32_t token, std::int32_t length) const;

    // Whether a response of so many tokens may not end with its last one, which would end it.
    bool ends_too_soon(std::int32_t token, std::int32_t length) const;

    // Candidates that grow in the round under way, or else in the next one, as it begins.
    std::int64_t rows() const;
    // Pages that it can hold in one model at most during that round.
    std::int64_t round_pages(int model, std::int64_t page_size) const;

    // ---- what a round does ----

    // Make the candidates of the next round from the kept beams, or from the prompt.
    void begin_round();
    // Give the root, or the kept beams that are not finished, slots for their tokens; kNoSlot: none yet.
    void set_kept_slots(int model, std::span<const std::int32_t> slots);
    void resume() { aside_ = false; }
    // Every child of a parent that goes on gets a slot; the first one its parent's. `next` are the
    // slots for the others, in their order; returns how many of them were taken.
    std::size_t give_slots(int model, const std::int32_t* next);
    void set_forked(int model) { forked_[model] = 1; }
    // Beam search: make these children, parent by parent, the candidates. Those that go on get slots
    // in the base as give_slots gives them; returns how many of `next` were taken.
    std::size_t branch(std::span<const Child> children, const std::int32_t* next);
    // Before that: give up the base's slots of kept beams of which no child goes on. `branches`: of
    // each, how many do.
    void collect_childless(std::span<const std::int32_t> branches,
                           std::vector<std::int32_t>& released);
    // Append sampled tokens to a growing candidate, up to where it ends. Returns whether all log-
    // probs up to there are finite; what comes from the first one on that is not, is left out.
    // `scores`: of these tokens, where they are known already; added to the total.
    bool take(std::size_t candidate, std::span<const std::int64_t> tokens,
              std::span<const float> logprobs, std::span<const double> scores = {});
    // The same with what somebody else has sampled, as bytes of its text, and an EOS behind it if
    // that was sampled: `sampled` tokens in all. If it `ends`, nothing may follow.
    void take_text(std::size_t candidate, std::span<const std::int64_t> tokens, std::int64_t sampled,
                   bool ends);
    // The candidates that have got tokens in this round, are not paused, and whose texts have not
    // ended.
    std::vector<NewText> new_texts() const;
    // The chunk of a candidate ends with the token before `length`: what comes behind was not drawn,
    // also where it has ended the response.
    void pause(std::size_t candidate, std::int32_t length);
    // The chunks of all that still grow end where they are.
    void pause_growing();
    // The text of a candidate ends in token `length`: neither that one nor what comes behind is kept
    // or scored, whichever round it was drawn in. `ending` is its owner's word for how.
    void end_text(std::size_t candidate, std::int32_t length, std::int32_t ending);
    // Scores of a candidate's new tokens, and of its whole response.
    void set_scores(std::size_t candidate, std::span<const double> token_scores, double total);
    // What others than the guides say of each candidate.
    void set_extras(std::span<const double> extras);
    // Keep these candidates, best first, and give back what only others hold. One that is kept more
    // than once becomes as many hypotheses, each with slots of its own: returns, of each manager,
    // the pages to be copied for them.
    std::vector<std::vector<PageCopy>> end_round(std::vector<std::int32_t> kept,
                                                 const Managers& managers);
    // Give back the slots of finished candidates in one model.
    void collect_finished(int model, std::vector<std::int32_t>& released);
    // The slots of paused candidates in one model, and how many tokens belong there.
    void collect_paused(int model, std::vector<std::int32_t>& slots,
                        std::vector<std::int32_t>& lengths) const;

    // ---- interruptions ----

    // Between two rounds: give up all slots; they are to be computed again.
    void set_aside(const Managers& managers);
    // Give up all slots in whatever is under way; that round begins again from the kept beams.
    void start_over(const Managers& managers);
    // Give up all slots for good.
    void abort(const Managers& managers);
    // The slots that it holds in one model, appended to `out`. Who is set aside holds none,
    // whatever is still written down, and forgets it.
    void collect_held(int model, std::vector<std::int32_t>& out);

private:
    struct Block {
        std::int32_t before;
        std::int32_t references;  // by beams, and by blocks that come after it
        std::int32_t count;       // tokens in it
        std::int32_t free_after;  // in the list of free blocks
    };

    std::int32_t new_block(std::int32_t before);
    void ask_for(std::int32_t block) const;
    std::int32_t part_of(std::int32_t block, std::int32_t count);
    void cut(Beam& beam, std::int32_t length);
    void hold_block(std::int32_t block);
    void drop_block(std::int32_t block);
    void drop(const std::vector<Beam>& beams);
    template <typename Element, typename Out>
    void copy_elements(const std::vector<Element>& from, std::int32_t block, std::int32_t length,
                       std::int32_t begin, Out* out) const;
    template <typename Out>
    void copy_tokens(const Beam& beam, std::int32_t begin, Out* out) const;
    BeamContents contents(const Beam& beam, const std::int32_t* slots, bool scored) const;
    bool from_prompt() const { return kept_.empty() || (open_ && round_ == 1); }
    std::int32_t round_ahead() const { return open_ ? round_ : round_ + 1; }
    void add_child(std::size_t parent);
    void release_all(const Managers& managers);
    // When they are recomputed, kept beams have in common what all have, and nothing more.
    void share_less();

    SearchSettings settings_;
    std::vector<std::int32_t> prompt_;
    std::vector<PromptEnd> prompt_ends_;  // of every model

    std::int32_t round_ = 0;
    bool open_ = false;
    std::vector<std::uint8_t> forked_;  // by model
    bool aside_ = false;
    std::int32_t shared_ = 0;
    std::int64_t sampled_ = 0;
    std::int64_t judged_ = 0;
    std::int64_t chosen_ = 0;
    std::int64_t scored_ = 0;
    std::vector<Beam> kept_;
    std::vector<Beam> candidates_;
    std::vector<std::int32_t> first_child_;  // [kept + 1]
    std::vector<std::int32_t> kept_slots_;   // [kept, models]
    std::vector<std::int32_t> slots_;        // [candidates, models]
    // [kept, kept]: up to where two of them have the same ancestor.
    std::vector<std::int32_t> common_;

    struct Recorded {
        std::vector<Beam> candidates;
        std::vector<std::int32_t> kept;
    };
    std::vector<Recorded> recorded_;  // with a trace; it holds the blocks

    std::int32_t block_size_;
    std::int32_t free_block_ = Beam::kNone;
    std::vector<Block> blocks_;
    std::vector<std::int32_t> tokens_;  // [blocks, block_size]
    std::vector<float> logprobs_;
    std::vector<double> scores_;
};

template <typename Element, typename Out>
void Beams::copy_elements(const std::vector<Element>& from, std::int32_t block, std::int32_t length,
                          std::int32_t begin, Out* out) const {
    // From the last block back, for each knows only the one before it.
    for (std::int32_t end = length; end > begin; block = blocks_[block].before) {
        const std::int32_t count = blocks_[block].count;
        const std::int32_t first = end - count;
        const Element* elements = from.data() + std::int64_t{block} * block_size_;
        for (std::int32_t i = std::max(first, begin); i < end; ++i) {
            out[i - begin] = static_cast<Out>(elements[i - first]);
        }
        end = first;
    }
}

template <typename Out>
void Beams::copy_tokens(const Beam& beam, std::int32_t begin, Out* out) const {
    copy_elements(tokens_, beam.block, beam.length, begin, out);
}

}  // namespace w2s
