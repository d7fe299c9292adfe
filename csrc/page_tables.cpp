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

// Calls on_page(index, page), on_run(index, run) and on_long_run(index, run) for the pages of a
// slot from `begin` on, index 0 being that one; the last ones first.
template <typename OnPage, typename OnRun, typename OnLongRun>
void PageManager::walk(std::int32_t slot, std::int64_t begin, OnPage on_page, OnRun on_run,
                       OnLongRun on_long_run) const {
    std::int32_t page = last_[slot];
    std::int64_t end = held_[slot];
    for (; end > begin && (end % kRun != 0 || end - begin < kRun); page = pages_[page].before) {
        on_page(--end - begin, page);
    }
    if (end <= begin) return;
    for (std::int32_t run = run_up_to(page);;) {
        std::int32_t first = run;
        if (end % kLongRun == 0 && end - begin >= kLongRun) {
            write_down_long(run);
            first = runs_[run].first;
            end -= kLongRun;
            on_long_run(end - begin, run);
        } else {
            end -= kRun;
            on_run(end - begin, run);
        }
        if (end - begin < kRun) {
            page = pages_[run_pages_[first].pages[0]].before;
            break;
        }
        run = run_before(first);
    }
    for (; end > begin; page = pages_[page].before) on_page(--end - begin, page);
}

// Of a size known beforehand: a few moves, and no call.
void PageManager::copy_run(std::int32_t run, std::int32_t* out) const {
    std::memcpy(out, run_pages_[run].pages.data(), sizeof(RunPages));
}

void PageManager::copy_long_run(std::int32_t run, std::int32_t* out) const {
    std::memcpy(out, long_pages_[runs_[run].longer].pages.data(), sizeof(LongRunPages));
}

void PageManager::copy_table(std::int32_t slot, std::int64_t begin, std::int32_t* out) const {
    walk(
        slot, begin, [&](std::int64_t index, std::int32_t page) { out[index] = page; },
        [&](std::int64_t index, std::int32_t run) { copy_run(run, out + index); },
        [&](std::int64_t index, std::int32_t run) { copy_long_run(run, out + index); });
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
        },
        [&](std::int64_t index, std::int32_t run) {
            const auto& pages = long_pages_[runs_[run].longer].pages;
            for (std::int64_t i = 0; i < kLongRun; i += kRun) __builtin_prefetch(&pages[i]);
            table.long_runs.push_back({place(index), run, runs_[run].use});
        });
}

void PageManager::write_table(const Table& table, std::int32_t* out) const {
    const auto expect_in_use = [&](const Table::RunAt& one) {
        if (runs_[one.run].use != one.use) {
            throw PageMisuse("a table was written after its pages went");
        }
    };
    for (const Table::RunAt& one : table.long_runs) {
        expect_in_use(one);
        copy_long_run(one.run, out + one.at);
    }
    for (const Table::RunAt& one : table.runs) {
        expect_in_use(one);
        copy_run(one.run, out + one.at);
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

// Where a history begins with this one there is none, and nobody asks.
std::int32_t PageManager::run_before(std::int32_t run) const {
    if (runs_[run].before == kNoRun) {
        const std::int32_t before = run_up_to(pages_[run_pages_[run].pages[0]].before);
        runs_[run].before = before;
    }
    return runs_[run].before;
}

void PageManager::write_down_long(std::int32_t run) const {
    if (runs_[run].longer != kNoRun) return;
    if (free_long_.empty()) {
        free_long_.push_back(static_cast<std::int32_t>(long_pages_.size()));
        long_pages_.emplace_back();
    }
    const std::int32_t longer = free_long_.back();
    std::int32_t* const pages = long_pages_[longer].pages.data();
    std::int32_t first = run;
    copy_run(first, pages + kLongRun - kRun);
    for (std::int64_t i = kLongRun - kRun; i > 0;) {
        first = run_before(first);
        copy_run(first, pages + (i -= kRun));
    }
    runs_[run].first = first;
    runs_[run].longer = longer;
    free_long_.pop_back();
}

// Its pages are no longer in use.
void PageManager::forget_run(std::int32_t run) {
    ++runs_[run].use;
    free_runs_.push_back(run);
    if (runs_[run].longer == kNoRun) return;
    free_long_.push_back(runs_[run].longer);
    runs_[run].longer = kNoRun;
}

}  // namespace w2s
