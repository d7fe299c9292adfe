// Random searches through beams.h and rounds.h over real page managers, for the sanitizers.
//
// What they compute is held to lists of tokens in tests/csrc/test_beams.py; here all that is asked
// for is that no memory is misused, whatever happens, and that every slot comes back.
#include "random_rounds.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "beam_search.h"
#include "draw.h"
#include "rounds.h"
#include "scoring.h"

namespace {

using Random = std::mt19937_64;
using w2s::Beams;
using w2s::Requests;

std::int64_t pick(Random& random, std::int64_t least, std::int64_t most) {
    return std::uniform_int_distribution<std::int64_t>(least, most)(random);
}

std::unique_ptr<Beams> some_request(Random& random) {
    const auto number = [&](std::int64_t least, std::int64_t most) {
        return static_cast<std::int32_t>(pick(random, least, most));
    };
    const auto flag = [&] { return number(0, 1) == 1; };
    const auto by_round = [&](std::int64_t most) {
        w2s::Int32s entries(static_cast<std::size_t>(number(1, 3)));
        for (std::int32_t& entry : entries) entry = number(1, most);
        return entries;
    };
    w2s::SearchSettings settings{
        number(1, 9), by_round(5), by_round(4), by_round(40), 0, flag(), flag(), flag(),
        number(0, 3) > 0, flag(), flag(), {0}, {1, 2}, number(0, 3),
        1.0F, 0, 1.0, 0.0, 7, {}, 0.0F, false};
    settings.max_new_tokens = number(std::ranges::max(settings.chunks), 60);
    // Without a guide there is one round.
    if (!settings.uses_guides) settings.chunks = {settings.max_new_tokens};
    if (number(0, 3) == 0) {
        settings.uses_guides = false;
        settings.chunks = {1};
        settings.beam_search = {number(-2, 2) / 2.0, w2s::EarlyStopping{static_cast<std::int8_t>(
                                                         number(0, 2))}};
    }
    const std::vector<w2s::PromptEnd> guides{{number(1, 20), 3}, {number(1, 20), 4}};
    return std::make_unique<Beams>(settings, std::vector<std::int32_t>(number(1, 20), 5), guides);
}

void grow(w2s::PageManager& manager, const w2s::Int32s& slots, const w2s::Int32s& counts) {
    manager.reserve(slots, counts);
    manager.extend(slots, counts);
}

// Fields one behind the other, of so many items of so many bytes; and their size in all.
std::int64_t place(const std::vector<std::pair<std::int64_t, std::int64_t>>& fields,
                   std::vector<std::int64_t>& offsets) {
    std::int64_t end = 0;
    for (const auto& [items, bytes] : fields) {
        offsets.push_back(end);
        end += (items * bytes + 15) / 16 * 16;
    }
    return end;
}

// A buffer with a little more room than a pass needs, and just as large as that.
struct Buffer {
    w2s::PassRoom room;
    std::vector<std::int64_t> columns;
    std::vector<std::byte> bytes;

    Buffer(const w2s::PassLayout& pass, std::int64_t more,
           const std::vector<std::pair<std::int64_t, std::int64_t>>& extra) {
        w2s::PassShape& shape = room.shape;
        shape = pass.shape();
        for (std::int64_t* own : {&shape.rows, &shape.tokens, &shape.splits, &shape.pages}) {
            *own += more;
        }
        std::vector<std::pair<std::int64_t, std::int64_t>> fields{
            {shape.tokens, 8}, {shape.tokens, 8}, {shape.tokens, 8}, {shape.pages, 4},
            {shape.rows, 4},   {shape.rows, 4},   {shape.rows + 1, 4}, {shape.rows, 4},
            {shape.rows, 4},   {shape.tokens, 4}, {6 * shape.splits, 4}};
        const std::size_t own = fields.size();
        fields.insert(fields.end(), extra.begin(), extra.end());
        std::vector<std::int64_t> offsets;
        bytes.resize(static_cast<std::size_t>(place(fields, offsets)));
        room.offsets.assign(offsets.begin(), offsets.begin() + static_cast<std::ptrdiff_t>(own));
        columns.assign(offsets.begin() + static_cast<std::ptrdiff_t>(own), offsets.end());
    }
};

// What a recording of a draw is given; as many rows as come out of it.
std::int64_t draw(const Requests& growing, w2s::PageManager& manager, std::int64_t steps,
                  std::int64_t more) {
    w2s::DrawLayout layout(growing, {&manager});
    layout.begin(steps, 4, 8);
    const std::int64_t rows = layout.rows() + more;
    Buffer of_rows(layout.row_pass(0), more,
                   {{rows, 4}, {rows, 8}, {rows, 8}, {rows, 8}, {rows, 8}, {rows, 8}, {rows, 8},
                    {1, 8}, {2 * rows, 4}});
    layout.write_rows(of_rows.bytes, {&of_rows.room}, {of_rows.columns});
    const w2s::PassShape sources = layout.source_pass(0).shape();
    Buffer of_sources(layout.source_pass(0), more,
                      {{sources.tokens + more, 8}, {sources.rows + more, 8}, {rows, 8}});
    layout.write_sources(of_sources.bytes, {&of_sources.room}, {of_sources.columns}, rows);
    return layout.rows();
}

// A round of these beam searches. Those that are broken are returned.
Requests advance(const Requests& searching, w2s::PageManager& manager, Random& random) {
    const w2s::Sources sources = lay_out_sources(searching, manager, 0);
    grow(manager, sources.slots, sources.counts);
    const std::int64_t k = pick(random, 1, 9);
    std::vector<std::int32_t> tokens;
    std::vector<float> logprobs;
    for (std::size_t row = 0; row < sources.slots.size(); ++row) {
        float logprob = -0.5F;
        for (std::int64_t i = 0; i < k; ++i) {
            tokens.push_back(static_cast<std::int32_t>(pick(random, 0, 30)));
            logprobs.push_back(logprob);
            logprob -= static_cast<float>(pick(random, 0, 3));
            if (pick(random, 0, 40) == 0) logprob = -1.0F / 0.0F;
        }
    }
    if (pick(random, 0, 20) == 0) {
        const std::int64_t row = pick(random, 0, std::ssize(sources.slots) - 1);
        logprobs[static_cast<std::size_t>(row * k)] = 0.0F / 0.0F;
    }
    Requests broken;
    for (const auto& [index, token, position] :
         broken_continuations(searching, {tokens, logprobs})) {
        broken.push_back(searching[static_cast<std::size_t>(index)]);
    }
    std::vector<w2s::EndedText> ended;
    for (std::size_t r = 0; r < searching.size(); ++r) {
        const auto ranked = rank_continuations(searching, {tokens, logprobs}, r);
        for (std::size_t rank = 0; rank < ranked.size(); ++rank) {
            if (ranked[rank].ends || pick(random, 0, 9) > 0) continue;
            const w2s::Beam& parent = searching[r]->kept()[static_cast<std::size_t>(
                ranked[rank].parent)];
            ended.push_back({static_cast<std::int32_t>(r), static_cast<std::int32_t>(rank),
                             static_cast<std::int32_t>(pick(random, 0, parent.length)), 1});
        }
    }
    advance_beams(searching, {tokens, logprobs}, manager, ended);
    return broken;
}

// What a recording of a selection is given.
void score(const w2s::Scoring& scoring, const Beams::Managers& guides, std::int64_t more) {
    const w2s::ScoringPasses passes(scoring, guides, 4, 8);
    for (const w2s::PassLayout& pass : passes.passes()) {
        Buffer buffer(pass, more, {});
        pass.write(buffer.bytes, buffer.room.offsets, buffer.room.shape, false);
    }
    std::vector<std::int64_t> items, offsets;
    std::vector<std::pair<std::int64_t, std::int64_t>> fields;
    scoring.columns([&](const std::string&, const auto& values, auto spare, bool) {
        items.push_back(std::ssize(values) + more);
        fields.emplace_back(items.back(), sizeof(spare));
    });
    std::vector<std::byte> bytes(static_cast<std::size_t>(place(fields, offsets)));
    w2s::write_columns(scoring, bytes, offsets, items, scoring.rows + more);
}

// The slots that a request without any gets, with what its texts have but their last tokens.
void take_slots(Beams& request, std::vector<std::unique_ptr<w2s::PageManager>>& managers, int m) {
    const bool root = request.round() == 1 && request.open();
    w2s::Int32s counts;
    if (root) {
        counts.push_back(request.prompt_end(m).length - 1);
    } else {
        for (const w2s::Beam& beam : request.kept()) {
            if (!beam.finished()) counts.push_back(request.prompt_end(m).length + beam.length - 1);
        }
    }
    const w2s::Int32s slots = managers[m]->allocate(std::ssize(counts));
    grow(*managers[m], slots, counts);
    request.set_kept_slots(m, slots);
}

}  // namespace

void random_rounds(long rounds, Random& random, std::map<std::string, long>& happened) {
    std::vector<std::unique_ptr<w2s::PageManager>> managers;
    Beams::Managers all;
    for (int m = 0; m < 3; ++m) {
        managers.push_back(std::make_unique<w2s::PageManager>(20'000, 4, 400, 40));
        all.push_back(managers.back().get());
    }
    std::vector<std::unique_ptr<Beams>> owners;
    for (long done = 0; done < rounds; ++done) {
        std::erase_if(owners, [&](const auto& request) { return request->done(); });
        while (owners.size() < 3) owners.push_back(some_request(random));
        Requests requests;
        for (const auto& request : owners) {
            if (pick(random, 0, 3) > 0) requests.push_back(request.get());
        }
        std::vector<bool> fresh;
        for (const Beams* request : requests) fresh.push_back(!request->open());
        begin_rounds(requests);
        for (std::size_t r = 0; r < requests.size(); ++r) {
            if (requests[r]->round() == 1 && fresh[r]) take_slots(*requests[r], managers, 0);
        }
        const auto drop = [&](Beams* request) {
            request->abort(all);
            std::erase_if(owners, [&](const auto& own) { return own.get() == request; });
            std::erase(requests, request);
            ++happened["broken"];
        };
        Requests searching;
        std::ranges::copy_if(requests, std::back_inserter(searching), [](const Beams* request) {
            return request->settings().beam_search.has_value();
        });
        std::erase_if(requests, [](const Beams* request) {
            return request->settings().beam_search.has_value();
        });
        if (!searching.empty()) {
            for (Beams* request : advance(searching, *managers[0], random)) drop(request);
            ++happened["beams searched"];
        }
        const w2s::Int32s left = tokens_left(requests);
        Requests growing;
        std::int32_t most = 16;
        for (std::size_t r = 0; r < requests.size(); ++r) {
            if (left[r] == 0) continue;
            growing.push_back(requests[r]);
            most = std::min(most, left[r]);
        }
        if (!growing.empty()) {
            const std::int64_t steps = pick(random, 1, most);
            std::int64_t count = 0;
            if (steps > 1 && pick(random, 0, 1) == 0) {
                count = draw(growing, *managers[0], steps, pick(random, 0, 3));
                ++happened["drawn by a recording"];
            } else {
                const w2s::Sources sources = lay_out_sources(growing, *managers[0], 0);
                grow(*managers[0], sources.slots, sources.counts);
                fork_beams(growing, *managers[0], 0);
                const w2s::GrowingRows rows = lay_out_rows(growing, 0);
                grow(*managers[0], rows.slots,
                     w2s::Int32s(rows.slots.size(), static_cast<std::int32_t>(steps - 1)));
                count = std::ssize(rows.slots);
            }
            std::vector<std::int64_t> tokens(static_cast<std::size_t>(count * steps));
            for (std::int64_t& token : tokens) token = pick(random, 0, 30);
            std::vector<float> logprobs(tokens.size(), -1.0F);
            if (pick(random, 0, 20) == 0) logprobs[pick(random, 0, tokens.size() - 1)] /= 0.0F;
            const auto broken = take_tokens(growing, tokens, logprobs, steps);
            for (Beams* request : growing) {
                for (const w2s::NewText& text : request->new_texts()) {
                    const auto candidate = static_cast<std::size_t>(text.beam);
                    // Without a guide all are kept, and each of them has children.
                    if (pick(random, 0, 4) == 0 && request->settings().uses_guides &&
                        request->slot(candidate, 0) != Beams::kNoSlot &&
                        std::ssize(text.tokens) > text.known) {
                        request->pause(candidate,
                                       static_cast<std::int32_t>(pick(
                                           random, text.known + 1, std::ssize(text.tokens))));
                        ++happened["chunks ended"];
                        continue;
                    }
                    if (pick(random, 0, 9) > 0) continue;
                    request->end_text(static_cast<std::size_t>(text.beam),
                                      static_cast<std::int32_t>(
                                          pick(random, 0, std::ssize(text.tokens))),
                                      1);
                    ++happened["texts ended"];
                }
            }
            release_finished(growing, *managers[0], 0);
            for (const auto& [index, _, position] : broken) drop(growing[index]);
        }
        Requests scored, others;
        for (Beams* request : requests) {
            if (request->tokens_left() > 0) continue;
            (request->settings().uses_guides ? scored : others).push_back(request);
        }
        keep_all(others, all);
        if (!scored.empty()) {
            for (int m = 1; m < 3; ++m) {
                for (Beams* request : scored) {
                    if (request->round() == 1) take_slots(*request, managers, m);
                }
                fork_beams(scored, *managers[m], m);
            }
            const w2s::Scoring scoring = lay_out_scoring(scored, {}, 0, {1.0});
            if (pick(random, 0, 1) == 0) {
                score(scoring, {all[1], all[2]}, pick(random, 0, 3));
                ++happened["scored by a recording"];
            } else {
                for (int m = 1; m < 3; ++m) {
                    grow(*managers[m], scoring.slots[m - 1], scoring.counts);
                    scoring.levels[m - 1].tree();
                }
            }
            const std::vector<double> scores(scoring.targets.size(), 0.5);
            take_scores(scored, scoring.cu_tokens, scores, scoring.previous,
                        std::vector<std::int64_t>(scoring.previous.size(), -1));
            std::vector<std::int64_t> kept;
            for (const Beams* request : scored) {
                std::vector<std::int64_t> order(request->candidates().size());
                for (std::size_t c = 0; c < order.size(); ++c) order[c] = c;
                std::shuffle(order.begin(), order.end(), random);
                const auto width = request->settings().width_in(request->round());
                order.resize(std::min<std::size_t>(order.size(), width));
                if (request->settings().copies) {
                    for (std::int64_t& winner : order) {
                        winner = order[static_cast<std::size_t>(pick(random, 0, std::ssize(order) - 1))];
                    }
                    ++happened["kept copies"];
                }
                order.resize(scoring.max_width, -1);
                kept.insert(kept.end(), order.begin(), order.end());
            }
            end_rounds(scored, kept, all);
            ++happened["scored"];
        }
        for (const auto& request : owners) {
            request->agreed();
            request->trace();
            if (pick(random, 0, 30) > 0) continue;
            if (request->open()) {
                request->start_over(all);
                ++happened["started over"];
            } else if (request->holds()) {
                request->set_aside(all);
                ++happened["set aside"];
            }
            if (!request->aside()) continue;
            const int models = request->settings().uses_guides ? 3 : 1;
            for (int m = 0; m < models; ++m) take_slots(*request, managers, m);
            request->resume();
        }
        for (int m = 0; m < 3; ++m) {
            Requests holding;
            for (const auto& request : owners) holding.push_back(request.get());
            const auto held = static_cast<std::int64_t>(held_slots(holding, m).size());
            if (held + managers[m]->free_slots() != managers[m]->max_slots()) {
                std::fprintf(stderr, "a slot of model %d was lost\n", m);
                std::exit(1);
            }
        }
        ++happened["rounds"];
    }
    for (const auto& request : owners) request->abort(all);
    for (const auto& manager : managers) {
        manager->check();
        if (manager->free_slots() != manager->max_slots()) std::exit(1);
    }
}
