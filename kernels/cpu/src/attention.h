// One new position of each sequence through a layer's attention: norm, projections, norms of
// queries and keys, clipping, rotary embedding, cache, attention, output projection, residual and
// the next norm. A sequence's arithmetic never depends on the others.
#pragma once

#include <memory>

#include "arguments.h"
#include "linear.h"
#include "norm.h"
#include "products.h"

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

// A new query or key, ready for attention; `out` may be `x`.
template <class Element>
inline void prepare(const AttentionWeights& w, const Element* x, const void* norm,
                    const Element* cosine, const Element* sine, Element* out) {
    int64_t width = w.head_dim;
    if (norm && w.norms_heads)
        rms_norm(x, static_cast<const Element*>(norm), width, w.epsilon, out);
    else if (out != x)
        std::memcpy(out, x, width * sizeof(Element));
    if (w.clip > 0) limit(out, w.clip, width);
    if (w.rotates) rotate(out, cosine, sine, width);
}

// out = softmax(scale * scores) v for one head; scores become probabilities. A sink, if any,
// is a logit without a value.
template <class Element>
inline void mix(float* scores, const Element* v, int64_t length, int64_t width, float scale,
                const Element* sink, Element* out, float* total) {
    float highest = scores[0], sum = 0;
    for (int64_t l = 1; l < length; l++) highest = scores[l] > highest ? scores[l] : highest;
    if (sink) {
        float score = widen(*sink) / scale;
        highest = score > highest ? score : highest;
        sum = exponential((score - highest) * scale);
    }
    for (int64_t l = 0; l < length; l++) scores[l] = exponential((scores[l] - highest) * scale);
    for (int64_t l = 0; l < length; l++) sum += scores[l];
    for (int64_t i = 0; i < width; i++) total[i] = 0;
    int64_t l = 0;
    for (; l + 4 <= length; l += 4) {
        const Element* rows = v + l * width;
        for (int64_t i = 0; i < width; i++)
            total[i] += (scores[l] * widen(rows[i]) + scores[l + 1] * widen(rows[width + i])) +
                        (scores[l + 2] * widen(rows[2 * width + i]) +
                         scores[l + 3] * widen(rows[3 * width + i]));
    }
    for (; l < length; l++)
        for (int64_t i = 0; i < width; i++) total[i] += scores[l] * widen(v[l * width + i]);
    for (int64_t i = 0; i < width; i++) out[i] = narrow<Element>(total[i] / sum);
}

// A sequence's keys or values (which = 1) of one head.
template <class Element>
Element* stored(const AttentionWeights& w, const AttentionArguments& a, int64_t b, int64_t g,
                int which) {
    return static_cast<Element*>(a.caches[b][2 * a.layer + which]) +
           g * a.capacities[b] * w.head_dim;
}

// Append one sequence's new key and value of one head to its cache.
template <class Element>
void store_position(const AttentionWeights& w, const AttentionArguments& a, int64_t b, int64_t g,
                    Element* qkv) {
    int64_t width = w.head_dim, at = a.lengths[b] * width;
    const Element* cosine = static_cast<const Element*>(a.cosine) + b * width;
    const Element* sine = static_cast<const Element*>(a.sine) + b * width;
    Element* new_k = qkv + (w.num_heads + g) * width;
    Element* new_v = qkv + (w.num_heads + w.num_kv_heads + g) * width;
    prepare<Element>(w, new_k, w.k_norm, cosine, sine, stored<Element>(w, a, b, g, 0) + at);
    Element* last_v = stored<Element>(w, a, b, g, 1) + at;
    std::memcpy(last_v, new_v, width * sizeof(Element));
    if (w.clip > 0) limit(last_v, w.clip, width);
}

// The query heads of one sequence that share a key and value head.
template <class Element>
void attend_group(const AttentionWeights& w, const AttentionArguments& a, int64_t b, int64_t g,
                  Element* qkv, Element* out) {
    int64_t width = w.head_dim, heads = w.num_heads / w.num_kv_heads;
    int64_t length = a.lengths[b] + 1;
    const Element* cosine = static_cast<const Element*>(a.cosine) + b * width;
    const Element* sine = static_cast<const Element*>(a.sine) + b * width;
    Element* q = qkv + g * heads * width;
    const Element* k = stored<Element>(w, a, b, g, 0);
    const Element* v = stored<Element>(w, a, b, g, 1);
    int64_t unseen = w.window && length > w.window ? length - w.window : 0;
    k += unseen * width, v += unseen * width, length -= unseen;
    const Element* sinks = static_cast<const Element*>(w.sinks);
    std::unique_ptr<float[]> scratch(new float[TILE_ROWS * length + width]);
    for (int64_t from = 0; from < heads; from += TILE_ROWS) {
        int64_t count = least(TILE_ROWS, heads - from);
        const Element* pointers[TILE_ROWS];
        for (int64_t h = 0; h < count; h++) {
            Element* head = q + (from + h) * width;
            prepare<Element>(w, head, w.q_norm, cosine, sine, head);
            pointers[h] = head;
        }
        products(pointers, count, k, 0, length, width,
                 [&](int64_t h, int64_t l, const float* values, int64_t some) {
                     for (int64_t i = 0; i < some; i++) scratch[h * length + l + i] = values[i];
                 });
        for (int64_t h = 0; h < count; h++)
            mix(scratch.get() + h * length, v, length, width, w.scale,
                sinks ? sinks + g * heads + from + h : nullptr,
                out + (g * heads + from + h) * width, scratch.get() + TILE_ROWS * length);
    }
}

// One norm over all heads of a query, and one over those of a key. Rows of `qkv` are [q, k, v].
template <class Element>
void norm_projections(const AttentionWeights& w, int64_t batch, int threads, Element* qkv) {
    int64_t q_size = w.num_heads * w.head_dim, kv_size = w.num_kv_heads * w.head_dim;
    for_each_task(batch, batch < FEW ? 1 : threads, [&](int64_t b) {
        Element *q = qkv + b * (q_size + 2 * kv_size), *k = q + q_size;
        rms_norm(q, static_cast<const Element*>(w.q_norm), q_size, w.epsilon, q);
        rms_norm(k, static_cast<const Element*>(w.k_norm), kv_size, w.epsilon, k);
    });
}

template <class Element>
void attend(const AttentionWeights& w, const AttentionArguments& a) {
    int64_t batch = a.sequences, width = w.d_model;
    int64_t q_size = w.num_heads * w.head_dim, kv_size = w.num_kv_heads * w.head_dim;
    int64_t qkv_size = q_size + 2 * kv_size;
    const Element* x = static_cast<const Element*>(a.x);
    Element* x_out = static_cast<Element*>(a.x_out);
    std::unique_ptr<Element[]> normed(new Element[batch * width]);
    std::unique_ptr<Element[]> qkv(new Element[batch * qkv_size]);
    std::unique_ptr<Element[]> mixed(new Element[batch * q_size]);
    // Weight rows of q, k and v as one list of tasks, each within one matrix.
    const void *matrices[3] = {w.q, w.k, w.v}, *biases[3] = {w.q_bias, w.k_bias, w.v_bias};
    int64_t starts[4] = {0, q_size, q_size + kv_size, qkv_size}, first_task[4] = {0, 0, 0, 0};
    for (int i = 0; i < 3; i++)
        first_task[i + 1] = first_task[i] + blocks(starts[i + 1] - starts[i], BLOCK_OUTPUTS);
    std::unique_ptr<const Element*[]> rows(new const Element*[batch]);
    std::unique_ptr<const Element*[]> mixed_rows(new const Element*[batch]);
    for (int64_t b = 0; b < batch; b++) {
        rows[b] = normed.get() + b * width;
        mixed_rows[b] = mixed.get() + b * q_size;
    }
    int threads = threads_for(width * (qkv_size + q_size), batch, a.threads);
    for_each_task(batch, batch < FEW ? 1 : threads, [&](int64_t b) {
        rms_norm(x + b * width, static_cast<const Element*>(w.input_norm), width, w.epsilon,
                 normed.get() + b * width);
    });
    for_each_task(first_task[3], threads, [&](int64_t task) {
        int i = task >= first_task[2] ? 2 : task >= first_task[1] ? 1 : 0;
        int64_t from = (task - first_task[i]) * BLOCK_OUTPUTS;
        int64_t to = least(from + BLOCK_OUTPUTS, starts[i + 1] - starts[i]);
        const Element* bias = static_cast<const Element*>(biases[i]);
        products(rows.get(), batch, static_cast<const Element*>(matrices[i]), from, to, width,
                 [&](int64_t b, int64_t n, const float* values, int64_t count) {
                     Element* line = qkv.get() + b * qkv_size + starts[i] + n;
                     for (int64_t j = 0; j < count; j++)
                         line[j] = narrow<Element>(values[j] + (bias ? widen(bias[n + j]) : 0));
                 });
    });
    if (w.q_norm && !w.norms_heads) norm_projections(w, batch, threads, qkv.get());
    // All rows before any attends: they may be positions of one text that share a cache.
    for_each_task(batch, batch < FEW ? 1 : threads, [&](int64_t b) {
        for (int64_t g = 0; g < w.num_kv_heads; g++)
            store_position(w, a, b, g, qkv.get() + b * qkv_size);
    });
    for_each_task(batch * w.num_kv_heads, threads, [&](int64_t task) {
        int64_t b = task / w.num_kv_heads;
        attend_group(w, a, b, task % w.num_kv_heads, qkv.get() + b * qkv_size,
                     mixed.get() + b * q_size);
    });
    for_each_task(blocks(width, BLOCK_OUTPUTS), threads, [&](int64_t task) {
        int64_t from = task * BLOCK_OUTPUTS, to = least(from + BLOCK_OUTPUTS, width);
        const Element* bias = static_cast<const Element*>(w.o_bias);
        products(mixed_rows.get(), batch, static_cast<const Element*>(w.o), from, to, q_size,
                 [&](int64_t b, int64_t n, const float* values, int64_t count) {
                     for (int64_t j = 0; j < count; j++) {
                         int64_t at = b * width + n + j;
                         float value = values[j] + (bias ? widen(bias[n + j]) : 0);
                         x_out[at] = narrow<Element>(widen(x[at]) + value);
                     }
                 });
    });
    for_each_task(batch, batch < FEW ? 1 : threads, [&](int64_t b) {
        rms_norm(x_out + b * width, static_cast<const Element*>(w.output_norm), width, w.epsilon,
                 static_cast<Element*>(a.normed) + b * width);
    });
}

}  // namespace ISA
