// The gated expert MLP without gradients: rows grouped by expert.
#pragma once

#include <algorithm>
#include <memory>

#include "activation.h"
#include "arguments.h"
#include "linear.h"
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

// A plain matrix of all slots, and rows for it by address.
template <class Element> struct PlainMatrix {
    const Element* values;
    int64_t stride, width;

    template <class Store>
    void multiply(const Element* const* rows, int64_t num_rows, int64_t slot, int64_t from,
                  int64_t to, Store store) const {
        products(rows, num_rows, values + slot * stride, from, to, width, store);
    }
};

// Adds entries [from, from + count) of a slot's bias to rows of sums that are `distance` apart.
inline void add_bias(const Biases& bias, int64_t slot, int64_t from, int64_t count, float* sums,
                     int64_t rows, int64_t distance) {
    if (bias.values == nullptr) return;
    int64_t first = slot * bias.stride + from;
    auto add = [&](const auto* values) {
        for (int64_t m = 0; m < rows; m++)
            for (int64_t i = 0; i < count; i++) sums[m * distance + i] += widen(values[i]);
    };
    bias.type == BFLOAT16 ? add(static_cast<const bf16*>(bias.values) + first)
                          : add(static_cast<const float*>(bias.values) + first);
}

// One block's act(gate) * up for outputs [from, to) of F. `rows` are the block's rows of x.
template <class Row, class Matrix, class Element>
void first_half(const ExpertArguments& a, const Matrix& fc1, const RowBlock& block,
                const Row* rows, int64_t from, int64_t to, Element* act) {
    float gates[BLOCK_ROWS * BLOCK_OUTPUTS], ups[BLOCK_ROWS * BLOCK_OUTPUTS];
    int64_t num_rows = block.to - block.from, num_outputs = to - from;
    auto keep_in = [&](float* kept, int64_t first) {
        return [=](int64_t m, int64_t n, const float* values, int64_t count) {
            for (int64_t i = 0; i < count; i++) kept[m * num_outputs + n - first + i] = values[i];
        };
    };
    int64_t up_from = a.d_expert + from, up_to = a.d_expert + to;
    fc1.multiply(rows, num_rows, block.slot, from, to, keep_in(gates, from));
    fc1.multiply(rows, num_rows, block.slot, up_from, up_to, keep_in(ups, up_from));
    add_bias(a.fc1_bias, block.slot, from, num_outputs, gates, num_rows, num_outputs);
    add_bias(a.fc1_bias, block.slot, up_from, num_outputs, ups, num_rows, num_outputs);
    by_activation(a.activation, [&](auto kind) {
        for (int64_t m = 0; m < num_rows; m++) {
            Element* line = act + (block.from + m) * a.d_expert + from;
            const float *gate = gates + m * num_outputs, *up = ups + m * num_outputs;
            for (int64_t i = 0; i < num_outputs; i++)
                line[i] = narrow<Element>(activate<kind>(gate[i], up[i]).value);
        }
    });
}

// One block's outputs [from, to) of D, each routed row into its own line. `rows` are the block's
// activations.
template <class Row, class Matrix>
void second_half(const ExpertArguments& a, const Matrix& fc2, const Order& order,
                 const RowBlock& block, const Row* rows, int64_t from, int64_t to) {
    fc2.multiply(rows, block.to - block.from, block.slot, from, to,
                 [&](int64_t m, int64_t n, const float* values, int64_t count) {
                     float* line = a.lines + order.rows[block.from + m] * a.d_model + n;
                     for (int64_t i = 0; i < count; i++) line[i] = values[i];
                 });
    for (int64_t r = block.from; r < block.to; r++)
        add_bias(a.fc2_bias, block.slot, from, to - from, a.lines + order.rows[r] * a.d_model + from,
                 1, 0);
}

// Calls body(block, from, to) for every block of rows and part of `outputs`, on several threads.
template <class Body>
void for_each_block(const Order& order, int64_t outputs, int threads, Body body) {
    // Few rows read their weights once; longer reads bring memory to full speed.
    auto part_of = [](const RowBlock& block) {
        return block.to - block.from <= STREAM_ROWS ? STREAM_OUTPUTS : BLOCK_OUTPUTS;
    };
    std::unique_ptr<int64_t[]> first_task(new int64_t[order.num_blocks + 1]);
    first_task[0] = 0;
    for (int64_t i = 0; i < order.num_blocks; i++)
        first_task[i + 1] = first_task[i] + blocks(outputs, part_of(order.row_blocks[i]));
    const int64_t *begin = first_task.get(), *end = begin + order.num_blocks + 1;
    for_each_task(end[-1], threads, [&](int64_t task) {
        int64_t index = std::upper_bound(begin, end, task) - begin - 1;
        const RowBlock& block = order.row_blocks[index];
        int64_t from = (task - begin[index]) * part_of(block);
        body(block, from, least(from + part_of(block), outputs));
    });
}

inline int expert_threads(const ExpertArguments& a, const Order& order) {
    int64_t matrices = 3 * a.d_expert * a.d_model;
    return threads_for(matrices * order.num_blocks, a.tokens * a.choices, a.threads);
}

// Returns the first wrong row, and runs nothing if there is one; else -1.
template <class Element> int64_t experts(const ExpertArguments& a) {
    int64_t wrong = first_wrong_row(a);
    if (wrong >= 0) return wrong;
    Order order(a, BLOCK_ROWS);
    int threads = expert_threads(a, order);
    const Element* x = static_cast<const Element*>(a.x);
    std::unique_ptr<Element[]> act(new Element[a.tokens * a.choices * a.d_expert]);
    PlainMatrix<Element> fc1{static_cast<const Element*>(a.fc1), a.fc1_stride, a.d_model};
    PlainMatrix<Element> fc2{static_cast<const Element*>(a.fc2), a.fc2_stride, a.d_expert};
    for_each_block(order, a.d_expert, threads, [&](auto& block, int64_t from, int64_t to) {
        const Element* rows[BLOCK_ROWS];
        for (int64_t r = block.from; r < block.to; r++)
            rows[r - block.from] = x + order.rows[r] / a.choices * a.d_model;
        first_half(a, fc1, block, rows, from, to, act.get());
    });
    for_each_block(order, a.d_model, threads, [&](auto& block, int64_t from, int64_t to) {
        const Element* rows[BLOCK_ROWS];
        for (int64_t r = block.from; r < block.to; r++)
            rows[r - block.from] = act.get() + r * a.d_expert;
        second_half(a, fc2, order, block, rows, from, to);
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
