// Rows times the rows of a weight matrix, y[m][n] = <x_m, w_n>, each product summed in an order
// that depends on the width only: a row's result never depends on the other rows.
#pragma once

#include "vectors.h"

namespace ISA {

// Rows of x in one tile: as many sums as the registers hold, with four rows of weights.
#if defined(__AVX512F__)
constexpr int64_t TILE_ROWS = 6;
#else
constexpr int64_t TILE_ROWS = 2;
#endif
// The most rows of x for weights read from memory: with more, arithmetic waits for loads of x.
constexpr int64_t STREAM_ROWS = TILE_ROWS < 4 ? TILE_ROWS : 4;
// Outputs in one task: their weights stay in the second-level cache for all rows.
constexpr int64_t BLOCK_OUTPUTS = 64;
constexpr int64_t BLOCK_ROWS = 96;
// Outputs in one task of at most STREAM_ROWS rows.
constexpr int64_t STREAM_OUTPUTS = 256;
static_assert(STREAM_ROWS * STREAM_OUTPUTS <= BLOCK_ROWS * BLOCK_OUTPUTS);

inline int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Where rows of weights are: in memory one after the other, in memory here and there, in the cache.
enum class From { STREAM, SCATTERED, CACHE };

// How far ahead weights are prefetched, in bytes: a page. The processor itself stops at its end.
constexpr int64_t AHEAD = 4096;

// out[m][0..3] = products of `Rows` rows of x with four rows of weights.
//
// From memory the rows of weights are read one after the other, which it serves fastest. From the
// cache the four are read side by side, so that a load of x serves four products. The order of
// summation is the same.
template <int Rows, From Place, class Element>
inline void tile(const Element* const* x, const Element* const* w, int64_t width, float (*out)[4]) {
    using C = Chunk<Element>;
    constexpr int Side = Place == From::CACHE ? 4 : 1;
    Sum sums[Rows][4];
    for (int first = 0; first < 4; first += Side) {
        Sum part[Rows][Side];
#pragma GCC unroll 8
        for (int m = 0; m < Rows; m++)
#pragma GCC unroll 4
            for (int n = 0; n < Side; n++) part[m][n] = no_sum();
        auto add = [&](auto load, int64_t at) {
            if constexpr (Place == From::STREAM)
                __builtin_prefetch(w[first] + at + AHEAD / sizeof(Element), 0, 2);
            typename C::Value weights[Side];
#pragma GCC unroll 4
            for (int n = 0; n < Side; n++) weights[n] = load(w[first + n] + at);
#pragma GCC unroll 8
            for (int m = 0; m < Rows; m++) {
                typename C::Value row = load(x[m] + at);
#pragma GCC unroll 4
                for (int n = 0; n < Side; n++) part[m][n] = C::dot(part[m][n], row, weights[n]);
            }
        };
        int64_t at = 0;
        for (; at + C::SIZE <= width; at += C::SIZE)
            add([](const Element* p) { return C::load(p); }, at);
        int64_t rest = width - at;
        if (rest) add([rest](const Element* p) { return C::load_part(p, rest); }, at);
#pragma GCC unroll 8
        for (int m = 0; m < Rows; m++)
#pragma GCC unroll 4
            for (int n = 0; n < Side; n++) sums[m][first + n] = part[m][n];
    }
#pragma GCC unroll 8
    for (int m = 0; m < Rows; m++) total4(sums[m], out[m]);
}

template <From Place, class Element>
inline void tile(int64_t rows, const Element* const* x, const Element* const* w, int64_t width,
                 float (*out)[4]) {
    switch (rows) {
        case 1: return tile<1, Place>(x, w, width, out);
        case 2: return tile<2, Place>(x, w, width, out);
#if defined(__AVX512F__)
        case 3: return tile<3, Place>(x, w, width, out);
        case 4: return tile<4, Place>(x, w, width, out);
        case 5: return tile<5, Place>(x, w, width, out);
        case 6: return tile<6, Place>(x, w, width, out);
#endif
    }
}

// Calls store(m, n, values, count) for the products of rows [0, rows) of x and the weight rows
// [from, to), four outputs at a time (`count` of them at the end).
template <class Element, class Store>
inline void products(const Element* const* x, int64_t rows, const Element* weights, int64_t from,
                     int64_t to, int64_t width, Store store) {
    for (int64_t m = 0, some; m < rows; m += some) {
        some = least(m == 0 ? STREAM_ROWS : TILE_ROWS, rows - m);
        for (int64_t n = from; n < to; n += 4) {
            int64_t count = least(4, to - n);
            const Element* w[4];
            for (int64_t i = 0; i < 4; i++) w[i] = weights + (n + least(i, count - 1)) * width;
            float out[TILE_ROWS][4];
            if (m == 0)
                tile<From::STREAM>(some, x, w, width, out);
            else
                tile<From::CACHE>(some, x + m, w, width, out);
            for (int64_t i = 0; i < some; i++) store(m + i, n, out[i], count);
        }
    }
}

}  // namespace ISA
