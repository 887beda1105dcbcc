// The gated expert MLP with 2:4 weights in bf16 (two_of_four.py), without gradients. Weights are
// spread to plain ones in registers, or in the first-level cache for many rows, and multiplied in
// the order of products.h: results are those of the plain weights, bit for bit.
#pragma once

#include <array>

#include "experts.h"

namespace ISA {

// By a byte of places: the bytes of 8 plain weights from those of 4 stored ones, 0x80 for a zero.
constexpr auto make_spreads() {
    std::array<std::array<uint8_t, 16>, 256> found{};
    for (int places = 0; places < 256; places++)
        for (int i = 0; i < 16; i++) found[places][i] = 0x80;
    for (int places = 0; places < 256; places++)
        for (int stored = 0; stored < 4; stored++) {
            int at = stored / 2 * 4 + (places >> 2 * stored & 3);
            found[places][2 * at] = uint8_t(2 * stored);
            found[places][2 * at + 1] = uint8_t(2 * stored + 1);
        }
    return found;
}
alignas(64) constexpr auto SPREADS = make_spreads();

// A row of such weights.
struct SparseRow {
    const bf16* values;
    const uint8_t* places;
};

// Eight plain weights, from four stored ones.
#if defined(__AVX2__)
inline __m128i spread8(const bf16* values, uint8_t places) {
    return _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i*)values),
                            _mm_load_si128((const __m128i*)SPREADS[places].data()));
}
inline void spread8(const bf16* values, uint8_t places, bf16* out) {
    _mm_storeu_si128((__m128i*)out, spread8(values, places));
}
#else
inline void spread8(const bf16* values, uint8_t places, bf16* out) {
    for (int i = 0; i < 8; i++) out[i] = {};
    for (int i = 0; i < 4; i++) out[i / 2 * 4 + (places >> 2 * i & 3)] = values[i];
}
#endif

// The plain weights of a row.
inline void spread_row(const SparseRow& row, int64_t width, bf16* out) {
    for (int64_t at = 0; at < width; at += 8)
        spread8(row.values + at / 2, row.places[at / 8], out + at);
}
inline void spread_row(const SparseRow& row, int64_t width, float* out) {
    for (int64_t at = 0; at < width; at += 8) {
        bf16 narrow[8];
        spread8(row.values + at / 2, row.places[at / 8], narrow);
        for (int i = 0; i < 8; i++) out[at + i] = widen(narrow[i]);
    }
}

// What C::load returns for the plain weights [at, at + C::SIZE) of a row.
inline typename Chunk<bf16>::Value spread_chunk(const SparseRow& row, int64_t at) {
    using C = Chunk<bf16>;
    const bf16* values = row.values + at / 2;
    const uint8_t* places = row.places + at / 8;
#if defined(__AVX512BF16__)
    auto lane = [&](int i) {
        return _mm_load_si128((const __m128i*)SPREADS[places[i]].data());
    };
    __m512i stored = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)values));
    __m512i twice = _mm512_permutexvar_epi64(_mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0), stored);
    __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(lane(0)), lane(1), 1);
    __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(lane(2)), lane(3), 1);
    __m512i bytes = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    return (C::Value)_mm512_shuffle_epi8(twice, bytes);
#elif defined(__AVX512F__)
    __m256i low = _mm256_castsi128_si256(spread8(values, places[0]));
    return C::widen_all(_mm256_inserti128_si256(low, spread8(values + 4, places[1]), 1));
#elif defined(__AVX2__)
    __m256i wide = _mm256_cvtepu16_epi32(spread8(values, places[0]));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
#else  // half a byte of places is a chunk
    bf16 plain[4] = {};
    int quad = places[0] >> (at % 8) & 15;
    plain[quad & 3] = values[0];
    plain[quad >> 2] = values[1];
    return C::load(plain);
#endif
}

// As tile() of products.h, streamed, for whole chunks.
template <int Rows>
inline void sparse_tile(const bf16* const* x, const SparseRow* w, int64_t width, float (*out)[4]) {
    using C = Chunk<bf16>;
    Sum sums[Rows][4];
    for (int n = 0; n < 4; n++) {
        Sum part[Rows];
#pragma GCC unroll 8
        for (int m = 0; m < Rows; m++) part[m] = no_sum();
        for (int64_t at = 0; at < width; at += C::SIZE) {
            // As in quantized.h: the processor does not prefetch far enough ahead by itself.
            __builtin_prefetch((const char*)(w[n].values + at / 2) + 2048, 0, 2);
            typename C::Value weights = spread_chunk(w[n], at);
#pragma GCC unroll 8
            for (int m = 0; m < Rows; m++) part[m] = C::dot(part[m], C::load(x[m] + at), weights);
        }
#pragma GCC unroll 8
        for (int m = 0; m < Rows; m++) sums[m][n] = part[m];
    }
#pragma GCC unroll 8
    for (int m = 0; m < Rows; m++) total4(sums[m], out[m]);
}

inline void sparse_tile(int64_t rows, const bf16* const* x, const SparseRow* w, int64_t width,
                        float (*out)[4]) {
    switch (rows) {
        case 1: return sparse_tile<1>(x, w, width, out);
        case 2: return sparse_tile<2>(x, w, width, out);
#if defined(__AVX512F__)
        case 3: return sparse_tile<3>(x, w, width, out);
        case 4: return sparse_tile<4>(x, w, width, out);
#endif
    }
}

// A 2:4 matrix of all slots, and rows for it by address.
template <class Element> struct SparseMatrix {
    static constexpr bool READS_SOME = false;
    const TwoOfFourMatrix& from;
    int64_t width;

    SparseRow row(int64_t slot, int64_t output) const {
        return {static_cast<const bf16*>(from.values) + slot * from.value_stride + output * width / 2,
                static_cast<const uint8_t*>(from.places) + slot * from.place_stride +
                    output * width / 8};
    }

    template <class Store>
    void multiply(const Element* const* rows, int64_t num_rows, int64_t slot, int64_t from_output,
                  int64_t to, Store store) const {
        bool streams = false;
        if constexpr (std::is_same_v<Element, bf16>)
            streams = num_rows <= STREAM_ROWS && width % Chunk<bf16>::SIZE == 0;
        std::unique_ptr<Element[]> plain(streams ? nullptr : new Element[4 * width]);
        for (int64_t n = from_output; n < to; n += 4) {
            int64_t count = least(4, to - n);
            SparseRow w[4];
            for (int64_t i = 0; i < 4; i++) w[i] = row(slot, n + least(i, count - 1));
            float out[TILE_ROWS][4];
            if constexpr (std::is_same_v<Element, bf16>) {
                if (streams) {
                    sparse_tile(num_rows, rows, w, width, out);
                    for (int64_t m = 0; m < num_rows; m++) store(m, n, out[m], count);
                    continue;
                }
            }
            const Element* dense[4];
            for (int64_t i = 0; i < 4; i++) {
                dense[i] = plain.get() + i * width;
                if (i < count) spread_row(w[i], width, plain.get() + i * width);
                else dense[i] = dense[count - 1];
            }
            for (int64_t m = 0, some; m < num_rows; m += some) {
                some = least(TILE_ROWS, num_rows - m);
                tile<From::CACHE>(some, rows + m, dense, width, out);
                for (int64_t i = 0; i < some; i++) store(m + i, n, out[i], count);
            }
        }
    }
};

// Returns the first wrong row, and runs nothing if there is one; else -1.
template <class Element> int64_t two_of_four_experts(const TwoOfFourExpertArguments& q) {
    const ExpertArguments& a = q.rest;
    int64_t wrong = first_wrong_row(a);
    if (wrong >= 0) return wrong;
    Order order(a, BLOCK_ROWS);
    const Element* x = static_cast<const Element*>(a.x);
    SparseMatrix<Element> fc1{q.fc1, a.d_model}, fc2{q.fc2, a.d_expert};
    auto row_of = [&](int64_t r) { return x + order.rows[r] / a.choices * a.d_model; };
    run_halves<Element>(a, order, fc1, fc2, row_of, [](auto&) { return Limits{}; });
    return -1;
}

}  // namespace ISA
