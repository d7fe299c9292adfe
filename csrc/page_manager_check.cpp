// PageManager::check: the sharing rules of page_manager.h, verified by walking everything.
#include <algorithm>
#include <string>
#include <vector>

#include "page_manager.h"

namespace w2s {

void PageManager::check() const {
    // Words only where a rule is broken: tests check after every call.
    const auto expect = [](bool holds, const char* rule, std::int32_t slot = -1) {
        if (holds) return;
        const std::string whose = slot < 0 ? "" : slot_name(slot) + " ";
        throw std::logic_error("broken page state: " + whose + rule);
    };
    const auto pages = static_cast<std::size_t>(num_pages());
    std::vector<std::int32_t> slots_with(pages, 0);
    std::vector<std::int32_t> holders(pages, 0);
    std::int64_t free_slots_found = 0;
    for (std::int32_t slot = 0; slot < max_slots(); ++slot) {
        const std::int64_t held = std::max(held_[slot], 0);
        if (held_[slot] == kFree) ++free_slots_found;
        expect(lengths_[slot] >= 0 && pages_of(lengths_[slot]) <= held,
               "holds too few pages for its length", slot);
        expect(held <= max_pages_per_slot_, "holds more pages than a slot may", slot);
        std::int32_t page = last_[slot];
        for (std::int64_t i = held; i-- > 0; page = pages_[page].before) {
            expect(page >= 0 && page < num_pages(), "holds a page that does not exist", slot);
            ++slots_with[page];
        }
        expect(page == kNoPage, "has pages before its first one", slot);
        if (held > 0) ++holders[last_[slot]];
    }
    for (std::int32_t page = 0; page < num_pages(); ++page) {
        if (slots_with[page] > 0 && pages_[page].before != kNoPage) ++holders[pages_[page].before];
        expect(!cache_.holds(page) || cache_.parent(page) == pages_[page].before,
               "a cached page follows another one than in the cache");
    }
    std::vector<std::int32_t> counted;
    for (const Page& page : pages_) counted.push_back(page.holders);
    expect(holders == counted, "a count of holders differs from what the slots hold");
    for (std::int32_t slot = 0; slot < max_slots(); ++slot) {
        std::int32_t page = last_[slot];
        for (std::int64_t i = std::max(held_[slot], 0); i-- > 0; page = pages_[page].before) {
            const bool shared = slots_with[page] > 1 || cache_.holds(page);
            expect(!shared || i < pages_of(lengths_[slot]),
                   "shares a page reserved ahead", slot);
            expect(!shared || i < lengths_[slot] / page_size_ || page == last_[slot],
                   "shares a partial page that is not its last", slot);
        }
    }
    cache_.check(counted);
    for (std::int32_t page = 0; page < num_pages(); ++page) {
        if (pages_[page].run == kNoRun || !(slots_with[page] > 0 || cache_.holds(page))) continue;
        const std::int32_t run = pages_[page].run;
        std::int32_t walked = page;
        for (std::int64_t i = kRun; i-- > 0; walked = pages_[walked].before) {
            expect(run_pages_[run].pages[i] == walked, "pages were written down in another order");
        }
        expect(runs_[run].before == kNoRun || pages_[walked].run == runs_[run].before,
               "a run follows another one");
        if (runs_[run].longer == kNoRun) continue;
        walked = page;
        for (std::int64_t i = kLongRun; i-- > 0; walked = pages_[walked].before) {
            expect(long_pages_[runs_[run].longer].pages[i] == walked,
                   "pages of a long run were written down in another order");
        }
        expect(runs_[run].beyond == (walked == kNoPage ? kNoRun : pages_[walked].run),
               "a long run follows another run");
    }

    std::vector<bool> found_free(pages, false);
    for (const std::int32_t page : free_pages_) {
        expect(page >= 0 && page < num_pages() && slots_with[page] == 0 && !cache_.holds(page) &&
                   !found_free[page],
               "a free page is in use, or free twice");
        found_free[page] = true;
    }
    for (std::int32_t page = 0; page < num_pages(); ++page) {
        expect(found_free[page] || slots_with[page] > 0 || cache_.holds(page),
               "a page is neither free nor in use");
    }

    std::vector<bool> listed(lengths_.size(), false);
    for (const std::int32_t slot : free_slots_) {
        expect(slot >= 0 && slot < max_slots() && held_[slot] == kFree && !listed[slot],
               "a free slot is in use, or free twice");
        listed[slot] = true;
    }
    expect(free_slots_found == free_slots(), "a slot is neither free nor in use");
}

}  // namespace w2s
