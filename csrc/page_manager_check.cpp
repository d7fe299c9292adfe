// PageManager::check: the sharing rules of page_manager.h, verified by walking everything.
#include <algorithm>
#include <string>
#include <vector>

#include "page_manager.h"

namespace w2s {

void PageManager::check() const {
    const auto expect = [](bool holds, const std::string& rule) {
        if (!holds) throw std::logic_error("broken page state: " + rule);
    };
    std::vector<std::int32_t> occurrences(references_.size(), 0);
    std::int64_t free_slots_found = 0;
    for (std::int32_t slot = 0; slot < max_slots(); ++slot) {
        const std::string name = slot_name(slot);
        const std::int64_t held = std::max(held_[slot], 0);
        if (held_[slot] == kFree) ++free_slots_found;
        expect(lengths_[slot] >= 0 && pages_of(lengths_[slot]) <= held,
               name + " holds too few pages for its length");
        expect(held <= max_pages_per_slot_, name + " holds more pages than its row has");
        for (std::int64_t i = 0; i < max_pages_per_slot_; ++i) {
            const std::int32_t page = row(slot)[i];
            if (i >= held) {
                expect(page == kNoPage, name + " names a page that it does not hold");
                continue;
            }
            expect(page >= 0 && page < num_pages(), name + " holds a page that does not exist");
            ++occurrences[page];
            expect(i < pages_of(lengths_[slot]) || references_[page] == 1,
                   name + " shares a page reserved ahead");
            expect(!cache_.holds(page) ||
                       cache_.parent(page) == (i == 0 ? kNoPage : row(slot)[i - 1]),
                   name + " holds a cached page, but another one before it than the cache");
        }
    }
    for (std::int32_t page = 0; page < num_pages(); ++page) {
        occurrences[page] += cache_.holds(page);
    }
    expect(occurrences == references_, "a reference count differs from the table entries");
    cache_.check(references_);

    for (const std::int32_t page : free_pages_) {
        expect(page >= 0 && page < num_pages() && occurrences[page] == 0,
               "a free page is in use, or free twice");
        occurrences[page] = -1;
    }
    expect(std::ranges::find(occurrences, 0) == occurrences.end(),
           "a page is neither free nor in use");

    std::vector<bool> listed(lengths_.size(), false);
    for (const std::int32_t slot : free_slots_) {
        expect(slot >= 0 && slot < max_slots() && held_[slot] == kFree && !listed[slot],
               "a free slot is in use, or free twice");
        listed[slot] = true;
    }
    expect(free_slots_found == free_slots(), "a slot is neither free nor in use");
}

}  // namespace w2s
