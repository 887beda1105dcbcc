// Root-mean-square norm of rows.
#pragma once

#include "arguments.h"
#include "linear.h"

namespace ISA {

// Norms of fewer rows than this are not worth a second thread.
constexpr int64_t FEW = 16;

// Calls body(0 .. rows - 1), on several threads if there are many.
template <class Body> void for_each_row(int64_t rows, int threads, Body body) {
    for_each_task(rows, rows < FEW ? 1 : threads, body);
}

// out = weight * x / rms(x), in fp32 and rounded before the weight like Hugging Face's norm.
template <class In, class Element>
inline void rms_norm(const In* x, const Element* weight, int64_t width, float epsilon,
                     Element* out) {
    constexpr int64_t LANES = 16;  // partial sums, so that the loop is vectorized
    float partial[LANES] = {}, squares = 0;
    int64_t whole = width / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES)
        for (int64_t j = 0; j < LANES; j++) partial[j] += widen(x[i + j]) * widen(x[i + j]);
    for (int64_t j = 0; j < LANES; j++) squares += partial[j];
    for (int64_t i = whole; i < width; i++) squares += widen(x[i]) * widen(x[i]);
    float factor = 1 / std::sqrt(squares / float(width) + epsilon);
    for (int64_t i = 0; i < width; i++)
        out[i] = narrow<Element>(widen(narrow<Element>(widen(x[i]) * factor)) * widen(weight[i]));
}

template <class Element> void norm(const NormArguments& a) {
    const Element* x = static_cast<const Element*>(a.x);
    Element* y = static_cast<Element*>(a.y);
    int64_t task_blocks = blocks(a.rows, FEW);
    for_each_task(task_blocks, a.threads, [&](int64_t task) {
        for (int64_t m = task * FEW; m < least(a.rows, (task + 1) * FEW); m++)
            rms_norm(x + m * a.width, static_cast<const Element*>(a.weight), a.width, a.epsilon,
                     y + m * a.width);
    });
}

}  // namespace ISA
