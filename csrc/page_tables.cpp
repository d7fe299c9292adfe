// Tables of pages: a slot is its last page, so its others are found by walking back.
#include <algorithm>
#include <cstring>

#include "page_manager.h"

namespace w2s {

std::vector<std::int32_t> PageManager::page_table(Ints slots) const {
    std::int64_t width = 0;
    for (const std::int32_t slot : slots) {
        check_slot(slot);
        width = std::max<std::int64_t>(width, held_[slot]);
    }
    std::vector<std::int32_t> table(slots.size() * static_cast<std::size_t>(width), kNoPage);
    for (std::size_t i = 0; i < slots.size(); ++i) {
        copy_table(slots[i], 0, table.data() + static_cast<std::int64_t>(i) * width);
    }
    return table;
}

// Calls on_page(index, page) and on_run(index, run) for the pages of a slot from `begin` on, index
// 0 being that one; the last ones first.
template <typename OnPage, typename OnRun>
void PageManager::walk(std::int32_t slot, std::int64_t begin, OnPage on_page, OnRun on_run) const {
    std::int32_t page = last_[slot];
    std::int64_t end = held_[slot];
    for (; end > begin && (end % kRun != 0 || end - begin < kRun); page = pages_[page].before) {
        on_page(--end - begin, page);
    }
    if (end <= begin) return;
    for (std::int32_t run = run_up_to(page);;) {
        end -= kRun;
        on_run(end - begin, run);
        if (end - begin < kRun) {
            page = pages_[run_pages_[run].pages[0]].before;
            break;
        }
        if (runs_[run].before == kNoRun) {
            const std::int32_t before = run_up_to(pages_[run_pages_[run].pages[0]].before);
            runs_[run].before = before;
        }
        run = runs_[run].before;
    }
    for (; end > begin; page = pages_[page].before) on_page(--end - begin, page);
}

// Of a size known beforehand: a few moves, and no call.
void PageManager::copy_run(std::int32_t run, std::int32_t* out) const {
    std::memcpy(out, run_pages_[run].pages.data(), sizeof(RunPages));
}

void PageManager::copy_table(std::int32_t slot, std::int64_t begin, std::int32_t* out) const {
    walk(
        slot, begin, [&](std::int64_t index, std::int32_t page) { out[index] = page; },
        [&](std::int64_t index, std::int32_t run) {
            copy_run(run, out + index);
        });
}

void PageManager::append_table(std::int32_t slot, std::int64_t begin, std::int64_t at,
                               Table& table) const {
    const auto place = [&](std::int64_t index) { return static_cast<std::int32_t>(at + index); };
    walk(
        slot, begin,
        [&](std::int64_t index, std::int32_t page) { table.pages.push_back({place(index), page}); },
        [&](std::int64_t index, std::int32_t run) {
            __builtin_prefetch(&run_pages_[run]);
            table.runs.push_back({place(index), run, runs_[run].use});
        });
}

void PageManager::write_table(const Table& table, std::int32_t* out) const {
    for (const auto& [at, run, use] : table.runs) {
        if (runs_[run].use != use) throw PageMisuse("a table was written after its pages went");
        copy_run(run, out + at);
    }
    for (const auto& [at, page] : table.pages) out[at] = page;
}

std::int32_t PageManager::run_up_to(std::int32_t page) const {
    std::int32_t& run = pages_[page].run;
    if (run == kNoRun) {
        if (free_runs_.empty()) {
            free_runs_.push_back(static_cast<std::int32_t>(runs_.size()));
            runs_.emplace_back();
            run_pages_.emplace_back();
        }
        run = free_runs_.back();
        free_runs_.pop_back();
        runs_[run].before = kNoRun;
        auto& own = run_pages_[run].pages;
        for (std::int64_t i = kRun; i-- > 0; page = pages_[page].before) own[i] = page;
    }
    return run;
}

}  // namespace w2s
