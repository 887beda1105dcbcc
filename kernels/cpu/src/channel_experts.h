// The expert MLP of experts with channels that are not read where they count as 0, without
// gradients. With limits, values at or below them are set to 0 first, and so are channels that a row
// does not use; without, only gates that the activation makes 0 are skipped, and the result is that
// of experts().
#pragma once

#include "channels.h"
#include "experts.h"

namespace ISA {

// Copies a row of x, with 0 for what is below its limit.
template <class Element>
void copy_above(const Element* x, const float* limits, int64_t width, Element* to) {
    for (int64_t i = 0; i < width; i++)
        to[i] = is_below(widen(x[i]), limits[i]) ? Element{} : x[i];
}

// Returns the first wrong row, and runs nothing if there is one; else -1.
template <class Element> int64_t channel_experts(const ChannelExpertArguments& c) {
    const ExpertArguments& a = c.rest;
    int64_t wrong = first_wrong_row(a);
    if (wrong >= 0) return wrong;
    Order order(a, BLOCK_ROWS);
    const Element *x = static_cast<const Element*>(a.x), *fc1 = static_cast<const Element*>(a.fc1);
    ByInputMatrix<Element> fc2{static_cast<const Element*>(a.fc2), a.fc2_stride, a.d_expert,
                               a.d_model};
    auto row_of = [&](int64_t r) { return x + order.rows[r] / a.choices * a.d_model; };
    auto expert_of = [&](int64_t r) { return a.experts[order.rows[r]]; };
    int64_t num_rows = order.num_blocks ? order.row_blocks[order.num_blocks - 1].to : 0;
    std::unique_ptr<const bool*[]> used;
    if (c.used) {
        used.reset(new const bool*[num_rows]);
        for (int64_t r = 0; r < num_rows; r++) used[r] = c.used + order.rows[r] * a.d_expert;
    }
    auto limits_of = [&](const RowBlock& block) {
        int64_t first = expert_of(block.from) * a.d_expert;
        return Limits{c.gate_limits ? c.gate_limits + first : nullptr,
                      c.act_limits ? c.act_limits + first : nullptr,
                      c.used ? used.get() + block.from : nullptr};
    };
    std::unique_ptr<Element[]> act;
    if (c.act) act.reset(new Element[num_rows * a.d_expert]);
    std::unique_ptr<Element[]> kept_x;
    if (c.x_limits) {
        kept_x.reset(new Element[num_rows * a.d_model]);
        for_each_task(num_rows, expert_threads(a, order), [&](int64_t r) {
            const float* limits = c.x_limits + expert_of(r) * a.d_model;
            copy_above(row_of(r), limits, a.d_model, kept_x.get() + r * a.d_model);
        });
    }
    auto kept_row_of = [&](int64_t r) {
        return c.x_limits ? kept_x.get() + r * a.d_model : row_of(r);
    };
    if (c.by_input) {
        ByInputMatrix<Element> by_input{fc1, a.fc1_stride, a.d_model, a.fc1_rows()};
        run_halves<Element>(a, order, by_input, fc2, kept_row_of, limits_of, act.get());
    } else {
        PlainMatrix<Element> plain{fc1, a.fc1_stride, a.d_model};
        run_halves<Element>(a, order, plain, fc2, kept_row_of, limits_of, act.get());
    }
    for (int64_t r = 0; c.act && r < num_rows; r++)
        std::memcpy(static_cast<Element*>(c.act) + order.rows[r] * a.d_expert,
                    act.get() + r * a.d_expert, a.d_expert * sizeof(Element));
    return -1;
}

}  // namespace ISA
