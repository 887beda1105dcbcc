// XXH3 of 64 bits with seed 0, for more than 240 bytes in several pieces. The definition is public:
// https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace xxh3 {

constexpr int64_t SHORTEST = 241;
constexpr int64_t STRIPE = 64, STRIPES_OF_BLOCK = 16;
constexpr uint64_t P32_1 = 0x9E3779B1, P32_2 = 0x85EBCA77, P32_3 = 0xC2B2AE3D;
constexpr uint64_t P64_1 = 0x9E3779B185EBCA87, P64_2 = 0xC2B2AE3D27D4EB4F,
                   P64_3 = 0x165667B19E3779F9, P64_4 = 0x85EBCA77C2B2AE63,
                   P64_5 = 0x27D4EB2F165667C5;

alignas(64) constexpr unsigned char SECRET[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

inline uint64_t read64(const unsigned char* at) {
    uint64_t value;
    std::memcpy(&value, at, 8);
    return value;  // the machines that moeyard runs on are little-endian
}

inline void add_portable(uint64_t* sums, const unsigned char* stripe, const unsigned char* secret) {
    for (int i = 0; i < 8; i++) {
        uint64_t value = read64(stripe + 8 * i), key = value ^ read64(secret + 8 * i);
        sums[i ^ 1] += value;
        sums[i] += (key & 0xFFFFFFFF) * (key >> 32);
    }
}

inline void scramble(uint64_t* sums) {
    for (int i = 0; i < 8; i++) {
        uint64_t sum = sums[i];
        sums[i] = (sum ^ (sum >> 47) ^ read64(SECRET + 192 - STRIPE + 8 * i)) * P32_1;
    }
}

// Adds stripes of which the first is number `number`, and scrambles after each block.
inline void run_portable(uint64_t* sums, const unsigned char* at, int64_t number, int64_t count) {
    for (int64_t end = number + count; number < end; number++, at += STRIPE) {
        add_portable(sums, at, SECRET + 8 * (number % STRIPES_OF_BLOCK));
        if (number % STRIPES_OF_BLOCK == STRIPES_OF_BLOCK - 1) scramble(sums);
    }
}

#if defined(__x86_64__)
// How far ahead bytes are prefetched: what the disk has brought lies in memory, not in the cache.
constexpr int64_t AHEAD = 4096;

__attribute__((target("avx2"))) inline __m256i scrambled(__m256i sums, const unsigned char* secret) {
    __m256i mask = _mm256_loadu_si256((const __m256i*)secret), prime = _mm256_set1_epi32(P32_1);
    __m256i key = _mm256_xor_si256(_mm256_xor_si256(sums, _mm256_srli_epi64(sums, 47)), mask);
    __m256i low = _mm256_mul_epu32(key, prime);
    __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(key, 32), prime);
    return _mm256_add_epi64(low, _mm256_slli_epi64(high, 32));
}

__attribute__((target("avx2"))) inline void run_avx2(uint64_t* sums, const unsigned char* at,
                                                     int64_t number, int64_t count) {
    __m256i both[2] = {_mm256_loadu_si256((const __m256i*)sums),
                       _mm256_loadu_si256((const __m256i*)(sums + 4))};
    for (int64_t end = number + count; number < end; number++, at += STRIPE) {
        _mm_prefetch((const char*)at + AHEAD, _MM_HINT_T0);
        const unsigned char* secret = SECRET + 8 * (number % STRIPES_OF_BLOCK);
        for (int half = 0; half < 2; half++) {
            __m256i value = _mm256_loadu_si256((const __m256i*)(at + 32 * half));
            __m256i mask = _mm256_loadu_si256((const __m256i*)(secret + 32 * half));
            __m256i key = _mm256_xor_si256(value, mask);
            __m256i product = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
            __m256i swapped = _mm256_shuffle_epi32(value, _MM_SHUFFLE(1, 0, 3, 2));
            both[half] = _mm256_add_epi64(both[half], _mm256_add_epi64(product, swapped));
        }
        if (number % STRIPES_OF_BLOCK == STRIPES_OF_BLOCK - 1)
            for (int half = 0; half < 2; half++)
                both[half] = scrambled(both[half], SECRET + 192 - STRIPE + 32 * half);
    }
    _mm256_storeu_si256((__m256i*)sums, both[0]);
    _mm256_storeu_si256((__m256i*)(sums + 4), both[1]);
}
#endif

inline void run(uint64_t* sums, const unsigned char* at, int64_t number, int64_t count) {
#if defined(__x86_64__)
    static const bool has_avx2 = (__builtin_cpu_init(), __builtin_cpu_supports("avx2"));
    if (has_avx2) return run_avx2(sums, at, number, count);
#endif
    run_portable(sums, at, number, count);
}

inline uint64_t fold(uint64_t a, uint64_t b) {
    unsigned __int128 product = (unsigned __int128)a * b;
    return uint64_t(product) ^ uint64_t(product >> 64);
}

// Copies the last 64 bytes of all pieces.
inline void copy_tail(const iovec* pieces, int64_t count, unsigned char* tail) {
    for (int64_t missing = STRIPE, n = count - 1; missing > 0; n--) {
        int64_t length = pieces[n].iov_len, taken = length < missing ? length : missing;
        missing -= taken;
        std::memcpy(tail + missing, (const unsigned char*)pieces[n].iov_base + length - taken,
                    taken);
    }
}

// Returns the hash of pieces that follow each other, `total` bytes in all, at least SHORTEST.
inline uint64_t hash(const iovec* pieces, int64_t count, int64_t total) {
    uint64_t sums[8] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};
    const int64_t stripes = (total - 1) / STRIPE;  // the last one stands apart
    unsigned char carried[STRIPE], tail[STRIPE];
    int64_t held = 0, number = 0;
    for (int64_t n = 0; n < count; n++) {
        const unsigned char* at = (const unsigned char*)pieces[n].iov_base;
        int64_t left = pieces[n].iov_len;
        if (held) {
            int64_t taken = left < STRIPE - held ? left : STRIPE - held;
            std::memcpy(carried + held, at, taken);
            held += taken, at += taken, left -= taken;
            if (held < STRIPE || number == stripes) continue;
            run(sums, carried, number++, 1);
            held = 0;
        }
        int64_t whole = left / STRIPE < stripes - number ? left / STRIPE : stripes - number;
        run(sums, at, number, whole);
        number += whole, at += whole * STRIPE, left -= whole * STRIPE;
        if (left && number < stripes) std::memcpy(carried, at, held = left);
    }
    copy_tail(pieces, count, tail);
    add_portable(sums, tail, SECRET + 192 - STRIPE - 7);
    uint64_t result = uint64_t(total) * P64_1;
    for (int i = 0; i < 4; i++)
        result += fold(sums[2 * i] ^ read64(SECRET + 11 + 16 * i),
                       sums[2 * i + 1] ^ read64(SECRET + 19 + 16 * i));
    result = (result ^ (result >> 37)) * 0x165667919E3779F9;
    return result ^ (result >> 32);
}

}  // namespace xxh3
