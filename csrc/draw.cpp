#include "draw.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace w2s {

DrawLayout::DrawLayout(Requests requests, PageManager& base)
    : requests_(std::move(requests)), base_(base), sources_(lay_out_sources(requests_, base, 0)) {
    const auto& [slots, counts, children, tokens, levels] = sources_;
    rows_ = std::accumulate(children.begin(), children.end(), std::int64_t{0});
    max_new_ = counts.empty() ? 0 : *std::max_element(counts.begin(), counts.end());
}

void DrawLayout::begin(std::int64_t steps, std::int64_t split_keys, std::int64_t split_queries) {
    if (steps < 2) throw PageMisuse("rows that grow by one token append none");
    before_ = base_.reserve(sources_.slots, sources_.counts);
    const TreeSegments of_sources = sources_.levels.tree();
    source_pass_.emplace(base_, sources_.slots, sources_.counts, view(of_sources), split_keys,
                         split_queries, 0);
    base_.extend(sources_.slots, sources_.counts);
    copies_ = fork_beams(requests_, base_, 0);
    growing_ = lay_out_rows(requests_, 0);
    const Int32s one(growing_.slots.size(), 1);
    const Int32s all(growing_.slots.size(), static_cast<std::int32_t>(steps - 1));
    const std::vector<PageCopy> own = base_.reserve(growing_.slots, all);
    copies_.insert(copies_.end(), own.begin(), own.end());
    const TreeSegments of_rows = growing_.levels.tree();
    row_pass_.emplace(base_, growing_.slots, one, view(of_rows), split_keys, split_queries,
                      steps - 2);
    base_.extend(growing_.slots, all);
}

void DrawLayout::write_rows(std::span<std::byte> buffer, const PassRoom& room,
                            std::span<const std::int64_t> columns) const {
    if (columns.size() != static_cast<std::size_t>(RowColumn::kCount)) {
        throw PageMisuse("rows have other columns");
    }
    const std::int64_t rows = room.shape.rows;
    const auto put = [&](RowColumn column, const auto& values, auto spare) {
        const std::int64_t offset = columns[static_cast<std::size_t>(column)];
        fill(field_of<decltype(spare)>(buffer, offset, rows), values, rows, spare);
    };
    row_pass().write(buffer, room.offsets, room.shape, true);  // it has checked that rows fit
    put(RowColumn::kTemperature, growing_.temperature, 0.0F);
    put(RowColumn::kTopK, growing_.top_k, std::int64_t{0});
    put(RowColumn::kTopP, growing_.top_p, 1.0);  // a setting has to be allowed
    put(RowColumn::kMinP, growing_.min_p, 0.0);
    put(RowColumn::kSeed, growing_.seed, std::int64_t{0});
    put(RowColumn::kCandidate, growing_.candidate, std::int64_t{0});
    put(RowColumn::kPosition, growing_.position, std::int64_t{0});
    *field_of<std::int64_t>(buffer, columns[static_cast<std::size_t>(RowColumn::kTaken)], 1) = 0;
    std::int32_t* copy = field_of<std::int32_t>(
        buffer, columns[static_cast<std::size_t>(RowColumn::kCopies)], 2 * rows);
    if (std::ssize(copies_) > rows) throw PageMisuse("a row copies one page at most");
    std::int32_t* const end = copy + 2 * rows;
    for (const auto [source, destination] : copies_) {
        *copy++ = source;
        *copy++ = destination;
    }
    std::fill(copy, end, -1);
}

void DrawLayout::write_sources(std::span<std::byte> buffer, const PassRoom& room,
                               std::span<const std::int64_t> columns, std::int64_t rows) const {
    if (columns.size() != static_cast<std::size_t>(SourceColumn::kCount)) {
        throw PageMisuse("sources have other columns");
    }
    if (rows < rows_) throw PageMisuse("there are more rows than there is room for");
    source_pass().write(buffer, room.offsets, room.shape, false);
    const auto at = [&](SourceColumn column, std::int64_t items) {
        return field_of<std::int64_t>(buffer, columns[static_cast<std::size_t>(column)], items);
    };
    fill(at(SourceColumn::kTokens, room.shape.tokens), sources_.tokens, room.shape.tokens,
         std::int64_t{0});
    std::int64_t* const last = at(SourceColumn::kLast, room.shape.rows);
    std::int64_t* row = at(SourceColumn::kSource, rows);
    std::int64_t* const end = row + rows;
    std::int64_t tokens = 0;
    for (std::size_t i = 0; i < sources_.counts.size(); ++i) {
        tokens += sources_.counts[i];
        last[i] = tokens - 1;
        row = std::fill_n(row, sources_.children[i], static_cast<std::int64_t>(i));
    }
    std::fill(last + sources_.counts.size(), last + room.shape.rows, 0);
    std::fill(row, end, 0);
}

}  // namespace w2s
