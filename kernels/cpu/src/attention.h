// New rows of some sequences through a layer's attention: norm, projections, norms of queries and
// keys, clipping, rotary embedding, cache, attention, output projection, residual and the next norm.
// A row's arithmetic depends on no other new row but those before it in its text.
#pragma once

#include "cached_attention.h"
#include "norm.h"

namespace ISA {

// Rotates the halves of a head against each other.
template <class Element>
inline void rotate(Element* x, const Element* cosine, const Element* sine, int64_t width) {
    int64_t half = width / 2;
    for (int64_t i = 0; i < half; i++) {
        float first = widen(x[i]), second = widen(x[half + i]);
        x[i] = narrow<Element>(first * widen(cosine[i]) - second * widen(sine[i]));
        x[half + i] =
            narrow<Element>(second * widen(cosine[half + i]) + first * widen(sine[half + i]));
    }
}

template <class Element> inline void limit(Element* x, float highest, int64_t width) {
    for (int64_t i = 0; i < width; i++) {
        float value = widen(x[i]);
        x[i] = narrow<Element>(value > highest ? highest : value < -highest ? -highest : value);
    }
}

// Makes a new query or key ready for attention.
template <class Element>
inline void prepare(const AttentionWeights& w, Element* x, const void* norm, const Element* cosine,
                    const Element* sine) {
    int64_t width = w.head_dim;
    if (norm && w.norms_heads)
        rms_norm(x, static_cast<const Element*>(norm), width, w.epsilon, x);
    if (w.clip > 0) limit(x, w.clip, width);
    if (w.rotates) rotate(x, cosine, sine, width);
}

// Rows of q, k and v of all new rows, one after the other.
template <class Element> struct Projections {
    int64_t q_size, kv_size, width;
    std::unique_ptr<Element[]> values;
    Projections(const AttentionWeights& w, int64_t rows)
        : q_size(w.num_heads * w.head_dim), kv_size(w.num_kv_heads * w.head_dim),
          width(q_size + 2 * kv_size), values(new Element[rows * width]) {}
    Element* row(int64_t r) const { return values.get() + r * width; }
};

// Calls store(m, n, values, count) for products of all rows, with row numbers from 0.
template <class Element, class Store>
void row_block_products(const Element* x, int64_t width, int64_t first, int64_t rows,
                        const void* weights, int64_t from, int64_t to, Store store) {
    const Element* pointers[BLOCK_ROWS];
    for (int64_t m = 0; m < rows; m++) pointers[m] = x + (first + m) * width;
    products(pointers, rows, static_cast<const Element*>(weights), from, to, width,
             [&](int64_t m, int64_t n, const float* values, int64_t count) {
                 store(first + m, n, values, count);
             });
}

template <class Element>
void project(const AttentionWeights& w, const Element* normed, int64_t rows, int threads,
             const Projections<Element>& qkv) {
    // Weight rows of q, k and v as one list of tasks, each within one matrix.
    const void *matrices[3] = {w.q, w.k, w.v}, *biases[3] = {w.q_bias, w.k_bias, w.v_bias};
    int64_t starts[4] = {0, qkv.q_size, qkv.q_size + qkv.kv_size, qkv.width};
    int64_t first_task[4] = {0, 0, 0, 0}, row_blocks = blocks(rows, BLOCK_ROWS);
    for (int i = 0; i < 3; i++)
        first_task[i + 1] = first_task[i] + blocks(starts[i + 1] - starts[i], BLOCK_OUTPUTS);
    for_each_task(first_task[3] * row_blocks, threads, [&](int64_t index) {
        int64_t task = index / row_blocks, first = index % row_blocks * BLOCK_ROWS;
        int i = task >= first_task[2] ? 2 : task >= first_task[1] ? 1 : 0;
        int64_t from = (task - first_task[i]) * BLOCK_OUTPUTS;
        int64_t to = least(from + BLOCK_OUTPUTS, starts[i + 1] - starts[i]);
        const Element* bias = static_cast<const Element*>(biases[i]);
        row_block_products(normed, w.d_model, first, least(BLOCK_ROWS, rows - first), matrices[i],
                           from, to, [&](int64_t r, int64_t n, const float* values, int64_t count) {
                               Element* line = qkv.row(r) + starts[i] + n;
                               for (int64_t j = 0; j < count; j++)
                                   line[j] = narrow<Element>(values[j] +
                                                             (bias ? widen(bias[n + j]) : 0));
                           });
    });
}

// Makes queries ready, and stores keys and values.
template <class Element>
void prepare_row(const AttentionWeights& w, const AttentionArguments& a, int64_t b, int64_t r,
                 int64_t position, const Projections<Element>& qkv) {
    int64_t width = w.head_dim;
    const Element* cosine = static_cast<const Element*>(a.cosine) + r * width;
    const Element* sine = static_cast<const Element*>(a.sine) + r * width;
    Element *q = qkv.row(r), *k = q + qkv.q_size, *v = k + qkv.kv_size;
    if (w.q_norm && !w.norms_heads) {  // one norm over all heads
        rms_norm(q, static_cast<const Element*>(w.q_norm), qkv.q_size, w.epsilon, q);
        rms_norm(k, static_cast<const Element*>(w.k_norm), qkv.kv_size, w.epsilon, k);
    }
    for (int64_t h = 0; h < w.num_heads; h++) prepare(w, q + h * width, w.q_norm, cosine, sine);
    for (int64_t g = 0; g < w.num_kv_heads; g++) {
        Element *key = k + g * width, *value = v + g * width;
        prepare(w, key, w.k_norm, cosine, sine);
        if (w.clip > 0) limit(value, w.clip, width);
        store(*a.to, a.layer, b, g, 0, width, position, key);
        store(*a.to, a.layer, b, g, 1, width, position, value);
    }
}

// x_out = x + the output projection, with its norm.
template <class Element>
void project_back(const AttentionWeights& w, const AttentionArguments& a, const Element* mixed,
                  int64_t mixed_width, int threads) {
    int64_t rows = a.to->rows, width = w.d_model, row_blocks = blocks(rows, BLOCK_ROWS);
    const Element* x = static_cast<const Element*>(a.x);
    const Element* bias = static_cast<const Element*>(w.o_bias);
    Element* x_out = static_cast<Element*>(a.x_out);
    for_each_task(blocks(width, BLOCK_OUTPUTS) * row_blocks, threads, [&](int64_t index) {
        int64_t from = index / row_blocks * BLOCK_OUTPUTS, first = index % row_blocks * BLOCK_ROWS;
        row_block_products(mixed, mixed_width, first, least(BLOCK_ROWS, rows - first), w.o, from,
                           least(from + BLOCK_OUTPUTS, width),
                           [&](int64_t r, int64_t n, const float* values, int64_t count) {
                               for (int64_t j = 0; j < count; j++) {
                                   int64_t at = r * width + n + j;
                                   float value = values[j] + (bias ? widen(bias[n + j]) : 0);
                                   x_out[at] = narrow<Element>(widen(x[at]) + value);
                               }
                           });
    });
    for_each_row(rows, threads, [&](int64_t r) {
        rms_norm(x_out + r * width, static_cast<const Element*>(w.output_norm), width, w.epsilon,
                 static_cast<Element*>(a.normed) + r * width);
    });
}

template <class Element>
void attention(const AttentionWeights& w, const AttentionArguments& a) {
    const CachedRows& to = *a.to;
    int64_t rows = to.rows, width = w.d_model;
    const Element* x = static_cast<const Element*>(a.x);
    Projections<Element> qkv(w, rows);
    std::unique_ptr<Element[]> normed(new Element[rows * width]);
    std::unique_ptr<Element[]> mixed(new Element[rows * qkv.q_size]);
    int threads = threads_for(width * (qkv.width + qkv.q_size), rows, a.threads);
    for_each_row(rows, threads, [&](int64_t r) {
        rms_norm(x + r * width, static_cast<const Element*>(w.input_norm), width, w.epsilon,
                 normed.get() + r * width);
    });
    project(w, normed.get(), rows, threads, qkv);
    // All rows before any attends: sequences of one row may be positions of one text.
    for_each_new_row(to, threads, [&](int64_t b, int64_t r, int64_t position) {
        prepare_row(w, a, b, r, position, qkv);
    });
    Heads heads{w.num_heads, w.num_kv_heads, w.head_dim, w.head_dim, 0, w.window, w.scale, w.sinks};
    attend_stored<Element>(heads, to, a.layer, qkv.row(0), qkv.width, mixed.get(), qkv.q_size,
                           threads);
    project_back(w, a, mixed.get(), qkv.q_size, threads);
}

}  // namespace ISA
