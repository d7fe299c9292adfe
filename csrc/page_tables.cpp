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

PageManager::Way PageManager::way_back(std::int32_t slot, std::int64_t begin,
                                       std::int64_t at) const {
    return {begin, held_[slot], at, last_[slot], false};
}

// Calls on_page(place, page), on_run(place, run) or on_long_run(place, run) for the last pages that
// are left, or finds the run that ends there. Asks for the memory that the next step waits for.
template <typename OnPage, typename OnRun, typename OnLongRun>
void PageManager::step(Way& way, OnPage on_page, OnRun on_run, OnLongRun on_long_run) const {
    std::int32_t& last = way.last;
    if (!way.in_runs) {
        if (way.end % kRun == 0 && way.left() >= kRun) {
            last = run_up_to(last);
            way.in_runs = true;
            __builtin_prefetch(&runs_[last]);
            return;
        }
        on_page(way.at + --way.end, last);
        if (way.left() == 0) return;
        last = pages_[last].before;
        __builtin_prefetch(&pages_[last]);
        return;
    }
    const std::int32_t run = last;
    const bool is_long = way.end % kLongRun == 0 && way.left() >= kLongRun;
    if (is_long) {
        write_down_long(run, way.end);
        way.end -= kLongRun;
        on_long_run(way.at + way.end, run);
    } else {
        way.end -= kRun;
        on_run(way.at + way.end, run);
    }
    if (way.left() == 0) return;
    last = is_long ? runs_[run].beyond : run_before(run);
    if (way.left() >= kRun) {
        __builtin_prefetch(&runs_[last]);
    } else {
        last = run_pages_[last].pages.back();
        way.in_runs = false;
    }
}

// Of a size known beforehand: a few moves, and no call.
void PageManager::copy_run(std::int32_t run, std::int32_t* out) const {
    std::memcpy(out, run_pages_[run].pages.data(), sizeof(RunPages));
}

void PageManager::copy_long_run(std::int32_t run, std::int32_t* out) const {
    std::memcpy(out, long_pages_[runs_[run].longer].pages.data(), sizeof(LongRunPages));
}

void PageManager::copy_table(std::int32_t slot, std::int64_t begin, std::int32_t* out) const {
    for (Way way = way_back(slot, begin, -begin); way.left() > 0;) {
        step(
            way, [&](std::int64_t place, std::int32_t page) { out[place] = page; },
            [&](std::int64_t place, std::int32_t run) { copy_run(run, out + place); },
            [&](std::int64_t place, std::int32_t run) { copy_long_run(run, out + place); });
    }
}

void PageManager::append_tables(Ints slots, std::span<const std::int64_t> begins,
                                std::span<const std::int32_t> starts, Table& table) const {
    const auto take_step = [&](Way& way) {
        step(
            way,
            [&](std::int64_t place, std::int32_t page) {
                table.pages.push_back({static_cast<std::int32_t>(place), page});
            },
            [&](std::int64_t place, std::int32_t run) {
                __builtin_prefetch(&run_pages_[run]);
                table.runs.push_back({static_cast<std::int32_t>(place), run, runs_[run].use});
            },
            [&](std::int64_t place, std::int32_t run) {
                const auto& pages = long_pages_[runs_[run].longer].pages;
                for (std::int64_t i = 0; i < kLongRun; i += kRun) __builtin_prefetch(&pages[i]);
                table.long_runs.push_back({static_cast<std::int32_t>(place), run, runs_[run].use});
            });
    };
    // Each step waits for memory that the one before has found. So where there are many, ways take
    // turns: at 64 of 280 pages that lay anywhere, it halved the time.
    std::vector<Way> ways;
    for (std::size_t i = 0; i < slots.size(); ++i) {
        Way way = way_back(slots[i], begins[i], starts[i]);
        if (way.left() >= kRun) {
            __builtin_prefetch(&pages_[way.last]);
            ways.push_back(way);
        } else {
            while (way.left() > 0) take_step(way);
        }
    }
    while (!ways.empty()) {
        for (Way& way : ways) take_step(way);
        std::erase_if(ways, [](const Way& way) { return way.left() == 0; });
    }
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

// The long run that ends with this one. `end`: pages of a history up to there.
void PageManager::write_down_long(std::int32_t run, std::int64_t end) const {
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
    const std::int32_t beyond = end > kLongRun ? run_before(first) : kNoRun;
    runs_[run].beyond = beyond;
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
