#include "draw.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

namespace w2s {

DrawLayout::DrawLayout(Requests requests, Beams::Managers managers)
    : requests_(std::move(requests)), managers_(std::move(managers)), of_models_(managers_.size()) {
    if (managers_.empty()) throw PageMisuse("there is no model to draw from");
    for (std::size_t m = 0; m < models(); ++m) {
        Sources& sources = of_models_[m].sources;
        sources = lay_out_sources(requests_, *managers_[m], static_cast<int>(m));
        tokens_ = std::max<std::int64_t>(tokens_, std::ssize(sources.tokens));
        for (const std::int32_t count : sources.counts) {
            max_new_ = std::max<std::int64_t>(max_new_, count);
        }
    }
    const Int32s& children = of_models_.front().sources.children;
    rows_ = std::accumulate(children.begin(), children.end(), std::int64_t{0});
}

void DrawLayout::begin(std::int64_t steps, std::int64_t split_keys, std::int64_t split_queries) {
    if (steps < 2) throw PageMisuse("rows that grow by one token append none");
    for (std::size_t m = 0; m < models(); ++m) {
        PageManager& manager = *managers_[m];
        auto& [sources, source_pass, row_pass, before, copies] = of_models_[m];
        before = manager.reserve(sources.slots, sources.counts);
        const TreeSegments of_sources = sources.levels.tree();
        source_pass.emplace(manager, sources.slots, sources.counts, view(of_sources), split_keys,
                            split_queries, 0);
        manager.extend(sources.slots, sources.counts);
        copies = fork_beams(requests_, manager, static_cast<int>(m));
        GrowingRows growing = lay_out_rows(requests_, static_cast<int>(m));
        const Int32s one(growing.slots.size(), 1);
        const Int32s all(growing.slots.size(), static_cast<std::int32_t>(steps - 1));
        const std::vector<PageCopy> own = manager.reserve(growing.slots, all);
        copies.insert(copies.end(), own.begin(), own.end());
        const TreeSegments of_rows = growing.levels.tree();
        row_pass.emplace(manager, growing.slots, one, view(of_rows), split_keys, split_queries,
                         steps - 2);
        manager.extend(growing.slots, all);
        if (m == 0) growing_ = std::move(growing);
    }
}

DrawBuckets DrawLayout::buckets(const SplitRule& rule, std::int64_t rows, std::int64_t sources,
                                std::int64_t most, std::span<const std::int64_t> most_pages) const {
    if (most_pages.size() != models()) throw PageMisuse("pages of a row in each model");
    DrawBuckets found;
    for (std::size_t m = 0; m < models(); ++m) {
        const Bucket& step = found.rows.emplace_back(
            bucket_of(rule, row_pass(m).bounds(), rows, rows, most_pages[m]));
        const PassBounds bounds = source_pass(m).bounds();
        const std::int64_t tokens = std::min(round_up_tokens(bounds.tokens), most);
        Bucket own = bucket_of(rule, bounds, sources, tokens, most_pages[m]);
        // Few shapes: what there is room for depends on the rows alone, as long as that is enough.
        if (own.splits > 0) own.splits = std::max(own.splits, step.splits);
        own.pages = std::max(own.pages, step.pages);
        found.sources.push_back(own);
    }
    return found;
}

bool DrawLayout::some_plausible() const {
    return std::ranges::any_of(growing_.plausibility,
                               [](float share) { return share > -INFINITY; });
}

bool DrawLayout::some_dynamic() const {
    return std::ranges::any_of(growing_.dynamic, [](std::uint8_t chosen) { return chosen != 0; });
}

void DrawLayout::write_settings(std::span<std::byte> buffer, Columns columns,
                                std::int64_t rows) const {
    const bool fuses = !growing_.dynamic.empty();
    if (columns.size() !=
        static_cast<std::size_t>(fuses ? RowColumn::kCount : RowColumn::kBeta)) {
        throw PageMisuse("rows have other columns");
    }
    const auto put = [&](RowColumn column, const auto& values, auto spare, std::int64_t each = 1) {
        const std::int64_t offset = columns[static_cast<std::size_t>(column)];
        const std::int64_t items = rows * each;
        fill(field_of<decltype(spare)>(buffer, offset, items), values, items, spare);
    };
    put(RowColumn::kTemperature, growing_.temperature, 0.0F);
    put(RowColumn::kTopK, growing_.top_k, std::int64_t{0});
    put(RowColumn::kTopP, growing_.top_p, 1.0);  // a setting has to be allowed
    put(RowColumn::kMinP, growing_.min_p, 0.0);
    put(RowColumn::kSeed, growing_.seed, std::int64_t{0});
    put(RowColumn::kCandidate, growing_.candidate, std::int64_t{0});
    put(RowColumn::kPosition, growing_.position, std::int64_t{0});
    *field_of<std::int64_t>(buffer, columns[static_cast<std::size_t>(RowColumn::kTaken)], 1) = 0;
    if (!fuses) return;
    const std::int64_t growing = std::ssize(growing_.dynamic);
    if (growing != rows_ || growing_.betas.size() % static_cast<std::size_t>(growing) != 0) {
        throw PageMisuse("a row says nothing of how logits are fused");
    }
    put(RowColumn::kBeta, growing_.betas, 0.0F, std::ssize(growing_.betas) / growing);
    put(RowColumn::kPlausibility, growing_.plausibility, -INFINITY);
    put(RowColumn::kDynamic, growing_.dynamic, std::uint8_t{0});
}

void DrawLayout::write_rows(std::span<std::byte> buffer,
                            const std::vector<const PassRoom*>& rooms,
                            const std::vector<Columns>& columns) const {
    if (rooms.size() != models() || columns.size() != models()) {
        throw PageMisuse("there is room for other models");
    }
    for (std::size_t m = 0; m < models(); ++m) {
        const PassRoom& room = *rooms[m];
        row_pass(m).write(buffer, room.offsets, room.shape, true);  // it has checked that rows fit
        if (m > 0 && columns[m].size() != 1) throw PageMisuse("rows have other columns");
        if (m == 0) write_settings(buffer, columns[m], room.shape.rows);
        const std::size_t of_copies = m == 0 ? static_cast<std::size_t>(RowColumn::kCopies) : 0;
        write_copies(buffer, columns[m][of_copies], copies(m), room.shape.rows);
    }
}

void DrawLayout::write_sources(std::span<std::byte> buffer,
                               const std::vector<const PassRoom*>& rooms,
                               const std::vector<Columns>& columns, std::int64_t rows) const {
    if (rooms.size() != models() || columns.size() != models()) {
        throw PageMisuse("there is room for other models");
    }
    if (rows < rows_) throw PageMisuse("there are more rows than there is room for");
    for (std::size_t m = 0; m < models(); ++m) {
        const PassRoom& room = *rooms[m];
        const Sources& sources = at(m).sources;
        const auto wanted = static_cast<std::size_t>(m == 0 ? SourceColumn::kCount
                                                            : SourceColumn::kSource);
        if (columns[m].size() != wanted) throw PageMisuse("sources have other columns");
        source_pass(m).write(buffer, room.offsets, room.shape, false);
        const auto field = [&](SourceColumn column, std::int64_t items) {
            return field_of<std::int64_t>(buffer, columns[m][static_cast<std::size_t>(column)],
                                          items);
        };
        fill(field(SourceColumn::kTokens, room.shape.tokens), sources.tokens, room.shape.tokens,
             std::int64_t{0});
        std::int64_t* const last = field(SourceColumn::kLast, room.shape.rows);
        std::int64_t tokens = 0;
        for (std::size_t i = 0; i < sources.counts.size(); ++i) {
            tokens += sources.counts[i];
            last[i] = tokens - 1;
        }
        std::fill(last + sources.counts.size(), last + room.shape.rows, 0);
        if (m > 0) continue;
        std::int64_t* row = field(SourceColumn::kSource, rows);
        std::int64_t* const end = row + rows;
        for (std::size_t i = 0; i < sources.children.size(); ++i) {
            row = std::fill_n(row, sources.children[i], static_cast<std::int64_t>(i));
        }
        std::fill(row, end, 0);
    }
}

}  // namespace w2s
