// Rows sorted by slot times the matrix of their slot, forward and backward, on panels: for parts of
// experts that are no MLP, such as low-rank updates.
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

// The addresses of a block's rows.
template <class Element>
inline void find_rows(const void* rows, int64_t stride, const RowBlock& block,
                      const Element** found) {
    for (int64_t row = block.from; row < block.to; row++)
        found[row - block.from] = static_cast<const Element*>(rows) + row * stride;
}

template <class Element>
inline void write_rows(const float (*sums)[PANEL], const RowBlock& block, int64_t from,
                       int64_t count, int64_t stride, void* rows) {
    for (int64_t m = 0; m < block.to - block.from; m++) {
        Element* line = static_cast<Element*>(rows) + (block.from + m) * stride + from;
        for (int64_t i = 0; i < count; i++) line[i] = narrow<Element>(sums[m][i]);
    }
}

// y = x W^T.
template <class Element> void grouped_product(const GroupedArguments& a) {
    for_each_row_panel(a, a.outputs, [&](const RowBlock& block, int64_t from) {
        const Element* weights = static_cast<const Element*>(a.weights);
        const Element* rows[TRAINING_ROWS];
        alignas(64) float y[TRAINING_ROWS][PANEL];
        int64_t count = least(PANEL, a.outputs - from);
        find_rows(a.x, a.x_stride, block, rows);
        rows_times_transposed(rows, block.to - block.from, weights + block.slot * a.weight_stride,
                              a.inputs, from, count, y);
        write_rows<Element>(y, block, from, count, a.y_stride, a.y);
    });
}

// x = y W, the gradient of x where y is that of the product.
template <class Element> void grouped_product_grad(const GroupedArguments& a) {
    for_each_row_panel(a, a.inputs, [&](const RowBlock& block, int64_t from) {
        const Element* weights = static_cast<const Element*>(a.weights);
        const Element* rows[TRAINING_ROWS];
        alignas(64) float x[TRAINING_ROWS][PANEL];
        int64_t count = least(PANEL, a.inputs - from);
        find_rows(a.y, a.y_stride, block, rows);
        rows_times(rows, block.to - block.from, weights + block.slot * a.weight_stride, a.outputs,
                   a.inputs, from, count, x);
        write_rows<Element>(x, block, from, count, a.x_stride, a.x);
    });
}

// W = y^T x, the gradient of W where y is that of the product; 0 for slots without rows.
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
