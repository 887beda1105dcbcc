// The top-k router without gradients (moe/routers/topk.py says what each term means).
#pragma once

#include <memory>

#include "arguments.h"
#include "linear.h"
#include "products.h"

namespace ISA {

// Writes the indices of the `count` largest of `values`, largest first; ties go to the lower one.
// Chosen ones become -infinity.
inline void take_largest(float* values, int64_t size, int64_t count, int32_t* chosen) {
    for (int64_t k = 0; k < count; k++) {
        int64_t best = 0;
        while (best < size && values[best] == -INFINITY) best++;
        for (int64_t e = best + 1; e < size; e++)
            if (values[e] > values[best]) best = e;
        chosen[k] = int32_t(best < size ? best : k);
        values[chosen[k]] = -INFINITY;
    }
}

inline void score(const RouterArguments& a, float* values) {
    int64_t size = a.num_experts;
    if (a.score == SIGMOID) {
        for (int64_t e = 0; e < size; e++) values[e] = 1 / (1 + exponential(-values[e]));
        return;
    }
    float highest = values[0], total = 0;
    for (int64_t e = 1; e < size; e++) highest = values[e] > highest ? values[e] : highest;
    for (int64_t e = 0; e < size; e++) values[e] = exponential(values[e] - highest);
    for (int64_t e = 0; e < size; e++) total += values[e];
    for (int64_t e = 0; e < size; e++) values[e] /= total;
}

// Leaves only the best groups to choose from, ranked by the sum of their `group_best` best scores.
inline void keep_best_groups(const RouterArguments& a, float* values, float* scratch,
                             int32_t* chosen) {
    int64_t width = a.num_experts / a.num_groups;
    float* group_scores = scratch;
    float* copy = scratch + a.num_groups;
    for (int64_t g = 0; g < a.num_groups; g++) {
        int64_t best = least(a.group_best, width);
        std::memcpy(copy, values + g * width, width * sizeof(float));
        take_largest(copy, width, best, chosen);
        group_scores[g] = 0;
        for (int64_t i = 0; i < best; i++) group_scores[g] += values[g * width + chosen[i]];
    }
    take_largest(group_scores, a.num_groups, a.top_groups, chosen);
    for (int64_t g = 0; g < a.num_groups; g++)
        if (group_scores[g] != -INFINITY)
            for (int64_t i = 0; i < width; i++) values[g * width + i] = -INFINITY;
}

inline void choose(const RouterArguments& a, const float* scores, float* scratch, int32_t* spare,
                   int32_t* experts) {
    float* values = scratch;
    for (int64_t e = 0; e < a.num_experts; e++)
        values[e] = scores[e] + (a.bias ? a.bias[e] : 0.0f);
    if (a.num_groups > 1) keep_best_groups(a, values, scratch + a.num_experts, spare);
    take_largest(values, a.num_experts, a.choices, experts);
}

inline void weigh(const RouterArguments& a, const float* scores, const int32_t* experts,
                  float* weights) {
    float total = 0;
    for (int64_t k = 0; k < a.choices; k++)
        total += weights[k] = experts[k] < 0 ? 0.0f : scores[experts[k]];
    float factor = a.renormalize ? a.scale / (total + a.epsilon) : a.scale;
    for (int64_t k = 0; k < a.choices; k++) weights[k] *= factor;
}

template <class Element> void route(const RouterArguments& a) {
    const Element* x = static_cast<const Element*>(a.x);
    constexpr int64_t ROWS = 12;  // few, so that a chunk of a prompt is shared by many threads
    int threads = threads_for(a.d_model * a.num_experts, a.tokens, a.threads);
    for_each_task(blocks(a.tokens, ROWS), threads, [&](int64_t task) {
        std::unique_ptr<float[]> wide(new float[ROWS * a.d_model]);
        std::unique_ptr<float[]> scores(new float[ROWS * a.num_experts]);
        std::unique_ptr<float[]> scratch(new float[2 * a.num_experts + a.num_groups]);
        std::unique_ptr<int32_t[]> spare(new int32_t[a.num_experts]);
        int64_t from = task * ROWS, rows = least(ROWS, a.tokens - from);
        const float* pointers[ROWS];
        for (int64_t i = 0; i < rows * a.d_model; i++) wide[i] = widen(x[from * a.d_model + i]);
        for (int64_t m = 0; m < rows; m++) pointers[m] = wide.get() + m * a.d_model;
        products(pointers, rows, a.weight, 0, a.num_experts, a.d_model,
                 [&](int64_t m, int64_t n, const float* values, int64_t count) {
                     for (int64_t i = 0; i < count; i++)
                         scores[m * a.num_experts + n + i] =
                             values[i] + (a.logit_bias ? a.logit_bias[n + i] : 0.0f);
                 });
        for (int64_t m = 0; m < rows; m++) {
            int64_t at = (from + m) * a.choices;
            float* row = scores.get() + m * a.num_experts;
            score(a, row);
            if (a.given)
                std::memcpy(a.experts + at, a.given + at, a.choices * sizeof(int32_t));
            else
                choose(a, row, scratch.get(), spare.get(), a.experts + at);
            weigh(a, row, a.experts + at, a.weights + at);
        }
    });
    for (int64_t r = 0; r < a.tokens * a.choices; r++)
        if (a.experts[r] >= 0) a.counts[a.experts[r]]++;
}

}  // namespace ISA
