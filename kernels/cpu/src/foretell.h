// Which experts the routers of the next layers would choose, for reading ahead.
#pragma once

#include <memory>

#include "arguments.h"
#include "products.h"
#include "router.h"

namespace ISA {

// Writes a row's best experts of a layer, and the chance that the router takes each: it falls from
// the last choice on, by the share of the range of scores.
inline void name_best(const ForetellArguments& a, const float* scores, float* scratch,
                      int32_t* experts, float* chances) {
    float lowest = scores[0];
    for (int64_t e = 1; e < a.num_experts; e++) lowest = scores[e] < lowest ? scores[e] : lowest;
    std::memcpy(scratch, scores, a.num_experts * sizeof(float));
    take_largest(scratch, a.num_experts, a.named, experts);
    float last = scores[experts[a.choices - 1]], range = scores[experts[0]] - lowest + 1e-6f;
    for (int64_t i = 0; i < a.named; i++) {
        float margin = (scores[experts[i]] - last) / range;
        chances[i] = 1 / (1 + exponential(-a.sharpness * margin));
    }
}

// A task is some rows and one layer.
template <class Element> void foretell(const ForetellArguments& a) {
    constexpr int64_t ROWS = 12;
    const Element *x = static_cast<const Element*>(a.x),
                  *weight = static_cast<const Element*>(a.weight);
    int threads = threads_for(a.d_model * a.num_experts * a.layers, a.tokens, a.threads);
    for_each_task(blocks(a.tokens, ROWS) * a.layers, threads, [&](int64_t task) {
        int64_t layer = task % a.layers, from = task / a.layers * ROWS;
        int64_t rows = least(ROWS, a.tokens - from), first = layer * a.num_experts;
        std::unique_ptr<float[]> scores(new float[rows * a.num_experts]);
        std::unique_ptr<float[]> scratch(new float[a.num_experts]);
        const Element* pointers[ROWS];
        for (int64_t m = 0; m < rows; m++) pointers[m] = x + (from + m) * a.d_model;
        products(pointers, rows, weight, first, first + a.num_experts, a.d_model,
                 [&](int64_t m, int64_t n, const float* values, int64_t count) {
                     for (int64_t i = 0; i < count; i++)
                         scores[m * a.num_experts + n - first + i] = values[i] + a.bias[n + i];
                 });
        for (int64_t m = 0; m < rows; m++) {
            float* row = scores.get() + m * a.num_experts;
            for (int64_t e = 0; a.is_sigmoid && e < a.num_experts; e++)
                row[e] = 1 / (1 + exponential(-row[e])) + a.corrections[first + e];
            int64_t at = ((from + m) * a.layers + layer) * a.named;
            name_best(a, row, scratch.get(), a.experts + at, a.chances + at);
        }
    });
}

}  // namespace ISA
