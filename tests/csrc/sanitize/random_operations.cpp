// Random operations on a PageManager beside a naive model, to be built with the sanitizers.
//
//     random_operations OPERATIONS SEED
//
// The model keeps the tokens of each slot and a memory of one value per (page, offset), written
// and copied only as the manager says. Prints how often each thing happened; exits 1, naming the
// broken statement, if manager and model disagree.
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
          manager(pick(1, 64), page_size, pick(1, 16), capacity / page_size),
          memory(static_cast<std::size_t>(manager.num_pages() * page_size), -1) {}

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
            switch (pick(0, 11)) {
                case 0: allocate(); break;
                case 1: case 2: case 3: grow(); break;
                case 4: case 5: fork(); break;
                case 6: case 7: truncate(); break;
                case 8: reserve_ahead(); break;
                case 9: trim(); break;
                case 10: release(); break;
                case 11: misuse(); break;
            }
        } catch (const w2s::OutOfPages&) {
            ++happened["out of pages"];
        } catch (const w2s::PageMisuse&) {
            ++happened["misuse"];
        }
    }

    void allocate() {
        for (const std::int32_t slot : manager.allocate(pick(0, 3))) {
            REQUIRE(tokens.emplace(slot, std::vector<std::int64_t>{}).second);
        }
        ++happened["allocate"];
    }

    void reserve(const Ints& slots, const Ints& counts) {
        const std::int64_t needed = manager.pages_needed(slots, counts);
        const std::int64_t free = manager.free_pages();
        const auto copies = manager.reserve(slots, counts);
        REQUIRE(manager.free_pages() == free - needed);
        copy(copies);
        happened["copied on write"] += static_cast<long>(copies.size());
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
        const std::vector<std::int64_t> where = manager.slot_mapping(slots, counts);
        manager.extend(slots, counts);
        auto position = where.begin();
        for (std::size_t i = 0; i < slots.size(); ++i) {
            for (std::int32_t n = 0; n < counts[i]; ++n) {
                memory[*position++] = next_token;
                tokens[slots[i]].push_back(next_token++);
            }
        }
        REQUIRE(position == where.end());
        ++happened["extend"];
    }

    void fork() {
        const Ints slots = some_slots();
        const Ints counts = amounts(slots, 2);
        const w2s::ForkResult result = manager.fork(slots, counts);
        copy(result.copies);
        auto child = result.children.begin();
        for (std::size_t i = 0; i < slots.size(); ++i) {
            for (std::int32_t n = 0; n < counts[i]; ++n) {
                const std::vector<std::int64_t> inherited = tokens[slots[i]];
                REQUIRE(tokens.emplace(*child++, inherited).second);
            }
        }
        REQUIRE(child == result.children.end());
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
            REQUIRE(manager.held()[slots[i]] == pages_of(lengths[i]));
        }
        ++happened["truncate"];
    }

    void trim() {
        const Ints slots = some_slots();
        manager.trim(slots);
        for (const std::int32_t slot : slots) {
            REQUIRE(manager.held()[slot] == pages_of(manager.lengths()[slot]));
        }
        ++happened["trim"];
    }

    void release() {
        Ints slots = some_slots();
        slots.resize((slots.size() + 1) / 2);
        manager.release(slots);
        for (const std::int32_t slot : slots) tokens.erase(slot);
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
        std::vector<std::int32_t> owners(static_cast<std::size_t>(manager.num_pages()), 0);
        for (std::int32_t slot = 0; slot < manager.max_slots(); ++slot) {
            const auto found = tokens.find(slot);
            REQUIRE((found == tokens.end()) == (manager.held()[slot] < 0));
            if (found == tokens.end()) continue;
            const std::int32_t* row = manager.page_table() + slot * manager.max_pages_per_slot();
            for (std::int32_t i = 0; i < manager.held()[slot]; ++i) ++owners[row[i]];
            const auto length = static_cast<std::int32_t>(found->second.size());
            REQUIRE(manager.lengths()[slot] == length);
            for (std::int32_t i = 0; i < length; ++i) {
                const std::int64_t where = row[i / page_size] * page_size + i % page_size;
                REQUIRE(memory[where] == found->second[i]);
            }
        }
        REQUIRE(std::equal(owners.begin(), owners.end(), manager.references()));
        REQUIRE(manager.free_pages() == std::count(owners.begin(), owners.end(), 0));
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
    std::vector<std::int64_t> memory;
    std::map<std::int32_t, std::vector<std::int64_t>> tokens;
    std::int64_t next_token = 0;
};

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) return 2;
    const long operations = std::atol(argv[1]);
    std::mt19937_64 random(std::strtoull(argv[2], nullptr, 10));
    std::map<std::string, long> happened;
    for (long done = 0; done < operations;) {
        World world(random, happened);
        for (int i = 0; i < 500; ++i, ++done) {
            world.step();
            world.compare();
        }
        world.finish();
    }
    for (const auto& [what, count] : happened) std::printf("%s: %ld\n", what.c_str(), count);
    return 0;
}
