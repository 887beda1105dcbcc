// Columns of matrices packed into panels, in the order in which panels.h multiplies them.
#pragma once

#include "products.h"

namespace ISA {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
#if defined(__AVX512F__)
constexpr int64_t PANEL_ROWS = 6, PANEL_VECTORS = 4;
#else
constexpr int64_t PANEL_ROWS = 4, PANEL_VECTORS = 2;
#endif
// Columns and depth of a panel, which stays in the second-level cache. Rows that are multiplied by
// one packed panel: enough to make the cost of packing small.
constexpr int64_t PANEL = PANEL_VECTORS * LANES;
constexpr int64_t DEPTH = 512;
constexpr int64_t TRAINING_ROWS = 192;

// Step<Element> is what one multiplication takes: one k, or a pair of them in AVX512-BF16.
#if defined(__AVX512BF16__)
struct Pair {
    bf16 first, second;
};
template <class Element> struct Step;
template <> struct Step<float> {
    using Value = float;
    static constexpr int64_t SIZE = 1;
};
template <> struct Step<bf16> {
    using Value = Pair;
    static constexpr int64_t SIZE = 2;
};
#else
template <class Element> struct Step {
    using Value = float;
    static constexpr int64_t SIZE = 1;
};
#endif

// Combines the elements of k and k + 1 into a step.
inline void join(float* to, float first, float) { *to = first; }
inline void join(float* to, bf16 first, bf16) { *to = widen(first); }
#if defined(__AVX512BF16__)
inline void join(Pair* to, bf16 first, bf16 second) { *to = {first, second}; }
#endif

// Packs columns [from, from + count) of rows [0, depth) of B: panel[step][column], zero-padded.
// `row(k)` is the address of row k.
template <class Element, class Row>
inline void pack_columns(Row row, int64_t depth, int64_t from, int64_t count,
                         typename Step<Element>::Value* panel) {
    using S = Step<Element>;
    static const Element zeros[PANEL] = {};
    Element padded[S::SIZE][PANEL] = {};
    for (int64_t k = 0; k < depth; k += S::SIZE, panel += PANEL) {
        const Element* lines[2] = {zeros, zeros};
        for (int64_t i = 0; i < S::SIZE && k + i < depth; i++) {
            lines[i] = row(k + i) + from;
            if (count == PANEL) continue;
            std::memcpy(padded[i], lines[i], count * sizeof(Element));
            lines[i] = padded[i];
        }
        for (int64_t n = 0; n < PANEL; n++) join(panel + n, lines[0][n], lines[1][n]);
    }
}

// Vectors of 32 bits a lane of any type, as GCC and Clang provide them.
typedef float Lanes __attribute__((vector_size(LANES * 4)));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t LaneNumbers __attribute__((vector_size(LANES * 4)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, LaneNumbers{__VA_ARGS__})
#endif

#if defined(__AVX512F__)
inline Lanes interleave_low(Lanes a, Lanes b) {
    return SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline Lanes interleave_high(Lanes a, Lanes b) {
    return SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                   31);
}
#elif defined(__AVX2__)
inline Lanes interleave_low(Lanes a, Lanes b) {
    return SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
inline Lanes interleave_high(Lanes a, Lanes b) {
    return SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
#else
inline Lanes interleave_low(Lanes a, Lanes b) { return SHUFFLE(a, b, 0, 4, 1, 5); }
inline Lanes interleave_high(Lanes a, Lanes b) { return SHUFFLE(a, b, 2, 6, 3, 7); }
#endif

// Exchanges rows and columns: a perfect shuffle of the rows, log2(LANES) times.
inline void transpose(Lanes rows[LANES]) {
    constexpr int ROUNDS = LANES == 16 ? 4 : LANES == 8 ? 3 : 2;
#pragma GCC unroll 4
    for (int round = 0; round < ROUNDS; round++) {
        Lanes shuffled[LANES];
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            shuffled[2 * i] = interleave_low(rows[i], rows[i + LANES / 2]);
            shuffled[2 * i + 1] = interleave_high(rows[i], rows[i + LANES / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) rows[i] = shuffled[i];
    }
}

// LANES steps of a row.
inline Lanes load_steps(const float* p) {
    Lanes lanes;
    std::memcpy(&lanes, p, sizeof lanes);
    return lanes;
}
inline Lanes load_steps(const bf16* p) {
#if defined(__AVX512BF16__)
    Lanes lanes;
    std::memcpy(&lanes, p, sizeof lanes);
    return lanes;
#else
    return (Lanes)Chunk<bf16>::load(p);
#endif
}

// Packs `depth` columns of rows [0, count) into panel[step][row], zero-padded: B is the transpose
// of those rows. `row(n)` is the address of row n.
template <class Element, class Row>
inline void pack_transposed(Row row, int64_t depth, int64_t count,
                            typename Step<Element>::Value* panel) {
    constexpr int64_t Width = LANES * Step<Element>::SIZE;
    int64_t steps = blocks(depth, Step<Element>::SIZE);
    for (int64_t n = 0; n < PANEL; n += LANES)
        for (int64_t k = 0, step = 0; k < depth; k += Width, step += LANES) {
            Lanes block[LANES] = {};
            int64_t width = least(Width, depth - k);
            for (int64_t i = 0; i < least(LANES, count - n); i++) {
                const Element* from = row(n + i) + k;
                if (width == Width) {
                    block[i] = load_steps(from);
                } else {
                    Element padded[Width] = {};
                    std::memcpy(padded, from, width * sizeof(Element));
                    block[i] = load_steps(padded);
                }
            }
            transpose(block);
            for (int64_t i = 0; i < least(LANES, steps - step); i++)
                std::memcpy(panel + (step + i) * PANEL + n, &block[i], sizeof block[i]);
        }
}

}  // namespace ISA
