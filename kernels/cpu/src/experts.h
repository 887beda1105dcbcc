// The expert MLP without gradients: rows grouped by expert.
#pragma once

#include <algorithm>
#include <memory>

#include "activation.h"
#include "arguments.h"
#include "expert_order.h"
#include "channel_limits.h"
#include "linear.h"
#include "products.h"

namespace ISA {

// A plain matrix of all slots, and rows for it by address.
template <class Element> struct PlainMatrix {
    static constexpr bool READS_SOME = true;  // it can leave out outputs
    const Element* values;
    int64_t stride, width;

    template <class Store>
    void multiply(const Element* const* rows, int64_t num_rows, int64_t slot, int64_t from,
                  int64_t to, Store store) const {
        products(rows, num_rows, values + slot * stride, from, to, width, store);
    }

    // The products with weight rows first + outputs[0 .. count - 1], at most STREAM_ROWS rows:
    // store(m, output, value).
    template <class Store>
    void multiply_some(const Element* const* rows, int64_t num_rows, int64_t slot, int64_t first,
                       const int64_t* outputs, int64_t count, Store store) const {
        for (int64_t i = 0; i < count; i += 4) {
            int64_t some = least(4, count - i);
            const Element* w[4];
            for (int64_t n = 0; n < 4; n++)
                w[n] = values + slot * stride + (first + outputs[i + least(n, some - 1)]) * width;
            float out[TILE_ROWS][4];
            tile<From::SCATTERED>(num_rows, rows, w, width, out);
            for (int64_t m = 0; m < num_rows; m++)
                for (int64_t n = 0; n < some; n++) store(m, outputs[i + n], out[m][n]);
        }
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

// The sums of gate rows [from, to) of F for one block; of up rows where there is no gate.
template <class Row, class Matrix>
void gate_sums(const ExpertArguments& a, const Matrix& fc1, const RowBlock& block, const Row* rows,
               int64_t from, int64_t to, float* gates) {
    int64_t num_rows = block.to - block.from, num_outputs = to - from;
    fc1.multiply(rows, num_rows, block.slot, from, to,
                 [=](int64_t m, int64_t n, const float* values, int64_t count) {
                     for (int64_t i = 0; i < count; i++)
                         gates[m * num_outputs + n - from + i] = values[i];
                 });
    add_bias(a.fc1_bias, block.slot, from, num_outputs, gates, num_rows, num_outputs);
}

// A block's gate and up values for outputs [from, to) of F, with biases. Without a gate only
// the up rows' values are computed, and stand in `gates`. Channels that count as 0 for all rows may be
// left out; they are 0 then.
template <class Row, class Matrix>
void multiply_fc1(const ExpertArguments& a, const Matrix& fc1, const Limits& limits,
                  const RowBlock& block, const Row* rows, int64_t from, int64_t to, float* gates,
                  float* ups) {
    int64_t num_rows = block.to - block.from, num_outputs = to - from, up_from = a.d_expert + from;
    int64_t live[STREAM_OUTPUTS], num_live = 0;
    auto multiply_live = [&](float* kept, int64_t first) {
        if constexpr (Matrix::READS_SOME) {
            std::memset(kept, 0, num_rows * num_outputs * sizeof(float));
            fc1.multiply_some(rows, num_rows, block.slot, first, live, num_live,
                              [&](int64_t m, int64_t channel, float value) {
                                  kept[m * num_outputs + channel - from] = value;
                              });
        }
    };
    // With many rows few channels are 0 for all of them.
    bool reads_some = Matrix::READS_SOME && num_rows <= STREAM_ROWS;
    bool reads_used = reads_some && limits.used;
    if (reads_used) {
        num_live = find_used(limits.used, num_rows, from, num_outputs, live);
        multiply_live(gates, 0);
        add_bias(a.fc1_bias, block.slot, from, num_outputs, gates, num_rows, num_outputs);
    } else {
        gate_sums(a, fc1, block, rows, from, to, gates);
    }
    if (!has_gate(a.activation)) return;
    if (reads_used) {
        multiply_live(ups, a.d_expert);
    } else if (reads_some && (a.activation == REGLU || limits.gate)) {
        num_live = find_live(a, limits, gates, num_rows, from, num_outputs, live);
        multiply_live(ups, a.d_expert);
    } else {
        fc1.multiply(rows, num_rows, block.slot, up_from, a.d_expert + to,
                     [=](int64_t m, int64_t n, const float* values, int64_t count) {
                         for (int64_t i = 0; i < count; i++)
                             ups[m * num_outputs + n - up_from + i] = values[i];
                     });
    }
    add_bias(a.fc1_bias, block.slot, up_from, num_outputs, ups, num_rows, num_outputs);
}

// One block's act(gate) * up, or act(up), for outputs [from, to) of F. `rows` are the block's rows of
// x.
template <class Row, class Matrix, class Element>
void first_half(const ExpertArguments& a, const Matrix& fc1, const Limits& limits,
                const RowBlock& block, const Row* rows, int64_t from, int64_t to, Element* act) {
    float gates[BLOCK_ROWS * BLOCK_OUTPUTS], ups[BLOCK_ROWS * BLOCK_OUTPUTS];
    int64_t num_rows = block.to - block.from, num_outputs = to - from;
    multiply_fc1(a, fc1, limits, block, rows, from, to, gates, ups);
    const float* up_values = has_gate(a.activation) ? ups : gates;
    by_activation(a.activation, [&](auto kind) {
        for (int64_t m = 0; m < num_rows; m++) {
            Element* line = act + (block.from + m) * a.d_expert + from;
            const float *gate = gates + m * num_outputs, *up = up_values + m * num_outputs;
            for (int64_t i = 0; i < num_outputs; i++)
                line[i] = narrow<Element>(activate<kind>(gate[i], up[i]).value);
            if (limits.gate)
                for (int64_t i = 0; i < num_outputs; i++)
                    if (is_below(gate_factor<kind>(gate[i]), limits.gate[from + i])) line[i] = {};
            if (limits.act)
                for (int64_t i = 0; i < num_outputs; i++)
                    if (is_below(widen(line[i]), limits.act[from + i])) line[i] = {};
            if (limits.used)
                for (int64_t i = 0; i < num_outputs; i++)
                    if (!limits.used[m][from + i]) line[i] = {};
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
    int64_t matrices = (a.fc1_rows() + a.d_expert) * a.d_model;
    return threads_for(matrices * order.num_blocks, a.tokens * a.choices, a.threads);
}

// Fills the lines. row_of(r) is what fc1 multiplies for routed row r of the order, and
// limits_of(block) says what else counts as 0. `kept` has room for what fc2 multiplies, in the
// order; null = it is not wanted.
template <class Element, class First, class Second, class RowOf, class LimitsOf>
void run_halves(const ExpertArguments& a, const Order& order, const First& fc1, const Second& fc2,
                RowOf row_of, LimitsOf limits_of, Element* kept = nullptr) {
    int threads = expert_threads(a, order);
    std::unique_ptr<Element[]> own(kept ? nullptr : new Element[a.tokens * a.choices * a.d_expert]);
    Element* act = kept ? kept : own.get();
    for_each_block(order, a.d_expert, threads, [&](auto& block, int64_t from, int64_t to) {
        const Element* rows[BLOCK_ROWS];
        for (int64_t r = block.from; r < block.to; r++) rows[r - block.from] = row_of(r);
        first_half(a, fc1, limits_of(block), block, rows, from, to, act);
    });
    for_each_block(order, a.d_model, threads, [&](auto& block, int64_t from, int64_t to) {
        const Element* rows[BLOCK_ROWS];
        for (int64_t r = block.from; r < block.to; r++)
            rows[r - block.from] = act + r * a.d_expert;
        second_half(a, fc2, order, block, rows, from, to);
    });
}

// Returns the first wrong row, and runs nothing if there is one; else -1.
template <class Element> int64_t experts(const ExpertArguments& a) {
    int64_t wrong = first_wrong_row(a);
    if (wrong >= 0) return wrong;
    Order order(a, BLOCK_ROWS);
    const Element* x = static_cast<const Element*>(a.x);
    PlainMatrix<Element> fc1{static_cast<const Element*>(a.fc1), a.fc1_stride, a.d_model};
    PlainMatrix<Element> fc2{static_cast<const Element*>(a.fc2), a.fc2_stride, a.d_expert};
    auto row_of = [&](int64_t r) { return x + order.rows[r] / a.choices * a.d_model; };
    run_halves<Element>(a, order, fc1, fc2, row_of, [](auto&) { return Limits{}; });
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
