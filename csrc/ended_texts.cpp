// Texts and chunks that end by what they say: Beams gives out what is new, and cuts where its owner
// found an end.
#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "beams.h"

namespace w2s {

std::vector<NewText> Beams::new_texts() const {
    std::vector<NewText> found;
    for (std::size_t c = 0; c < candidates_.size(); ++c) {
        const Beam& beam = candidates_[c];
        const bool ended = beam.finish == Finish::eos || beam.finish == Finish::stop;
        if (beam.ending != Beam::kNone || beam.paused || beam.length == beam.inherited) continue;
        NewText& text = found.emplace_back();
        text.beam = static_cast<std::int32_t>(c);
        text.known = beam.inherited;
        text.tokens.resize(static_cast<std::size_t>(beam.length));
        copy_tokens(beam, 0, text.tokens.data());
        if (ended) text.tokens.pop_back();
    }
    return found;
}

// The first tokens of a beam, instead of all.
void Beams::cut(Beam& beam, std::int32_t length) {
    // Back to the block that holds the last token that is kept.
    std::int32_t block = beam.block, end = beam.length;
    while (block != Beam::kNone && end - blocks_[block].count >= length) {
        end -= blocks_[block].count;
        block = blocks_[block].before;
    }
    if (end > length) {
        block = part_of(block, length - (end - blocks_[block].count));
    } else {
        hold_block(block);
    }
    drop_block(std::exchange(beam.block, block));
    beam.length = length;
    beam.inherited = std::min(beam.inherited, length);
    std::vector<std::int32_t> tokens(static_cast<std::size_t>(length));
    copy_tokens(beam, 0, tokens.data());
    beam.last_token = tokens.empty() ? Beam::kNone : tokens.back();
    beam.before_token = beam.inherited > 0 ? tokens[beam.inherited - 1] : Beam::kNone;
    beam.hash = 0;
    for (const std::int32_t token : tokens) beam.hash = hash_with(beam.hash, token);
    if (!settings_.uses_guides) return;
    // Of fused tokens all scores are known, else those of the rounds before.
    std::vector<double> scores(tokens.size());
    copy_elements(scores_, beam.block, length, 0, scores.data());
    if (!settings_.fuses()) scores.resize(static_cast<std::size_t>(beam.inherited));
    beam.total = std::accumulate(scores.begin(), scores.end(), 0.0);
}

void Beams::end_text(std::size_t candidate, std::int32_t length, std::int32_t ending) {
    Beam& beam = candidates_.at(candidate);
    if (beam.ending != Beam::kNone || length < 0 || length > beam.length || ending < 0) {
        throw std::invalid_argument("a text ends once, in one of its tokens");
    }
    cut(beam, length);
    beam.finish = Finish::stop;
    beam.ending = ending;
}

void Beams::pause(std::size_t candidate, std::int32_t length) {
    Beam& beam = candidates_.at(candidate);
    if (beam.ending != Beam::kNone || beam.paused || length <= beam.inherited ||
        length > beam.length) {
        throw std::invalid_argument("a chunk ends once, behind one of its tokens");
    }
    const double total = beam.total;
    cut(beam, length);
    if (!settings_.fuses()) beam.total = total;  // of the rounds before
    beam.finish = finish_of(beam.last_token, length);
    beam.paused = !beam.finished();
}

void Beams::pause_growing() {
    for (Beam& beam : candidates_) beam.paused = beam.paused || beam.grows();
}

}  // namespace w2s
