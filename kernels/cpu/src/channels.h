// Rows times a matrix that is stored by input: the weights of one input, one for each output, lie
// side by side. Inputs that are 0 are not read. The bits are those of products.h: there, partial
// sum number l of an output takes the steps l, l + LANES, ... one after the other, and so it does
// here. A step is one input, or two where the processor multiplies pairs. Adding 0 * w changes
// nothing but the sign of a 0, if w is finite.
#pragma once

#include <memory>

#include "panels.h"

namespace ISA {

// How far ahead weights are prefetched.
constexpr int64_t AHEAD_STEPS = 8;

inline bool is_zero(float x) { return x == 0; }
inline bool is_zero(bf16 x) { return (x.bits & 0x7fff) == 0; }

// Adds a step of a row, times its weights at `w`, to `count` sums. `other` is not null if the step
// has a second input that is not 0; `w` is null if the first one is.
#if defined(__AVX512BF16__)
inline __m512i wide_bits(const bf16* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
}
inline __m512i wide_bits(const bf16* p, int64_t count) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p));
}
inline void add_step_times(Pair values, const bf16* w, const bf16* other, int64_t count,
                           float* sums) {
    auto add = [&](int64_t n, auto load) {
        __m512i bits = w ? load(w + n) : _mm512_setzero_si512();
        if (other) bits = _mm512_or_si512(bits, _mm512_slli_epi32(load(other + n), 16));
        store_values(sums + n, multiply_add(load_values(sums + n), values, (__m512bh)bits));
    };
    int64_t n = 0;
    for (; n + LANES <= count; n += LANES) add(n, [](const bf16* p) { return wide_bits(p); });
    if (n < count) add(n, [&](const bf16* p) { return wide_bits(p, count - n); });
}
#endif
template <class Element>
inline void add_step_times(float value, const Element* w, const Element*, int64_t count,
                           float* sums) {
    using C = Chunk<Element>;
    int64_t n = 0;
    if constexpr (C::SIZE == LANES) {  // pairs have a function above
        auto add = [&](typename C::Value weights) {
            store_values(sums + n, multiply_add(load_values(sums + n), value, weights));
        };
        for (; n + LANES <= count; n += LANES) add(C::load(w + n));
        if (n < count) add(C::load_part(w + n, count - n));
    }
}

// Step number `step` of a row of `inputs`.
template <class Element>
inline typename Step<Element>::Value step_of(const Element* row, int64_t step, int64_t inputs) {
    constexpr int64_t SIZE = Step<Element>::SIZE;
    typename Step<Element>::Value value;
    Element first = row[step * SIZE], second = {};
    if (SIZE == 2 && step * SIZE + 1 < inputs) second = row[step * SIZE + 1];
    join(&value, first, second);
    return value;
}

// A matrix of all slots, [inputs, outputs] each.
template <class Element> struct ByInputMatrix {
    const Element* values;
    int64_t stride, inputs, outputs;

    static constexpr bool READS_SOME = false;
    static constexpr int64_t SIZE = Step<Element>::SIZE;
    using Value = typename Step<Element>::Value;

    template <class Store>
    void multiply(const Element* const* rows, int64_t num_rows, int64_t slot, int64_t from,
                  int64_t to, Store store) const {
        const Element* matrix = values + slot * stride;
        if (num_rows <= STREAM_ROWS) {
            for (int64_t m = 0; m < num_rows; m++) {
                float out[STREAM_OUTPUTS];
                add_inputs(rows[m], matrix, from, to - from, out);
                store(m, from, out, to - from);
            }
            return;
        }
        for (int64_t n = from; n < to; n += PANEL)
            multiply_panel(rows, num_rows, matrix, n, least(PANEL, to - n), store);
    }

private:
    int64_t num_steps() const { return blocks(inputs, SIZE); }

    // One row, at most STREAM_OUTPUTS outputs: each input that is not 0 is read once, in order.
    void add_inputs(const Element* row, const Element* matrix, int64_t from, int64_t count,
                    float* out) const {
        alignas(64) float sums[LANES][STREAM_OUTPUTS];
        int64_t padded = blocks(count, LANES) * LANES;
        for (auto& lane : sums) std::memset(lane, 0, padded * sizeof(float));
        auto prefetch = [&](int64_t input) {  // short pieces: the processor does not see them coming
            if (input >= inputs || is_zero(row[input])) return;
            const char* weights = reinterpret_cast<const char*>(matrix + input * outputs + from);
            for (int64_t at = 0; at < count * int64_t(sizeof(Element)); at += 64)
                __builtin_prefetch(weights + at, 0, 3);
        };
        for (int64_t step = 0; step < num_steps(); step++) {
            for (int64_t i = 0; i < SIZE; i++) prefetch((step + AHEAD_STEPS) * SIZE + i);
            const Element* of[2] = {nullptr, nullptr};
            for (int64_t i = 0; i < SIZE; i++) {
                int64_t input = step * SIZE + i;
                if (input < inputs && !is_zero(row[input])) of[i] = matrix + input * outputs + from;
            }
            if (of[0] || of[1])
                add_step_times(step_of(row, step, inputs), of[0], of[1], count,
                               sums[step % LANES]);
        }
        for (int64_t i = 0; i < count; i++) out[i] = total_of(sums[0] + i, STREAM_OUTPUTS);
    }

    // Many rows: `count` columns are packed once, each partial sum's steps side by side.
    template <class Store>
    void multiply_panel(const Element* const* rows, int64_t num_rows, const Element* matrix,
                        int64_t from, int64_t count, Store store) const {
        int64_t most = blocks(num_steps(), LANES);
        std::unique_ptr<Value[]> packed(new Value[LANES * most * PANEL]);
        for (int64_t lane = 0; lane < least(LANES, num_steps()); lane++) {
            int64_t depth = steps_of(lane) * SIZE;
            bool has_last = (num_steps() - 1) % LANES == lane;
            auto row = [&](int64_t k) {
                return matrix + ((k / SIZE * LANES + lane) * SIZE + k % SIZE) * outputs;
            };
            pack_columns<Element>(row, depth - (has_last ? num_steps() * SIZE - inputs : 0), from,
                                  count, packed.get() + lane * most * PANEL);
        }
        for (int64_t m = 0; m < num_rows; m += PANEL_ROWS) {
            int64_t some = least(PANEL_ROWS, num_rows - m);
            alignas(64) float sums[LANES][PANEL_ROWS][PANEL];
            for (int64_t lane = 0; lane < LANES; lane++) {
                auto value = [&](int64_t i, int64_t s) {
                    return step_of(rows[m + i], s * LANES + lane, inputs);
                };
                panel_tile(some, value, packed.get() + lane * most * PANEL, steps_of(lane), true,
                           sums[lane]);
            }
            for (int64_t i = 0; i < some; i++) {
                float out[PANEL];
                for (int64_t n = 0; n < count; n++)
                    out[n] = total_of(sums[0][i] + n, PANEL_ROWS * PANEL);
                store(m + i, from, out, count);
            }
        }
    }

    int64_t steps_of(int64_t lane) const {
        return lane < num_steps() ? blocks(num_steps() - lane, LANES) : 0;
    }
};

}  // namespace ISA
