// Random operations on a PageManager beside a naive model, to be built with the sanitizers.
//
//     random_operations OPERATIONS ROUNDS SEED
//
// The model keeps the tokens and the pages of each slot, and a memory of one value per (page,
// offset), written and copied only as the manager says. The value is a hash of the token and all
// tokens before it, as keys and values follow from them. Prints how often each thing happened;
// exits 1, naming the broken statement, if manager and model disagree.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "page_manager.h"
#include "plan.h"
#include "random_rounds.h"

namespace {

using Ints = std::vector<std::int32_t>;

#define REQUIRE(statement)                                                        \
    do {                                                                          \
        if (!(statement)) {                                                       \
            std::fprintf(stderr, "line %d: not true: %s\n", __LINE__, #statement); \
            std::exit(1);                                                         \
        }                                                                         \
    } while (false)

struct World {
    World(std::mt19937_64& random, std::map<std::string, long>& happened)
        : random(random),
          happened(happened),
          page_size(pick(1, 6)),
          capacity(page_size * pick(1, 8)),
          manager(pick(1, 64), page_size, pick(1, 16), capacity / page_size, pick(0, 3) > 0,
                  pick(0, 1) ? 64 : pick(0, 3)),
          memory(static_cast<std::size_t>(manager.num_pages() * page_size), 0) {}

    // FNV-1a, token by token: the value at each position.
    static std::vector<std::uint64_t> values(const Ints& tokens) {
        std::vector<std::uint64_t> result;
        std::uint64_t value = 0xcbf29ce484222325;
        for (const std::int32_t token : tokens) {
            value = (value ^ static_cast<std::uint64_t>(token)) * 0x100000001b3;
            result.push_back(value);
        }
        return result;
    }

    std::int32_t pick(std::int64_t least, std::int64_t most) {
        return static_cast<std::int32_t>(
            std::uniform_int_distribution<std::int64_t>(least, most)(random));
    }

    Ints some_slots() {
        Ints slots;
        const std::int32_t one_in = pick(1, 4);
        for (const auto& [slot, _] : tokens) {
            if (pick(1, one_in) == 1) slots.push_back(slot);
        }
        std::shuffle(slots.begin(), slots.end(), random);
        return slots;
    }

    Ints amounts(const Ints& slots, std::int32_t most) {
        Ints result;
        for (std::size_t i = 0; i < slots.size(); ++i) result.push_back(pick(0, most));
        return result;
    }

    std::int64_t pages_of(std::int64_t length) const {
        return (length + page_size - 1) / page_size;
    }

    // The manager's own.
    Ints table(std::int32_t slot) const {
        Ints row(static_cast<std::size_t>(manager.held()[slot]));
        manager.copy_table(slot, 0, row.data());
        return row;
    }

    std::set<std::int32_t> in_use() const {
        std::set<std::int32_t> result;
        for (const auto& [_, own] : pages) result.insert(own.begin(), own.end());
        return result;
    }

    void copy(const std::vector<w2s::PageCopy>& copies) {
        std::set<std::int32_t> sources;
        std::set<std::int32_t> destinations;
        for (const auto [source, destination] : copies) {
            sources.insert(source);
            REQUIRE(destinations.insert(destination).second);
            std::copy_n(memory.begin() + source * page_size, page_size,
                        memory.begin() + destination * page_size);
        }
        for (const std::int32_t page : destinations) REQUIRE(!sources.contains(page));
    }

    void step() {
        try {
            switch (pick(0, 19)) {
                case 0: allocate(); break;
                case 1: case 2: case 3: grow(); break;
                case 4: case 5: fork(); break;
                case 6: case 7: truncate(); break;
                case 8: reserve_ahead(); break;
                case 9: trim(); break;
                case 10: case 11: release(); break;
                case 12: misuse(); break;
                case 13: case 14: case 15: case 16: request(); break;
                case 17: remember(); break;
                case 18: adopt(); break;
                case 19: truncate(); grow(); break;
            }
        } catch (const w2s::OutOfPages&) {
            ++happened["out of pages"];
        } catch (const w2s::PageMisuse&) {
            ++happened["misuse"];
        }
    }

    void allocate() {
        for (const std::int32_t slot : manager.allocate(pick(0, 3))) {
            REQUIRE(tokens.emplace(slot, Ints{}).second);
            pages[slot].clear();
        }
        ++happened["allocate"];
    }

    void reserve(const Ints& slots, const Ints& counts) {
        const std::int64_t needed = manager.pages_needed(slots, counts);
        const std::int64_t free = manager.free_pages();
        const auto copies = manager.reserve(slots, counts);
        // A cached page that was copied may be left without a slot, and then it is free again.
        const std::int64_t left = manager.free_pages() - (free - needed);
        REQUIRE(left >= 0 && left <= std::ssize(copies));
        copy(copies);
        happened["copied on write"] += static_cast<long>(copies.size());
        const std::set<std::int32_t> before = in_use();
        std::set<std::int32_t> used = before;
        const auto fresh = [&](std::int32_t page) { return used.insert(page).second; };
        auto next = copies.begin();
        for (std::size_t i = 0; i < slots.size(); ++i) {
            if (counts[i] == 0) continue;
            const auto length = std::ssize(tokens[slots[i]]);
            Ints& own = pages[slots[i]];
            if (next != copies.end() && length % page_size != 0 && own.back() == next->source) {
                REQUIRE(std::ssize(own) == pages_of(length) && fresh(next->destination));
                own.back() = next++->destination;
            }
            const Ints now = table(slots[i]);
            while (std::ssize(own) < pages_of(length + counts[i])) {
                REQUIRE(own.size() < now.size() && fresh(now[own.size()]));
                own.push_back(now[own.size()]);
            }
        }
        REQUIRE(next == copies.end() && std::ssize(used) == std::ssize(before) + needed);
    }

    void reserve_ahead() {
        const Ints slots = some_slots();
        reserve(slots, amounts(slots, 3 * page_size));
        ++happened["reserve"];
    }

    void grow() {
        const Ints slots = some_slots();
        const Ints counts = amounts(slots, 2 * page_size);
        // Sometimes without reserving: then it works only where enough was reserved before.
        if (pick(0, 3) > 0) reserve(slots, counts);
        std::int32_t total = 0;
        for (const std::int32_t count : counts) total += count;
        write(slots, counts, amounts(Ints(static_cast<std::size_t>(total)), pick(0, 1)));
    }

    void write(const Ints& slots, const Ints& counts, const Ints& written) {
        const std::vector<std::int64_t> where = manager.places(slots, counts);
        lay_out(slots, counts, where);
        manager.extend(slots, counts);
        REQUIRE(where.size() == written.size());
        std::size_t next = 0;
        for (std::size_t i = 0; i < slots.size(); ++i) {
            Ints& own = tokens[slots[i]];
            const auto begin = written.begin() + static_cast<std::ptrdiff_t>(next);
            own.insert(own.end(), begin, begin + counts[i]);
            const std::vector<std::uint64_t> expected = values(own);
            for (std::size_t n = own.size() - counts[i]; n < own.size(); ++n) {
                memory[where[next++]] = expected[n];
            }
        }
        ++happened["extend"];
    }

    // A tree of two levels over these slots: runs of rows, and runs of those.
    struct Tree {
        Ints first, count, begin, end, own;
    };

    Tree some_tree(const Ints& slots) {
        Tree tree;
        const std::int32_t rows = static_cast<std::int32_t>(slots.size());
        tree.own.assign(slots.size(), 0);
        std::vector<bool> border(slots.size() + 1, false);
        border[slots.size()] = true;
        for (int level = 0; level < 2; ++level) {
            for (std::int32_t row = 0; row < rows; ++row) border[row] = border[row] || !pick(0, 2);
            for (std::int32_t first = 0, last = 0; first < rows; first = last) {
                std::int32_t shortest = manager.lengths()[slots[first]];
                for (last = first + 1; !border[last]; ++last) {
                    shortest = std::min(shortest, manager.lengths()[slots[last]]);
                }
                const std::int32_t end = pick(tree.own[first], shortest);
                if (end == tree.own[first]) continue;
                tree.first.push_back(first);
                tree.count.push_back(last - first);
                tree.begin.push_back(tree.own[first]);
                tree.end.push_back(end);
                std::fill(tree.own.begin() + first, tree.own.begin() + last, end);
            }
        }
        return tree;
    }

    // A pass over these slots, in a buffer that is just large enough.
    void lay_out(const Ints& slots, const Ints& counts, const std::vector<std::int64_t>& where) {
        Tree tree = some_tree(slots);
        const bool spoilt = !tree.first.empty() && pick(0, 4) == 0;
        if (spoilt) {  // refused, or a tree all the same
            Ints* const columns[] = {&tree.first, &tree.count, &tree.begin, &tree.end, &tree.own};
            Ints& column = *columns[pick(0, 4)];
            column[static_cast<std::size_t>(pick(0, std::ssize(column) - 1))] += pick(-3, 3);
            if (pick(0, 3) == 0) column.pop_back();
        }
        const std::int32_t split_queries = pick(0, 2 * page_size);
        try {
            const w2s::RowTree shared{tree.first, tree.count, tree.begin, tree.end, tree.own};
            const w2s::PassLayout layout(manager, slots, counts, shared, pick(1, 5), split_queries,
                                         pick(0, 3));
            fill_in(layout, slots, counts, where);
        } catch (const w2s::PageMisuse&) {
            REQUIRE(spoilt);
            ++happened["tree refused"];
        }
    }

    void fill_in(const w2s::PassLayout& layout, const Ints& slots, const Ints& counts,
                 const std::vector<std::int64_t>& where) {
        w2s::PassShape room = layout.shape();
        REQUIRE(room.rows == std::ssize(slots) && room.tokens == std::ssize(where));
        room.rows += pick(0, 3);
        room.tokens += pick(0, 3);
        room.splits += pick(0, 3);
        room.pages += pick(0, 3);
        const std::vector<std::int64_t> sizes{
            8 * room.tokens, 8 * room.tokens, 8 * room.tokens, 4 * room.pages, 4 * room.rows,
            4 * room.rows, 4 * (room.rows + 1), 4 * room.rows, 4 * room.rows, 4 * room.tokens,
            24 * room.splits};
        std::vector<std::int64_t> offsets;
        std::int64_t bytes = 0;
        for (std::size_t i = 0; i < sizes.size(); ++i) {
            const bool left_out = i != 1 && i != 3 && i != 4 && pick(0, 5) == 0;
            offsets.push_back(left_out ? -1 : bytes);
            if (!left_out) bytes += (sizes[i] + 7) / 8 * 8;
        }
        std::vector<std::byte> buffer(static_cast<std::size_t>(bytes));
        layout.write(buffer, offsets, room, pick(0, 1));
        const auto* write = reinterpret_cast<const std::int64_t*>(buffer.data() + offsets[1]);
        for (std::int64_t i = 0; i < room.tokens; ++i) {
            REQUIRE(write[i] == (i < std::ssize(where) ? where[i] : -1));
        }
        const auto* table = reinterpret_cast<const std::int32_t*>(buffer.data() + offsets[3]);
        const auto* start = reinterpret_cast<const std::int32_t*>(buffer.data() + offsets[4]);
        std::int64_t entries = 0;
        for (std::int64_t row = 0; row < room.rows; ++row) {
            if (row >= std::ssize(slots)) {
                REQUIRE(start[row] == 0);
                continue;
            }
            const std::int64_t first = entries - start[row];
            REQUIRE(0 <= first && first <= manager.lengths()[slots[row]] / page_size);
            for (std::int64_t page = first; page < manager.held()[slots[row]]; ++page) {
                REQUIRE(table[entries++] == pages[slots[row]][page]);
            }
        }
        REQUIRE(entries == layout.shape().pages);
        for (const std::int32_t count : counts) REQUIRE(count <= layout.max_q());
        happened["pass laid out"] += 1;
        happened["splits"] += layout.shape().splits;
        room.tokens = layout.shape().tokens - 1;
        try {
            layout.write(buffer, offsets, room, false);
        } catch (const w2s::PageMisuse&) {
            return;
        }
        REQUIRE(!"a pass was laid out where it has no room");
    }

    // Tokens that begin like a slot's, or like nothing, and have room in a slot.
    Ints prompt() {
        Ints result;
        if (!tokens.empty() && pick(0, 2) > 0) {
            result = std::next(tokens.begin(), pick(0, std::ssize(tokens) - 1))->second;
            result.resize(static_cast<std::size_t>(pick(0, std::ssize(result))));
        }
        const Ints more = amounts(Ints(static_cast<std::size_t>(pick(0, 3 * page_size))), 1);
        result.insert(result.end(), more.begin(), more.end());
        if (std::ssize(result) > capacity) result.resize(static_cast<std::size_t>(capacity));
        return result;
    }

    // What it returns is checked by compare(): the slot then reads back these tokens.
    Ints adopt_prompts(const Ints& slots, const std::vector<Ints>& prompts) {
        Ints flat;
        Ints counts;
        for (const Ints& prompt : prompts) {
            flat.insert(flat.end(), prompt.begin(), prompt.end());
            counts.push_back(static_cast<std::int32_t>(prompt.size()));
        }
        const Ints matched = manager.match(flat, counts);
        const Ints adopted = manager.adopt(slots, flat, counts);
        REQUIRE(adopted == matched);
        for (std::size_t i = 0; i < slots.size(); ++i) {
            REQUIRE(tokens[slots[i]].empty() && adopted[i] % page_size == 0);
            tokens[slots[i]].assign(prompts[i].begin(), prompts[i].begin() + adopted[i]);
            REQUIRE(pages[slots[i]].empty());
            pages[slots[i]] = table(slots[i]);
            REQUIRE(std::ssize(pages[slots[i]]) == adopted[i] / page_size);
            happened["pages adopted"] += adopted[i] / page_size;
        }
        return adopted;
    }

    void adopt() {
        const Ints slots = some_slots();  // often not empty: refused
        std::vector<Ints> prompts;
        for (std::size_t i = 0; i < slots.size(); ++i) prompts.push_back(prompt());
        adopt_prompts(slots, prompts);
    }

    void remember_slots(const Ints& slots, const Ints& counts) {
        Ints flat;
        for (std::size_t i = 0; i < slots.size(); ++i) {
            const Ints& own = tokens[slots[i]];
            flat.insert(flat.end(), own.begin(), own.begin() + counts[i]);
        }
        const std::int64_t before = manager.cached_pages();
        const std::int64_t added = manager.remember(slots, flat, counts);
        REQUIRE(manager.cached_pages() == before + added);
        happened["pages remembered"] += added;
        // Said to be other tokens than those cached: refused, unless nothing is cached.
        if (!flat.empty() && manager.cached_pages() > 0 && pick(0, 3) == 0) {
            for (std::int32_t& token : flat) token += 2;
            const std::int64_t wrong = manager.cached_pages();
            try {
                if (manager.remember(slots, flat, counts) > 0) manager.drop_cache();
            } catch (const w2s::PageMisuse&) {
                REQUIRE(manager.cached_pages() == wrong);
                ++happened["misremembered"];
            }
        }
    }

    void remember() {
        const Ints slots = some_slots();
        Ints counts;
        for (const std::int32_t slot : slots) counts.push_back(pick(0, std::ssize(tokens[slot])));
        remember_slots(slots, counts);
        if (pick(0, 4) == 0) {
            manager.drop_cache();
            REQUIRE(manager.cached_pages() == 0);
            ++happened["cache dropped"];
        }
    }

    // As a request begins, and sometimes ends at once.
    void request() {
        const std::int64_t evicted = manager.cache_statistics().evictions;
        const Ints slot = manager.allocate(1);
        tokens[slot[0]] = {};
        pages[slot[0]] = {};
        const Ints whole = prompt();
        const Ints adopted = adopt_prompts(slot, {whole});
        const Ints rest(whole.begin() + adopted[0], whole.end());
        const Ints count{static_cast<std::int32_t>(rest.size())};
        reserve(slot, count);
        write(slot, count, rest);
        remember_slots(slot, {static_cast<std::int32_t>(whole.size())});
        if (pick(0, 3) > 0) {
            manager.release(slot);
            tokens.erase(slot[0]);
            pages.erase(slot[0]);
        }
        happened["evicted"] += manager.cache_statistics().evictions - evicted;
    }

    void fork() {
        const Ints slots = some_slots();
        const Ints counts = amounts(slots, 2);
        const w2s::ForkResult result = manager.fork(slots, counts);
        copy(result.copies);
        std::set<std::int32_t> used = in_use();
        auto next = result.copies.begin();
        auto child = result.children.begin();
        for (std::size_t i = 0; i < slots.size(); ++i) {
            for (std::int32_t n = 0; n < counts[i]; ++n) {
                const Ints inherited = tokens[slots[i]];
                Ints shared = pages[slots[i]];
                shared.resize(static_cast<std::size_t>(pages_of(std::ssize(inherited))));
                if (std::ssize(inherited) % page_size != 0) {
                    REQUIRE(next != result.copies.end() && next->source == shared.back());
                    shared.back() = next++->destination;
                    REQUIRE(used.insert(shared.back()).second);
                }
                pages[*child] = shared;
                REQUIRE(tokens.emplace(*child++, inherited).second);
            }
        }
        REQUIRE(child == result.children.end() && next == result.copies.end());
        ++happened["fork"];
    }

    void truncate() {
        const Ints slots = some_slots();
        Ints lengths;
        for (const std::int32_t slot : slots) {
            const auto length = static_cast<std::int64_t>(tokens[slot].size());
            lengths.push_back(pick(std::max<std::int64_t>(0, length - 2 * page_size), length));
        }
        manager.truncate(slots, lengths);
        for (std::size_t i = 0; i < slots.size(); ++i) {
            tokens[slots[i]].resize(static_cast<std::size_t>(lengths[i]));
            pages[slots[i]].resize(static_cast<std::size_t>(pages_of(lengths[i])));
        }
        ++happened["truncate"];
    }

    void trim() {
        const Ints slots = some_slots();
        manager.trim(slots);
        for (const std::int32_t slot : slots) {
            pages[slot].resize(static_cast<std::size_t>(pages_of(std::ssize(tokens[slot]))));
        }
        ++happened["trim"];
    }

    void release() {
        Ints slots = some_slots();
        slots.resize((slots.size() + 1) / 2);
        manager.release(slots);
        for (const std::int32_t slot : slots) {
            tokens.erase(slot);
            pages.erase(slot);
        }
        ++happened["release"];
    }

    void misuse() {
        if (!tokens.empty() && pick(0, 1) == 0) {
            const std::int32_t slot = tokens.begin()->first;
            const Ints twice{slot, slot};
            const Ints none{0, 0};
            switch (pick(0, 3)) {
                case 0: manager.reserve(twice, none); break;
                case 1: manager.fork(twice, none); break;
                case 2: manager.truncate(twice, none); break;
                case 3: manager.release(twice); break;
            }
            REQUIRE(!"a slot given twice was accepted");
        }
        // Numbers from anywhere: no slot has room for so many tokens.
        const Ints slots = amounts(Ints(static_cast<std::size_t>(pick(1, 3))), 20);
        Ints counts;
        for (std::size_t i = 0; i < slots.size(); ++i) {
            counts.push_back(pick(0, 1) ? pick(INT32_MIN, INT32_MAX) : -1);
        }
        switch (pick(0, 4)) {
            case 0: manager.reserve(slots, counts); break;
            case 1: manager.extend(slots, counts); break;
            case 2: manager.fork(slots, counts); break;
            case 3: manager.truncate(slots, counts); break;
            case 4: manager.allocate(counts[0]); break;
        }
        REQUIRE(!"a nonsensical call was accepted");
    }

    void compare() {
        manager.check();
        Ints slots;
        std::size_t width = 0;
        const auto all = static_cast<std::size_t>(manager.num_pages());
        Ints before(all, w2s::PageManager::kNoPage);  // of each page: the one that it follows
        Ints holders(all, 0);
        for (std::int32_t slot = 0; slot < manager.max_slots(); ++slot) {
            const auto found = tokens.find(slot);
            REQUIRE((found == tokens.end()) == (manager.held()[slot] < 0));
            if (found == tokens.end()) continue;
            const Ints& own = pages[slot];
            REQUIRE(table(slot) == own);
            const std::int32_t begin = pick(0, std::ssize(own));
            Ints end(own.size() - begin);
            manager.copy_table(slot, begin, end.data());
            REQUIRE(std::equal(end.begin(), end.end(), own.begin() + begin));
            slots.push_back(slot);
            width = std::max(width, own.size());
            for (std::size_t i = 1; i < own.size(); ++i) before[own[i]] = own[i - 1];
            if (!own.empty()) ++holders[own.back()];
            const auto length = static_cast<std::int32_t>(found->second.size());
            REQUIRE(manager.lengths()[slot] == length);
            const std::vector<std::uint64_t> expected = values(found->second);
            for (std::int32_t i = 0; i < length; ++i) {
                const std::int64_t where = own[i / page_size] * page_size + i % page_size;
                REQUIRE(memory[where] == expected[i]);
            }
        }
        REQUIRE(manager.free_pages() == manager.num_pages() - std::ssize(in_use()));
        for (const std::int32_t page : before) {
            if (page != w2s::PageManager::kNoPage) ++holders[page];
        }
        for (std::size_t i = 0; i < holders.size(); ++i) {
            REQUIRE(holders[i] == manager.holders()[i * w2s::PageManager::kPageStride]);
        }
        Ints tables;
        for (const std::int32_t slot : slots) {
            tables.insert(tables.end(), pages[slot].begin(), pages[slot].end());
            tables.resize(tables.size() + width - pages[slot].size(), w2s::PageManager::kNoPage);
        }
        REQUIRE(manager.page_table(slots) == tables);
    }

    void finish() {
        Ints slots;
        for (const auto& [slot, _] : tokens) slots.push_back(slot);
        manager.release(slots);
        manager.check();
        REQUIRE(manager.used_pages() == 0 && manager.free_slots() == manager.max_slots());
    }

    std::mt19937_64& random;
    std::map<std::string, long>& happened;
    const std::int64_t page_size;
    const std::int64_t capacity;
    w2s::PageManager manager;
    std::vector<std::uint64_t> memory;
    std::map<std::int32_t, Ints> tokens;  // of each live slot
    std::map<std::int32_t, Ints> pages;   // of each live slot, reserved ones too
};

}  // namespace

int main(int argc, char** argv) {
    if (argc != 4) return 2;
    const long operations = std::atol(argv[1]);
    std::mt19937_64 random(std::strtoull(argv[3], nullptr, 10));
    std::map<std::string, long> happened;
    for (long done = 0; done < operations;) {
        World world(random, happened);
        for (int i = 0; i < 500; ++i, ++done) {
            world.step();
            world.compare();
        }
        world.finish();
    }
    random_rounds(std::atol(argv[2]), random, happened);
    for (const auto& [what, count] : happened) std::printf("%s: %ld\n", what.c_str(), count);
    return 0;
}
