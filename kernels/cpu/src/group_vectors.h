// One group of 4-bit weights times a group of a row of 16-bit integers, summed exactly in 32 bits.
// Like int_vectors.h, once per instruction set.
#pragma once

#include "int_vectors.h"

namespace ISA {

constexpr int64_t GROUP = 32;  // group_sparse.py

#if defined(__AVX512VNNI__)

// A group fills a register, so that one product does it all. The quarters of a group of a row are
// its even inputs' high bytes and low bytes, then those of its odd inputs. Lanes of high bytes count
// 256 times; that waits until the totals are complete.
struct GroupWeights {
    __m512i quarters;  // even, even, odd, odd
};
inline GroupWeights load_group(const uint8_t* p) {
    __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
    __m512i shifts = _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0);
    return {_mm512_and_si512(_mm512_srlv_epi64(bytes, shifts), _mm512_set1_epi8(15))};
}
using GroupSum = __m512i;
inline GroupSum group_dot(int32_t begin, const int16_t* x, const GroupWeights& weights) {
    __m512i start = _mm512_maskz_set1_epi32(__mmask16(1 << 4), begin);  // a lane of low bytes
    return _mm512_dpbusd_epi32(start, weights.quarters, _mm512_loadu_si512(x));
}
inline Total add_group(Total total, GroupSum sum, float scale) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(scale), total);
}
inline Total sum_of_halves(Total a, Total b) {
    __m512 high = _mm512_set1_ps(256);
    return _mm512_mul_ps(_mm512_add_ps(a, b),
                         _mm512_mask_mov_ps(_mm512_set1_ps(1), __mmask16(0x0f0f), high));
}
inline void arrange_group(int16_t* x) {
    int16_t natural[GROUP];
    std::memcpy(natural, x, sizeof natural);
    int8_t* bytes = (int8_t*)x;
    for (int64_t i = 0; i < GROUP; i++) {
        int8_t* half = bytes + i % 2 * GROUP + i / 2;
        half[0] = int8_t((natural[i] - int8_t(natural[i])) >> 8);
        half[GROUP / 2] = int8_t(natural[i]);
    }
}

#else

// A group is whole chunks of 4 bits.
constexpr int64_t GROUP_CHUNKS = GROUP / CHUNK<4>;
struct GroupWeights {
    Weights<4> chunks[GROUP_CHUNKS];
};
inline GroupWeights load_group(const uint8_t* p) {
    GroupWeights weights;
    for (int64_t i = 0; i < GROUP_CHUNKS; i++)
        weights.chunks[i] = load_weights<4>(p + i * CHUNK<4> / 2);
    return weights;
}
using GroupSum = IntSum;
inline GroupSum group_dot(int32_t begin, const int16_t* x, const GroupWeights& weights) {
    int32_t lanes[SUM_LANES] = {begin};
    IntSum sum = begin_sum(lanes);
    for (int64_t i = 0; i < GROUP_CHUNKS; i++)
        sum = dot<4>(sum, x + i * CHUNK<4>, weights.chunks[i]);
    return sum;
}
inline Total add_group(Total total, GroupSum sum, float scale) {
    return add_scaled(total, sum, scale);
}
inline Total sum_of_halves(Total a, Total b) { return a + b; }
inline void arrange_group(int16_t* x) {
    for (int64_t i = 0; i < GROUP; i += CHUNK<4>) arrange<4>(x + i);
}

#endif

}  // namespace ISA
