// Rows sorted by slot times the matrix of their slot, forward and backward, on panels: for products
// outside the MLP, such as low-rank updates.
#pragma once

#include "experts.h"
#include "panels.h"

namespace ISA {

// Runs `panel(block, from)` for every block of rows that share a slot and every panel of `width`
// columns.
template <class Panel>
void for_each_row_panel(const GroupedArguments& a, int64_t width, Panel panel) {
    int64_t num_blocks = 0, panels = blocks(width, PANEL);
    for (int64_t s = 0; s < a.num_slots; s++)
        num_blocks += blocks(a.spans[s].to - a.spans[s].from, TRAINING_ROWS);
    std::unique_ptr<RowBlock[]> row_blocks(new RowBlock[num_blocks]);
    RowBlock* next = row_blocks.get();
    for (int64_t s = 0; s < a.num_slots; s++)
        for (int64_t from = a.spans[s].from; from < a.spans[s].to; from += TRAINING_ROWS)
            *next++ = {s, from, least(from + TRAINING_ROWS, a.spans[s].to)};
    for_each_task(num_blocks * panels, a.threads, [&](int64_t task) {
        panel(row_blocks[task / panels], task % panels * PANEL);
    });
}

// Rows in memory, `stride` elements apart.
struct Rows {
    void* values;
    int64_t stride, width;
};

// Multiplies each row of `in` with the matrix of its slot and writes the product to its row of
// `out`. `multiply` computes a panel of columns for a block of rows.
template <class Element, class Multiply>
void multiply_rows(const GroupedArguments& a, const Rows& in, const Rows& out, Multiply multiply) {
    for_each_row_panel(a, out.width, [&](const RowBlock& block, int64_t from) {
        const Element* weights = static_cast<const Element*>(a.weights);
        const Element* rows[TRAINING_ROWS];
        alignas(64) float sums[TRAINING_ROWS][PANEL];
        int64_t num_rows = block.to - block.from, count = least(PANEL, out.width - from);
        for (int64_t m = 0; m < num_rows; m++)
            rows[m] = static_cast<const Element*>(in.values) + (block.from + m) * in.stride;
        multiply(rows, num_rows, weights + block.slot * a.weight_stride, from, count, sums);
        for (int64_t m = 0; m < num_rows; m++) {
            Element* line = static_cast<Element*>(out.values) + (block.from + m) * out.stride + from;
            for (int64_t i = 0; i < count; i++) line[i] = narrow<Element>(sums[m][i]);
        }
    });
}

// y = x W^T.
template <class Element> void grouped_product(const GroupedArguments& a) {
    multiply_rows<Element>(
        a, {a.x, a.x_stride, a.inputs}, {a.y, a.y_stride, a.outputs},
        [&](const Element* const* rows, int64_t num_rows, const Element* weights, int64_t from,
            int64_t count, float (*sums)[PANEL]) {
            rows_times_transposed(rows, num_rows, weights, a.inputs, from, count, sums);
        });
}

// x = y W, the gradient of x if y is the gradient of the product.
template <class Element> void grouped_product_grad(const GroupedArguments& a) {
    multiply_rows<Element>(
        a, {a.y, a.y_stride, a.outputs}, {a.x, a.x_stride, a.inputs},
        [&](const Element* const* rows, int64_t num_rows, const Element* weights, int64_t from,
            int64_t count, float (*sums)[PANEL]) {
            rows_times(rows, num_rows, weights, a.outputs, a.inputs, from, count, sums);
        });
}

// W = y^T x, the gradient of W if y is the gradient of the product; 0 for slots without rows.
template <class Element> void grouped_weight_grad(const GroupedArguments& a) {
    int64_t panels = blocks(a.outputs, PANEL);
    for_each_task(a.num_slots * panels, a.threads, [&](int64_t task) {
        int64_t slot = task / panels, from = task % panels * PANEL;
        int64_t count = least(PANEL, a.outputs - from);
        Span span = a.spans[slot];
        Element* total = static_cast<Element*>(a.weights) + slot * a.weight_stride;
        if (span.from == span.to) {
            std::memset(total + from * a.inputs, 0, count * a.inputs * sizeof(Element));
            return;
        }
        const Element* x = static_cast<const Element*>(a.x) + span.from * a.x_stride;
        const Element* y = static_cast<const Element*>(a.y) + span.from * a.y_stride;
        add_transposed_product<Element>([&](int64_t k) { return y + k * a.y_stride; },
                                        [&](int64_t k) { return x + k * a.x_stride; },
                                        span.to - span.from, from, count, a.inputs, true, total);
    });
}

}  // namespace ISA
