// Weights of 8 and 4 bits times rows of 16-bit integers, summed exactly in 32 bits. Like vectors.h,
// once per instruction set.
//
// A chunk is what one Weights holds: CHUNK inputs of one output, in one part (8 bits) or two (4
// bits). The two are the even and the odd inputs, as bytes hold inputs 2i low and 2i + 1 high. Rows
// are in whole chunks, padded with zeros, in the order that arrange() gives them.
#pragma once

#include "vectors.h"

namespace ISA {

#if defined(__AVX512VNNI__)

// Bytes times bytes: weights as w + 128 or w + 8 without a sign, rows as 256 * high + low, both
// with a sign, in two products. A chunk of a row is, for each part, its high bytes, then its low.
using Total = __m512;
inline Total no_total() { return _mm512_setzero_ps(); }
inline void totals4(const Total sums[4], float* out) { total4(sums, out); }
constexpr int64_t SUM_LANES = 16;
template <int Bits> constexpr int64_t CHUNK = 512 / Bits;
template <int Bits> constexpr int32_t WEIGHT_ZERO = Bits == 8 ? 128 : 8;
struct IntSum {
    __m512i high, low;
};
inline IntSum begin_sum(const int32_t* p) {
    return {_mm512_setzero_si512(), _mm512_loadu_si512(p)};
}
inline IntSum no_int_sum() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
inline IntSum both_sums(IntSum a, IntSum b) {
    return {_mm512_add_epi32(a.high, b.high), _mm512_add_epi32(a.low, b.low)};
}
template <int Bits> struct Weights {
    __m512i parts[8 / Bits];
};
template <int Bits> inline Weights<Bits> split_weights(__m512i bytes) {
    if constexpr (Bits == 8) return {_mm512_xor_si512(bytes, _mm512_set1_epi8(-128))};
    else {
        __m512i low = _mm512_set1_epi8(15);
        return {_mm512_and_si512(bytes, low),
                _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low)};
    }
}
template <int Bits> inline Weights<Bits> load_weights(const uint8_t* p) {
    return split_weights<Bits>(_mm512_loadu_si512(p));
}
template <int Bits> inline Weights<Bits> load_some_weights(const uint8_t* p, int64_t bytes) {
    return split_weights<Bits>(_mm512_maskz_loadu_epi8((1ull << bytes) - 1, p));
}
template <int Bits>
inline IntSum dot(IntSum sum, const int16_t* x, const Weights<Bits>& weights) {
    for (int part = 0; part < 8 / Bits; part++, x += 64) {
        __m512i high = _mm512_loadu_si512(x), low = _mm512_loadu_si512(x + 32);
        sum.high = _mm512_dpbusd_epi32(sum.high, weights.parts[part], high);
        sum.low = _mm512_dpbusd_epi32(sum.low, weights.parts[part], low);
    }
    return sum;
}
inline Total widen_sum(IntSum sum) {
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(sum.high, 8), sum.low));
}
inline Total add_scaled(Total total, IntSum sum, float scale) {
    return _mm512_fmadd_ps(widen_sum(sum), _mm512_set1_ps(scale), total);
}
inline Total add_scaled(Total total, IntSum sum, Total scales, float scale) {
    return _mm512_fmadd_ps(widen_sum(sum), _mm512_mul_ps(scales, _mm512_set1_ps(scale)), total);
}
// Neighbouring lanes hold neighbouring inputs: the scale of each lane, in a chunk of `Groups`.
template <int Groups> inline Total scales_of_lanes(const bf16* p, int64_t count) {
    int64_t bits = 0;
    if (count >= Groups) std::memcpy(&bits, p, Groups * sizeof *p);  // a constant size
    else std::memcpy(&bits, p, count * sizeof *p);
    __m128i wide = _mm_slli_epi32(_mm_cvtepu16_epi32(_mm_cvtsi64_si128(bits)), 16);
    __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i group = _mm512_srli_epi32(lane, Groups == 2 ? 3 : 2);
    return _mm512_permutexvar_ps(group, _mm512_castps128_ps512(_mm_castsi128_ps(wide)));
}
template <int Bits> inline void arrange(int16_t* x) {
    constexpr int64_t PARTS = 8 / Bits, LENGTH = 64;
    int16_t natural[CHUNK<Bits>];
    std::memcpy(natural, x, sizeof natural);
    int8_t* bytes = (int8_t*)x;
    for (int64_t part = 0; part < PARTS; part++, bytes += 2 * LENGTH)
        for (int64_t i = 0; i < LENGTH; i++) {
            int16_t value = natural[PARTS * i + part];
            bytes[i] = int8_t((value - int8_t(value)) >> 8);
            bytes[LENGTH + i] = int8_t(value);
        }
}

#elif defined(__AVX2__)

using Total = __m256;
inline Total no_total() { return _mm256_setzero_ps(); }
inline void totals4(const Total sums[4], float* out) {
    __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]),
                                 _mm256_hadd_ps(sums[2], sums[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
}
constexpr int64_t SUM_LANES = 8;
template <int Bits> constexpr int64_t CHUNK = 128 / Bits;
template <int Bits> constexpr int32_t WEIGHT_ZERO = Bits == 8 ? 0 : 8;
using IntSum = __m256i;
inline __m256i load32(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline IntSum begin_sum(const int32_t* p) { return load32(p); }
inline IntSum no_int_sum() { return _mm256_setzero_si256(); }
inline IntSum both_sums(IntSum a, IntSum b) { return _mm256_add_epi32(a, b); }
template <int Bits> struct Weights {
    __m256i parts[8 / Bits];
};
template <int Bits> inline Weights<Bits> load_weights(const uint8_t* p) {
    __m128i bytes = _mm_loadu_si128((const __m128i*)p);
    if constexpr (Bits == 8) return {_mm256_cvtepi8_epi16(bytes)};
    else {
        __m256i wide = _mm256_cvtepu8_epi16(bytes);
        return {_mm256_and_si256(wide, _mm256_set1_epi16(15)), _mm256_srli_epi16(wide, 4)};
    }
}
template <int Bits>
inline IntSum dot(IntSum sum, const int16_t* x, const Weights<Bits>& weights) {
    for (int part = 0; part < 8 / Bits; part++)
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(weights.parts[part], load32(x + 16 * part)));
    return sum;
}
inline Total add_scaled(Total total, IntSum sum, float scale) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(scale), total);
}

#else  // any processor: one product per lane

using Total = Sum;
inline Total no_total() { return no_sum(); }
inline void totals4(const Total sums[4], float* out) { total4(sums, out); }
constexpr int64_t SUM_LANES = 4;
template <int Bits> constexpr int64_t CHUNK = 32 / Bits;
template <int Bits> constexpr int32_t WEIGHT_ZERO = Bits == 8 ? 0 : 8;
typedef int32_t IntSum __attribute__((vector_size(16)));
template <class Integer> inline IntSum load_all(const Integer* p) {
    return IntSum{p[0], p[1], p[2], p[3]};
}
inline IntSum begin_sum(const int32_t* p) { return load_all(p); }
inline IntSum no_int_sum() { return IntSum{0, 0, 0, 0}; }
inline IntSum both_sums(IntSum a, IntSum b) { return a + b; }
template <int Bits> struct Weights {
    IntSum parts[8 / Bits];
};
template <int Bits> inline Weights<Bits> load_weights(const uint8_t* p) {
    if constexpr (Bits == 8) return {load_all((const int8_t*)p)};
    else return {load_all(p) & 15, load_all(p) >> 4};
}
template <int Bits>
inline IntSum dot(IntSum sum, const int16_t* x, const Weights<Bits>& weights) {
    for (int part = 0; part < 8 / Bits; part++)
        sum += weights.parts[part] * load_all(x + 4 * part);
    return sum;
}
inline Total add_scaled(Total total, IntSum sum, float scale) {
    return total + Sum{float(sum[0]), float(sum[1]), float(sum[2]), float(sum[3])} * scale;
}

#endif

#if !defined(__AVX512VNNI__)
// Chunks divide WIDTH_UNIT of quantized_weights.py, so no step ends with a partial chunk.
template <int Bits> inline Weights<Bits> load_some_weights(const uint8_t* p, int64_t) {
    return load_weights<Bits>(p);
}
template <int Bits> inline void arrange(int16_t* x) {
    if constexpr (Bits == 4) {
        int16_t natural[CHUNK<Bits>];
        std::memcpy(natural, x, sizeof natural);
        for (int64_t i = 0; i < CHUNK<Bits>; i++) x[i % 2 * (CHUNK<Bits> / 2) + i / 2] = natural[i];
    }
}
#endif

}  // namespace ISA
