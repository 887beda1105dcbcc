// A linear layer.
#pragma once

#include "arguments.h"
#include "pool.h"
#include "products.h"

namespace ISA {

// Handing work to other threads costs some microseconds; less work than this runs faster alone.
inline int threads_for(int64_t weights, int64_t rows, int64_t threads) {
    return int(weights < (1 << 16) && weights * rows < (1 << 19) ? 1 : threads);
}

// Calls body(0 .. count - 1), on several threads.
template <class Body> void for_each_task(int64_t count, int64_t threads, Body body) {
    auto call = [](void* context, int64_t index) { (*static_cast<Body*>(context))(index); };
    run_tasks(count, threads, call, &body);
}

template <class Element> void linear(const LinearArguments& a) {
    const Element* x = static_cast<const Element*>(a.x);
    const Element* weight = static_cast<const Element*>(a.weight);
    Element* y = static_cast<Element*>(a.y);
    int64_t row_blocks = blocks(a.rows, BLOCK_ROWS), out_blocks = blocks(a.outputs, BLOCK_OUTPUTS);
    int threads = threads_for(a.width * a.outputs, a.rows, a.threads);
    for_each_task(row_blocks * out_blocks, threads, [&](int64_t task) {
        int64_t row = task % row_blocks * BLOCK_ROWS, out = task / row_blocks * BLOCK_OUTPUTS;
        int64_t rows = least(BLOCK_ROWS, a.rows - row);
        const Element* pointers[BLOCK_ROWS];
        for (int64_t m = 0; m < rows; m++) pointers[m] = x + (row + m) * a.width;
        auto store = [&](int64_t m, int64_t n, const float* values, int64_t count) {
            Element* line = y + (row + m) * a.outputs + n;
            for (int64_t i = 0; i < count; i++) line[i] = narrow<Element>(values[i]);
        };
        products(pointers, rows, weight, out, least(out + BLOCK_OUTPUTS, a.outputs), a.width, store);
    });
}

}  // namespace ISA
