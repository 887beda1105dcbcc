// Vector arithmetic for one instruction set. ISA is the namespace, given by the compiler's
// command line with the flags that go with it: this file is compiled once per instruction set.
// Everything is in that namespace, so that no instruction leaks into code for other processors.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace ISA {

struct bf16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

template <class Element> Element narrow(float x);
template <> inline float narrow<float>(float x) { return x; }
template <> inline bf16 narrow<bf16>(float x) {  // round to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, quiet_nan = (bits >> 16) | 0x40;
    return {uint16_t(x != x ? quiet_nan : rounded)};
}

// Chunk<Element> is what one load returns, Sum holds partial sums of products in fp32.
template <class Element> struct Chunk;

#if defined(__AVX512F__)

using Sum = __m512;
inline Sum no_sum() { return _mm512_setzero_ps(); }

template <> struct Chunk<float> {
    using Value = __m512;
    static constexpr int64_t SIZE = 16;
    static Value load(const float* p) { return _mm512_loadu_ps(p); }
    static Value load_part(const float* p, int64_t count) {
        return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
    }
    static Sum dot(Sum sum, Value a, Value b) { return _mm512_fmadd_ps(a, b, sum); }
};

#if defined(__AVX512BF16__)
template <> struct Chunk<bf16> {
    using Value = __m512bh;
    static constexpr int64_t SIZE = 32;
    static Value load(const bf16* p) { return (Value)_mm512_loadu_si512(p); }
    static Value load_part(const bf16* p, int64_t count) {
        return (Value)_mm512_maskz_loadu_epi16(__mmask32((1ull << count) - 1), p);
    }
    static Sum dot(Sum sum, Value a, Value b) { return _mm512_dpbf16_ps(sum, a, b); }
};
#else
template <> struct Chunk<bf16> {
    using Value = __m512;
    static constexpr int64_t SIZE = 16;
    static Value widen_all(__m256i half) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    static Value load(const bf16* p) { return widen_all(_mm256_loadu_si256((const __m256i*)p)); }
    static Value load_part(const bf16* p, int64_t count) {
        return widen_all(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p));
    }
    static Sum dot(Sum sum, Value a, Value b) { return _mm512_fmadd_ps(a, b, sum); }
};
#endif

// Writes the totals of four sums side by side.
inline void total4(const Sum sums[4], float* out) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(sums[0], sums[1]),
                              _mm512_unpackhi_ps(sums[0], sums[1]));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(sums[2], sums[3]),
                              _mm512_unpackhi_ps(sums[2], sums[3]));
    __m512 abcd = _mm512_add_ps(
        _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
        _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

#elif defined(__AVX2__)

using Sum = __m256;
inline Sum no_sum() { return _mm256_setzero_ps(); }

template <> struct Chunk<float> {
    using Value = __m256;
    static constexpr int64_t SIZE = 8;
    static Value load(const float* p) { return _mm256_loadu_ps(p); }
    static Value load_part(const float* p, int64_t count) {
        float padded[8] = {};
        std::memcpy(padded, p, count * sizeof(float));
        return load(padded);
    }
    static Sum dot(Sum sum, Value a, Value b) { return _mm256_fmadd_ps(a, b, sum); }
};

template <> struct Chunk<bf16> {
    using Value = __m256;
    static constexpr int64_t SIZE = 8;
    static Value load(const bf16* p) {
        __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    static Value load_part(const bf16* p, int64_t count) {
        bf16 padded[8] = {};
        std::memcpy(padded, p, count * sizeof(bf16));
        return load(padded);
    }
    static Sum dot(Sum sum, Value a, Value b) { return _mm256_fmadd_ps(a, b, sum); }
};

inline void total4(const Sum sums[4], float* out) {
    __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]),
                                 _mm256_hadd_ps(sums[2], sums[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
}

#else  // any processor: GCC's and Clang's vectors, which become SSE2, NEON or plain code

typedef float Sum __attribute__((vector_size(16)));
inline Sum no_sum() { return Sum{0, 0, 0, 0}; }

template <class Element> struct Chunk {
    using Value = Sum;
    static constexpr int64_t SIZE = 4;
    static Value load(const Element* p) {
        return Sum{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
    }
    static Value load_part(const Element* p, int64_t count) {
        Sum value = no_sum();
        for (int64_t i = 0; i < count; i++) value[i] = widen(p[i]);
        return value;
    }
    static Sum dot(Sum sum, Value a, Value b) { return sum + a * b; }
};

inline void total4(const Sum sums[4], float* out) {
    for (int i = 0; i < 4; i++) {
        Sum s = sums[i];
        out[i] = (s[0] + s[1]) + (s[2] + s[3]);
    }
}

#endif

// The total of LANES partial sums that are `distance` apart, added in the order of total4.
inline float total_of(const float* sums, int64_t distance) {
    auto quad = [=](int64_t number) {
        const float* s = sums + number * 4 * distance;
#if defined(__AVX512F__)
        return (s[0] + s[2 * distance]) + (s[distance] + s[3 * distance]);
#else
        return (s[0] + s[distance]) + (s[2 * distance] + s[3 * distance]);
#endif
    };
#if defined(__AVX512F__)
    return (quad(0) + quad(2)) + (quad(1) + quad(3));
#elif defined(__AVX2__)
    return quad(0) + quad(1);
#else
    return quad(0);
#endif
}

// e^x to about 2 ulp, without branches, so that loops over it are vectorized: 2^n * e^r with
// |r| <= ln(2) / 2, and e^r by its Taylor polynomial.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    float n = shifted - 12582912.0f;
    float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    int32_t power = (bits + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, sizeof scale);
    return p * scale;
}

}  // namespace ISA
