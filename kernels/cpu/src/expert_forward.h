// The forward pass of the expert MLP that keeps what fc1 gives for backward, on panels.
#pragma once

#include "experts.h"
#include "panels.h"

namespace ISA {

// gate and up of one block of rows for outputs [from, from + count) of F, and act(gate) * up. Without
// a gate `gate` is the up rows' value, and there is nothing else.
template <class Element>
void keep_first_half(const ExpertArguments& a, const Order& order, const RowBlock& block,
                     int64_t from, int64_t count, Element* act) {
    const Element* x = static_cast<const Element*>(a.x);
    const Element* weights = static_cast<const Element*>(a.fc1) + block.slot * a.fc1_stride;
    Element* hidden = static_cast<Element*>(a.hidden);
    const Element* pointers[TRAINING_ROWS];
    alignas(64) float gate[TRAINING_ROWS][PANEL], up[TRAINING_ROWS][PANEL];
    int64_t rows = block.to - block.from, width = a.d_expert;
    for (int64_t m = 0; m < rows; m++)
        pointers[m] = x + order.rows[block.from + m] / a.choices * a.d_model;
    rows_times_transposed(pointers, rows, weights, a.d_model, from, count, gate);
    add_bias(a.fc1_bias, block.slot, from, count, gate[0], rows, PANEL);
    if (has_gate(a.activation)) {
        rows_times_transposed(pointers, rows, weights, a.d_model, width + from, count, up);
        add_bias(a.fc1_bias, block.slot, width + from, count, up[0], rows, PANEL);
    }
    by_activation(a.activation, [&](auto kind) {
        for (int64_t m = 0; m < rows; m++) {
            Element* kept_gate = hidden + (block.from + m) * a.fc1_rows() + from;
            Element* kept_up = kept_gate + width;
            Element* line = act + (block.from + m) * width + from;
#pragma GCC ivdep
            for (int64_t i = 0; i < count; i++) {  // backward reads rounded values
                Element rounded_gate = narrow<Element>(gate[m][i]), rounded_up{};
                if constexpr (has_gate(kind)) kept_up[i] = rounded_up = narrow<Element>(up[m][i]);
                float value = activate<kind>(widen(rounded_gate), widen(rounded_up)).value;
                kept_gate[i] = rounded_gate;
                line[i] = narrow<Element>(value);
            }
        }
    });
}

// One block's outputs [from, from + count) of D, each routed row into its own line.
template <class Element>
void keep_second_half(const ExpertArguments& a, const Order& order, const RowBlock& block,
                      int64_t from, int64_t count, const Element* act) {
    const Element* weights = static_cast<const Element*>(a.fc2) + block.slot * a.fc2_stride;
    const Element* pointers[TRAINING_ROWS];
    alignas(64) float y[TRAINING_ROWS][PANEL];
    int64_t rows = block.to - block.from;
    for (int64_t m = 0; m < rows; m++) pointers[m] = act + (block.from + m) * a.d_expert;
    rows_times_transposed(pointers, rows, weights, a.d_expert, from, count, y);
    add_bias(a.fc2_bias, block.slot, from, count, y[0], rows, PANEL);
    for (int64_t m = 0; m < rows; m++)
        std::memcpy(a.lines + order.rows[block.from + m] * a.d_model + from, y[m],
                    count * sizeof(float));
}

// Fills `hidden`, and `lines` if there are any; otherwise like experts().
template <class Element> int64_t expert_forward(const ExpertArguments& a) {
    int64_t wrong = first_wrong_row(a);
    if (wrong >= 0) return wrong;
    Order order(a, TRAINING_ROWS);
    std::unique_ptr<Element[]> act(new Element[a.tokens * a.choices * a.d_expert]);
    int64_t first_panels = blocks(a.d_expert, PANEL), second_panels = blocks(a.d_model, PANEL);
    for_each_task(order.num_blocks * first_panels, a.threads, [&](int64_t task) {
        int64_t from = task % first_panels * PANEL, count = least(PANEL, a.d_expert - from);
        keep_first_half(a, order, order.row_blocks[task / first_panels], from, count, act.get());
    });
    if (a.lines == nullptr) return -1;
    for_each_task(order.num_blocks * second_panels, a.threads, [&](int64_t task) {
        int64_t from = task % second_panels * PANEL, count = least(PANEL, a.d_model - from);
        keep_second_half(a, order, order.row_blocks[task / second_panels], from, count, act.get());
    });
    return -1;
}

}  // namespace ISA
