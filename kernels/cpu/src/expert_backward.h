// The backward pass of the expert MLP, on panels: for many rows an expert.
//
// Kept from forward: x, what fc1 gave, routing weights. With g the gradient of a token's output, w
// the weight of its row, a = act(gate) * up or act(up):
//
//   u = g W2               d w = <u, a> + <g, b2>    d a = w u, which gives d h: d gate and d up
//   d W2 += g^T (w a)      d b2 += w g               d x = d h W1
//   d W1 += (d h)^T x      d b1 += d h
#pragma once

#include "experts.h"
#include "panels.h"

namespace ISA {

// What the tasks of one backward share.
template <class Element> struct Backward {
    const ExpertGradArguments& a;
    const ExpertArguments& f;
    Order order;
    int64_t act_panels;
    int64_t fc1_rows;                        // H
    std::unique_ptr<Element[]> grad_hidden;  // [N, H]
    std::unique_ptr<Element[]> scaled_act;   // [N, F]: w a
    std::unique_ptr<float[]> parts;          // [N, act_panels]: of <u, a> + <g, b2>

    explicit Backward(const ExpertGradArguments& arguments)
        : a(arguments), f(arguments.forward), order(arguments.forward, TRAINING_ROWS),
          act_panels(blocks(f.d_expert, PANEL)), fc1_rows(f.fc1_rows()) {
        int64_t rows = f.tokens * f.choices;
        grad_hidden.reset(new Element[rows * fc1_rows]);
        scaled_act.reset(new Element[rows * f.d_expert]);
        parts.reset(new float[rows * act_panels]);
    }

    float& part_of(int64_t row, int64_t panel) { return parts[row * act_panels + panel]; }
    int64_t token(int64_t row) const { return order.rows[row] / f.choices; }
    const Element* x(int64_t row) const {
        return static_cast<const Element*>(f.x) + token(row) * f.d_model;
    }
    const Element* grad(int64_t row) const {
        return static_cast<const Element*>(a.grad) + token(row) * f.d_model;
    }

    // u for one block of rows and one panel of F, and everything computed from it elementwise.
    void through_second(const RowBlock& block, int64_t panel) {
        int64_t from = panel * PANEL, count = least(PANEL, f.d_expert - from);
        int64_t rows = block.to - block.from, width = f.d_expert;
        const Element* fc2 = static_cast<const Element*>(f.fc2) + block.slot * f.fc2_stride;
        const Element* pointers[TRAINING_ROWS];
        alignas(64) float u[TRAINING_ROWS][PANEL];
        for (int64_t m = 0; m < rows; m++) pointers[m] = grad(block.from + m);
        rows_times(pointers, rows, fc2, f.d_model, width, from, count, u);
        by_activation(f.activation, [&](auto kind) {
            for (int64_t m = 0; m < rows; m++)
                part_of(block.from + m, panel) = through_activation<kind>(block.from + m, from,
                                                                          count, u[m]);
        });
        if (f.fc2_bias.values == nullptr || panel != 0) return;
        const Element* bias = static_cast<const Element*>(f.fc2_bias.values);
        products(pointers, rows, bias + block.slot * f.fc2_bias.stride, 0, 1, f.d_model,
                 [&](int64_t m, int64_t, const float* values, int64_t) {
                     part_of(block.from + m, 0) += values[0];
                 });
    }

    // d gate, d up (if there is a gate) and w a from one row of u. Returns the sum of u a over these
    // columns.
    template <Activation Kind>
    float through_activation(int64_t row, int64_t from, int64_t count, const float* u) {
        int64_t width = f.d_expert;
        const Element* gate = static_cast<const Element*>(f.hidden) + row * fc1_rows + from;
        const Element* up = has_gate(Kind) ? gate + width : gate;
        Element* grad_gate = grad_hidden.get() + row * fc1_rows + from;
        Element* grad_up = grad_gate + width;
        Element* act = scaled_act.get() + row * width + from;
        float weight = a.weights[order.rows[row]], products[PANEL], sum = 0;
#pragma GCC ivdep
        for (int64_t i = 0; i < count; i++) {
            Activated activated = activate<Kind>(widen(gate[i]), widen(up[i]));
            float grad_act = weight * u[i];
            grad_gate[i] = narrow<Element>(grad_act * activated.gate_slope);
            if constexpr (has_gate(Kind))
                grad_up[i] = narrow<Element>(grad_act * activated.up_slope);
            act[i] = narrow<Element>(weight * activated.value);
            products[i] = u[i] * activated.value;
        }
        for (int64_t i = 0; i < count; i++) sum += products[i];
        return sum;
    }

    // d x of one block of rows and one panel of D, each routed row into its own line.
    void through_first(const RowBlock& block, int64_t panel) {
        int64_t from = panel * PANEL, count = least(PANEL, f.d_model - from);
        int64_t rows = block.to - block.from;
        const Element* fc1 = static_cast<const Element*>(f.fc1) + block.slot * f.fc1_stride;
        const Element* pointers[TRAINING_ROWS];
        alignas(64) float grad_x[TRAINING_ROWS][PANEL];
        for (int64_t m = 0; m < rows; m++)
            pointers[m] = grad_hidden.get() + (block.from + m) * fc1_rows;
        rows_times(pointers, rows, fc1, fc1_rows, f.d_model, from, count, grad_x);
        for (int64_t m = 0; m < rows; m++)
            std::memcpy(f.lines + order.rows[block.from + m] * f.d_model + from, grad_x[m],
                        count * sizeof(float));
    }

    // Gradients of a slot's parameters in type Total, for outputs [from, from + PANEL).
    template <class Total> void add_fc1(const RowBlock& span, int64_t from) {
        int64_t outputs = fc1_rows, depth = span.to - span.from;
        auto hidden_row = [&](int64_t k) {
            return grad_hidden.get() + (span.from + k) * outputs;
        };
        if (a.grad_fc1)
            add_transposed_product<Element>(
                hidden_row, [&](int64_t k) { return x(span.from + k); }, depth, from,
                least(PANEL, outputs - from), f.d_model, a.is_empty,
                static_cast<Total*>(a.grad_fc1) + span.slot * outputs * f.d_model);
        if (a.grad_fc1_bias)
            add_weighted_rows(
                [&](int64_t k) { return hidden_row(k) + from; }, [](int64_t) { return 1.0f; },
                depth, least(PANEL, outputs - from), a.is_empty,
                static_cast<Total*>(a.grad_fc1_bias) + span.slot * outputs + from);
    }

    template <class Total> void add_fc2(const RowBlock& span, int64_t from) {
        int64_t depth = span.to - span.from;
        if (a.grad_fc2)
            add_transposed_product<Element>(
                [&](int64_t k) { return grad(span.from + k); },
                [&](int64_t k) { return scaled_act.get() + (span.from + k) * f.d_expert; }, depth,
                from, least(PANEL, f.d_model - from), f.d_expert, a.is_empty,
                static_cast<Total*>(a.grad_fc2) + span.slot * f.d_model * f.d_expert);
        if (a.grad_fc2_bias)
            add_weighted_rows(
                [&](int64_t k) { return grad(span.from + k) + from; },
                [&](int64_t k) { return a.weights[order.rows[span.from + k]]; }, depth,
                least(PANEL, f.d_model - from), a.is_empty,
                static_cast<Total*>(a.grad_fc2_bias) + span.slot * f.d_model + from);
    }

    // Gradients of a slot without rows.
    template <class Total> void clear(int64_t slot) {
        auto zero = [&](void* gradients, int64_t size) {
            if (gradients == nullptr) return;
            std::memset(static_cast<Total*>(gradients) + slot * size, 0, size * sizeof(Total));
        };
        zero(a.grad_fc1, fc1_rows * f.d_model);
        zero(a.grad_fc2, f.d_expert * f.d_model);
        zero(a.grad_fc1_bias, fc1_rows);
        zero(a.grad_fc2_bias, f.d_model);
    }

    // Gradients of all parameters that need one.
    template <class Total> void parameter_gradients() {
        if (!a.grad_fc1 && !a.grad_fc2 && !a.grad_fc1_bias && !a.grad_fc2_bias) return;
        std::unique_ptr<RowBlock[]> spans = spans_of(order, a.num_slots);
        int64_t fc1_panels = blocks(fc1_rows, PANEL);
        int64_t panels = fc1_panels + blocks(f.d_model, PANEL);
        for_each_task(a.num_slots * panels, f.threads, [&](int64_t task) {
            const RowBlock& span = spans[task / panels];
            int64_t panel = task % panels;
            if (span.from == span.to) {
                if (a.is_empty && panel == 0) clear<Total>(span.slot);
                return;
            }
            panel < fc1_panels ? add_fc1<Total>(span, panel * PANEL)
                               : add_fc2<Total>(span, (panel - fc1_panels) * PANEL);
        });
    }
};

template <class Element> void expert_grads(const ExpertGradArguments& a) {
    const ExpertArguments& f = a.forward;
    Backward<Element> backward(a);
    const Order& order = backward.order;
    int64_t act_panels = backward.act_panels, model_panels = blocks(f.d_model, PANEL);
    for_each_task(order.num_blocks * act_panels, f.threads, [&](int64_t task) {
        backward.through_second(order.row_blocks[task / act_panels], task % act_panels);
    });
    std::memset(a.grad_weights, 0, f.tokens * f.choices * sizeof(float));
    int64_t num_rows = order.num_blocks ? order.row_blocks[order.num_blocks - 1].to : 0;
    for (int64_t row = 0; row < num_rows; row++)
        for (int64_t panel = 0; panel < act_panels; panel++)
            a.grad_weights[order.rows[row]] += backward.part_of(row, panel);
    for_each_task(order.num_blocks * model_panels, f.threads, [&](int64_t task) {
        backward.through_first(order.row_blocks[task / model_panels], task % model_panels);
    });
    a.grad_type == FLOAT32 ? backward.template parameter_gradients<float>()
                           : backward.template parameter_gradients<Element>();
}

}  // namespace ISA
