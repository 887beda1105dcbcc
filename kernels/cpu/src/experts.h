// The gated expert MLP without gradients: rows grouped by expert.
#pragma once

#include <memory>

#include "activation.h"
#include "arguments.h"
#include "linear.h"
#include "products.h"

namespace ISA {

// A stretch of routed rows that share an expert.
struct RowBlock {
    int64_t slot, from, to;
};

inline int64_t slot_of(const ExpertArguments& a, int64_t expert) {
    return a.slot_of ? a.slot_of[expert] : expert;
}

// The first routed row whose expert does not exist, or is not here outside a wave; -1 = none.
inline int64_t first_wrong_row(const ExpertArguments& a) {
    for (int64_t r = 0; r < a.tokens * a.choices; r++) {
        int64_t expert = a.experts[r];
        if (expert < -1 || expert >= a.num_experts) return r;
        if (expert >= 0 && !a.is_wave && slot_of(a, expert) < 0) return r;
    }
    return -1;
}

// Routed rows in expert order, stably, and their blocks of at most `block_rows`. Experts without a
// slot are left out.
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

// One block's act(gate) * up for outputs [from, to) of F.
template <class Element>
void first_half(const ExpertArguments& a, const Order& order, const RowBlock& block, int64_t from,
                int64_t to, Element* act) {
    const Element* x = static_cast<const Element*>(a.x);
    const Element* gate_weights = static_cast<const Element*>(a.fc1) + block.slot * a.fc1_stride;
    const Element* up_weights = gate_weights + a.d_expert * a.d_model;
    const Element* pointers[BLOCK_ROWS];
    float gates[BLOCK_ROWS][BLOCK_OUTPUTS], ups[BLOCK_ROWS][BLOCK_OUTPUTS];
    int64_t rows = block.to - block.from;
    for (int64_t m = 0; m < rows; m++)
        pointers[m] = x + order.rows[block.from + m] / a.choices * a.d_model;
    auto keep_in = [&](float (*values_of)[BLOCK_OUTPUTS]) {
        return [=](int64_t m, int64_t n, const float* values, int64_t count) {
            for (int64_t i = 0; i < count; i++) values_of[m][n - from + i] = values[i];
        };
    };
    products(pointers, rows, gate_weights, from, to, a.d_model, keep_in(gates));
    products(pointers, rows, up_weights, from, to, a.d_model, keep_in(ups));
    by_activation(a.activation, [&](auto kind) {
        for (int64_t m = 0; m < rows; m++) {
            Element* line = act + (block.from + m) * a.d_expert + from;
            for (int64_t i = 0; i < to - from; i++)
                line[i] = narrow<Element>(activate<kind>(gates[m][i], ups[m][i]).value);
        }
    });
}

// One block's outputs [from, to) of D, each routed row into its own line.
template <class Element>
void second_half(const ExpertArguments& a, const Order& order, const RowBlock& block, int64_t from,
                 int64_t to, const Element* act) {
    const Element* weights = static_cast<const Element*>(a.fc2) + block.slot * a.fc2_stride;
    const Element* pointers[BLOCK_ROWS];
    int64_t rows = block.to - block.from;
    for (int64_t m = 0; m < rows; m++) pointers[m] = act + (block.from + m) * a.d_expert;
    products(pointers, rows, weights, from, to, a.d_expert,
             [&](int64_t m, int64_t n, const float* values, int64_t count) {
                 float* line = a.lines + order.rows[block.from + m] * a.d_model + n;
                 for (int64_t i = 0; i < count; i++) line[i] = values[i];
             });
}

// Returns what first_wrong_row does, and runs nothing in that case.
template <class Element> int64_t experts(const ExpertArguments& a) {
    int64_t wrong = first_wrong_row(a);
    if (wrong >= 0) return wrong;
    Order order(a, BLOCK_ROWS);
    std::unique_ptr<Element[]> act(new Element[a.tokens * a.choices * a.d_expert]);
    int64_t first_blocks = blocks(a.d_expert, BLOCK_OUTPUTS);
    int64_t second_blocks = blocks(a.d_model, BLOCK_OUTPUTS);
    int64_t matrices = 3 * a.d_expert * a.d_model;
    int threads = threads_for(matrices * order.num_blocks, a.tokens * a.choices, a.threads);
    for_each_task(order.num_blocks * first_blocks, threads, [&](int64_t task) {
        int64_t from = task % first_blocks * BLOCK_OUTPUTS;
        int64_t to = least(from + BLOCK_OUTPUTS, a.d_expert);
        first_half(a, order, order.row_blocks[task / first_blocks], from, to, act.get());
    });
    for_each_task(order.num_blocks * second_blocks, threads, [&](int64_t task) {
        int64_t from = task % second_blocks * BLOCK_OUTPUTS;
        int64_t to = least(from + BLOCK_OUTPUTS, a.d_model);
        second_half(a, order, order.row_blocks[task / second_blocks], from, to, act.get());
    });
    return -1;
}

template <class Element> void combine(const CombineArguments& a) {
    Element* out = static_cast<Element*>(a.out);
    int threads = threads_for(a.tokens * a.choices * a.d_model, 1, a.threads);
    for_each_task(a.tokens, threads, [&](int64_t t) {
        constexpr int64_t PART = 64;
        for (int64_t from = 0; from < a.d_model; from += PART) {
            int64_t count = least(PART, a.d_model - from);
            float total[PART] = {};
            for (int64_t r = t * a.choices; r < (t + 1) * a.choices; r++) {
                if (a.experts[r] < 0) continue;
                const float* line = a.lines + r * a.d_model + from;
                float weight = a.weights ? a.weights[r] : 1;
                for (int64_t i = 0; i < count; i++) total[i] += weight * line[i];
            }
            for (int64_t i = 0; i < count; i++)
                out[t * a.d_model + from + i] = narrow<Element>(total[i]);
        }
    });
}

}  // namespace ISA
