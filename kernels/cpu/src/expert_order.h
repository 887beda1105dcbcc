// Routed rows grouped by expert.
#pragma once

#include <memory>

#include "arguments.h"
#include "products.h"

namespace ISA {

// Consecutive routed rows of one expert.
struct RowBlock {
    int64_t slot, from, to;
};

inline int64_t slot_of(const ExpertArguments& a, int64_t expert) {
    return a.slot_of ? a.slot_of[expert] : expert;
}

// The first routed row whose expert does not exist or, outside a wave, is not here; -1 = none.
inline int64_t first_wrong_row(const ExpertArguments& a) {
    for (int64_t r = 0; r < a.tokens * a.choices; r++) {
        int64_t expert = a.experts[r];
        if (expert < -1 || expert >= a.num_experts) return r;
        if (expert >= 0 && !a.is_wave && slot_of(a, expert) < 0) return r;
    }
    return -1;
}

// Routed rows in expert order, stably, and their blocks of at most `block_rows`. Experts without a
// slot are skipped.
struct Order {
    std::unique_ptr<int64_t[]> rows;
    std::unique_ptr<RowBlock[]> row_blocks;
    int64_t num_blocks = 0;

    Order(const ExpertArguments& a, int64_t block_rows) {
        int64_t num_rows = a.tokens * a.choices;
        std::unique_ptr<int64_t[]> next(new int64_t[a.num_experts + 1]());
        auto is_here = [&](int64_t expert) { return expert >= 0 && slot_of(a, expert) >= 0; };
        for (int64_t r = 0; r < num_rows; r++)
            if (is_here(a.experts[r])) next[a.experts[r] + 1]++;
        rows.reset(new int64_t[num_rows + 1]);
        row_blocks.reset(new RowBlock[blocks(num_rows, block_rows) + a.num_experts]);
        for (int64_t e = 0; e < a.num_experts; e++) {
            int64_t end = next[e] + next[e + 1];
            for (int64_t from = next[e]; from < end; from += block_rows)
                row_blocks[num_blocks++] = {slot_of(a, e), from, least(from + block_rows, end)};
            next[e + 1] = end;
        }
        for (int64_t r = 0; r < num_rows; r++)
            if (is_here(a.experts[r])) rows[next[a.experts[r]]++] = r;
    }
};

// The rows of each slot, all of them together; slots without rows come last, empty.
inline std::unique_ptr<RowBlock[]> spans_of(const Order& order, int64_t num_slots) {
    std::unique_ptr<RowBlock[]> spans(new RowBlock[num_slots]);
    for (int64_t s = 0; s < num_slots; s++) spans[s] = {s, 0, 0};
    for (int64_t b = 0; b < order.num_blocks; b++) {
        RowBlock& span = spans[order.row_blocks[b].slot];
        if (span.from == span.to) span.from = order.row_blocks[b].from;
        span.to = order.row_blocks[b].to;
    }
    return spans;
}

}  // namespace ISA
