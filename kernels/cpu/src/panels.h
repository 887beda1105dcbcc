// Matrix products over rows of B, c[m][n] = sum_k a(m, k) b(k, n): what backward needs in
// addition to products.h. Columns of B are packed into a panel once, for all rows of A.
#pragma once

#include <memory>
#include <type_traits>

#include "packing.h"

namespace ISA {

#if defined(__AVX2__)
inline Sum load_values(const float* p) {
#if defined(__AVX512F__)
    return _mm512_loadu_ps(p);
#else
    return _mm256_loadu_ps(p);
#endif
}
inline Sum multiply_add(Sum sum, float a, Sum b) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(_mm512_set1_ps(a), b, sum);
#else
    return _mm256_fmadd_ps(_mm256_set1_ps(a), b, sum);
#endif
}
inline void store_values(float* p, Sum sum) {
#if defined(__AVX512F__)
    _mm512_storeu_ps(p, sum);
#else
    _mm256_storeu_ps(p, sum);
#endif
}
#else
inline Sum load_values(const float* p) { return Sum{p[0], p[1], p[2], p[3]}; }
inline Sum multiply_add(Sum sum, float a, Sum b) { return sum + Sum{a, a, a, a} * b; }
inline void store_values(float* p, Sum sum) { std::memcpy(p, &sum, sizeof sum); }
#endif
#if defined(__AVX512BF16__)
inline __m512bh load_values(const Pair* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline Sum multiply_add(Sum sum, Pair a, __m512bh b) {
    int32_t bits;
    std::memcpy(&bits, &a, sizeof bits);
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(bits), b);
}
#endif

// One tile: `a(m, step)` times a packed panel, added to what `c` holds of earlier depths.
template <int Rows, class Value, class A>
inline void panel_tile(A a, const Value* panel, int64_t steps, bool is_first, float (*c)[PANEL]) {
    Sum sums[Rows][PANEL_VECTORS];
#pragma GCC unroll 8
    for (int m = 0; m < Rows; m++)
#pragma GCC unroll 4
        for (int v = 0; v < PANEL_VECTORS; v++)
            sums[m][v] = is_first ? no_sum() : load_values(c[m] + v * LANES);
    for (int64_t s = 0; s < steps; s++) {
        decltype(load_values(panel)) b[PANEL_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < PANEL_VECTORS; v++) b[v] = load_values(panel + s * PANEL + v * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < Rows; m++) {
            auto value = a(m, s);
#pragma GCC unroll 4
            for (int v = 0; v < PANEL_VECTORS; v++)
                sums[m][v] = multiply_add(sums[m][v], value, b[v]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < Rows; m++)
#pragma GCC unroll 4
        for (int v = 0; v < PANEL_VECTORS; v++) store_values(c[m] + v * LANES, sums[m][v]);
}

template <class Value, class A>
inline void panel_tile(int64_t rows, A a, const Value* panel, int64_t steps, bool is_first,
                       float (*c)[PANEL]) {
    switch (rows) {
        case 1: return panel_tile<1>(a, panel, steps, is_first, c);
        case 2: return panel_tile<2>(a, panel, steps, is_first, c);
        case 3: return panel_tile<3>(a, panel, steps, is_first, c);
        case 4: return panel_tile<4>(a, panel, steps, is_first, c);
#if defined(__AVX512F__)
        case 5: return panel_tile<5>(a, panel, steps, is_first, c);
        case 6: return panel_tile<6>(a, panel, steps, is_first, c);
#endif
    }
}

// Rows of A as they are in memory: a(m, step) for products over the width of those rows.
inline float broadcast(const float* row, int64_t step) { return row[step]; }
#if defined(__AVX512BF16__)
inline Pair broadcast(const bf16* row, int64_t step) {
    Pair pair;
    std::memcpy(&pair, row + 2 * step, sizeof pair);
    return pair;
}
#else
inline float broadcast(const bf16* row, int64_t step) { return widen(row[step]); }
#endif

// c[m][n] = sum_k x[m][k] * b(k, n) for rows [0, rows) of x and a panel of columns of B, which
// pack(k, depth, panel) packs. `depth` is even where pairs are multiplied.
template <class Element, class Pack>
inline void rows_times_panel(const Element* const* x, int64_t rows, int64_t depth, Pack pack,
                             float (*c)[PANEL]) {
    using S = Step<Element>;
    alignas(64) typename S::Value panel[DEPTH / S::SIZE * PANEL];
    for (int64_t k = 0; k < depth; k += DEPTH) {
        int64_t some = least(DEPTH, depth - k), steps = blocks(some, S::SIZE);
        pack(k, some, panel);
        for (int64_t m = 0; m < rows; m += PANEL_ROWS)
            panel_tile(
                least(PANEL_ROWS, rows - m),
                [&](int64_t i, int64_t s) { return broadcast(x[m + i] + k, s); }, panel, steps,
                k == 0, c + m);
    }
}

// total[m][n] (+)= sum_k a_row(k)[m0 + m] * b_row(k)[n]: a panel of columns of A, transposed, times
// all `width` columns of B. Adds to `total`, or writes it if `is_empty`. Sums over several depths
// are rounded once, at the end; until then they are in the total itself (fp32) or in fp32 lines.
template <class Element, class Total, class ARow, class BRow>
inline void add_transposed_product(ARow a_row, BRow b_row, int64_t depth, int64_t m0,
                                   int64_t outputs, int64_t width, bool is_empty, Total* total) {
    using S = Step<Element>;
    alignas(64) typename S::Value a_panel[DEPTH / S::SIZE * PANEL], b_panel[DEPTH / S::SIZE * PANEL];
    float* sums;
    std::unique_ptr<float[]> own_sums;
    if constexpr (std::is_same_v<Total, float>) {
        sums = total + m0 * width;
    } else {
        if (depth > DEPTH) own_sums.reset(new float[outputs * width]);
        sums = own_sums.get();
    }
    for (int64_t k = 0; k < depth; k += DEPTH) {
        int64_t some = least(DEPTH, depth - k), steps = blocks(some, S::SIZE);
        bool is_first = k == 0, is_last = k + some == depth;
        pack_columns<Element>([&](int64_t i) { return a_row(k + i); }, some, m0, outputs, a_panel);
        for (int64_t n = 0; n < width; n += PANEL) {
            int64_t count = least(PANEL, width - n);
            pack_columns<Element>([&](int64_t i) { return b_row(k + i); }, some, n, count, b_panel);
            for (int64_t m = 0; m < outputs; m += PANEL_ROWS) {
                int64_t rows = least(PANEL_ROWS, outputs - m);
                alignas(64) float c[PANEL_ROWS][PANEL];
                panel_tile(
                    rows, [&](int64_t i, int64_t s) { return a_panel[s * PANEL + m + i]; }, b_panel,
                    steps, true, c);
                for (int64_t i = 0; i < rows; i++) {
                    float* earlier = sums ? sums + (m + i) * width + n : nullptr;
                    Total* line = total + (m0 + m + i) * width + n;
                    if (!is_first)
                        for (int64_t j = 0; j < count; j++) c[i][j] += earlier[j];
                    else if (!is_empty)
                        for (int64_t j = 0; j < count; j++) c[i][j] += widen(line[j]);
                    if (is_last)
                        for (int64_t j = 0; j < count; j++) line[j] = narrow<Total>(c[i][j]);
                    else
                        std::memcpy(earlier, c[i], count * sizeof(float));
                }
            }
        }
    }
}

// The same for B = rows of weights [from, from + count), `width` long, as they are in memory, and
// for B = the transpose of such rows: y = x w^T.
template <class Element>
inline void rows_times(const Element* const* x, int64_t rows, const Element* weights, int64_t depth,
                       int64_t width, int64_t from, int64_t count, float (*c)[PANEL]) {
    auto pack = [&](int64_t k, int64_t some, auto* panel) {
        auto row = [&](int64_t i) { return weights + (k + i) * width; };
        pack_columns<Element>(row, some, from, count, panel);
    };
    rows_times_panel(x, rows, depth, pack, c);
}
template <class Element>
inline void rows_times_transposed(const Element* const* x, int64_t rows, const Element* weights,
                                  int64_t depth, int64_t from, int64_t count, float (*c)[PANEL]) {
    auto pack = [&](int64_t k, int64_t some, auto* panel) {
        auto row = [&](int64_t n) { return weights + (from + n) * depth + k; };
        pack_transposed<Element>(row, some, count, panel);
    };
    rows_times_panel(x, rows, depth, pack, c);
}

// Writes the sum of `depth` weighted rows, `count` columns of them and at most a panel, to `total`
// if `writes`, else adds it there.
template <class Total, class Row, class Weight>
inline void add_weighted_rows(Row row, Weight weight, int64_t depth, int64_t count, bool writes,
                              Total* total) {
    float sums[PANEL] = {};
    for (int64_t k = 0; k < depth; k++) {
        const auto* values = row(k);
        float factor = weight(k);
        for (int64_t i = 0; i < count; i++) sums[i] += factor * widen(values[i]);
    }
    for (int64_t i = 0; i < count; i++)
        total[i] = narrow<Total>(writes ? sums[i] : widen(total[i]) + sums[i]);
}

}  // namespace ISA
