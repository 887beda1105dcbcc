// Weights of 8 or 4 bits, and rows rounded to integers that are multiplied with them.
#pragma once

#include <cmath>
#include <limits>
#include <memory>
#include <new>

#include "arguments.h"
#include "int_vectors.h"
#include "products.h"

namespace ISA {

// The most inputs that share a scale of x: sums of that many 16 x 8 bit products fit 32 bits.
constexpr int64_t STEP = 512;
// The largest number whose high and low byte are both signed.
constexpr float LARGEST = 127 * 256;

// The inputs of a row that share a scale: at most STEP inputs of one group, or the groups of one
// chunk if several groups fit in it.
struct ScaleStep {
    int64_t start, size, group;  // inputs [start, start + size); the first group
};

// One matrix of quantized weights of all slots, [outputs, width] each.
struct IntMatrix {
    IntMatrix(const QuantizedMatrix& from, int64_t width)
        : values(static_cast<const uint8_t*>(from.values)),
          scales(static_cast<const bf16*>(from.scales)), bits(from.bits), width(width),
          group(from.group), stride(from.stride), scale_stride(from.scale_stride),
          groups(width / group), chunk(bits == 8 ? CHUNK<8> : CHUNK<4>),
          groups_per_step(group < chunk && chunk % group == 0 ? chunk / group : 1) {
        int64_t span = groups_per_step > 1 ? chunk : group;
        chunks_per_step = blocks(least(span, STEP), chunk);
        steps.reset(new ScaleStep[blocks(width, span) * blocks(span, STEP)]);
        for (int64_t start = 0; start < width; start += span)
            for (int64_t at = start, end = least(start + span, width); at < end; at += STEP)
                steps[num_steps++] = {at, least(STEP, end - at), start / group};
    }

    const uint8_t* values;
    const bf16* scales;
    int64_t bits, width, group;
    int64_t stride, scale_stride;  // from one slot to the next
    int64_t groups, chunk;
    int64_t groups_per_step, chunks_per_step, num_steps = 0;
    std::unique_ptr<ScaleStep[]> steps;
};

// Rounds to integers of LARGEST at most and returns the scale. If a value is not finite, the scale
// is not either, and 0 times it is NaN.
template <class Element>
inline float round_values(const Element* x, int64_t size, int16_t* values) {
    uint32_t bits, largest_bits = 0;  // as integers, magnitudes have the same order
    for (int64_t i = 0; i < size; i++) {
        float magnitude = std::fabs(widen(x[i]));
        std::memcpy(&bits, &magnitude, sizeof bits);
        largest_bits = bits > largest_bits ? bits : largest_bits;
    }
    float largest;
    std::memcpy(&largest, &largest_bits, sizeof largest);
    float inverse = LARGEST / largest;
    bool is_usual = largest <= std::numeric_limits<float>::max() &&
                    inverse <= std::numeric_limits<float>::max();  // no zero or subnormal
    for (int64_t i = 0; i < size; i++)
        values[i] = is_usual ? int16_t(std::lrintf(widen(x[i]) * inverse)) : 0;
    return largest / LARGEST;
}

struct DeleteAligned {
    void operator()(char* p) const { ::operator delete[](p, std::align_val_t(64)); }
};

// Rows rounded to integers for one matrix. Each row is: values, every step in whole chunks; scales;
// and the starting sums of each step, which correct for weights stored without a sign.
class IntRows {
public:
    IntRows(int64_t rows, const IntMatrix& matrix)
        : matrix_(matrix),
          scales_at_(matrix.num_steps * matrix.chunks_per_step * matrix.chunk * sizeof(int16_t)),
          sums_at_(scales_at_ + blocks(matrix.num_steps, 16) * 64) {
        row_bytes_ = blocks(sums_at_ + matrix.num_steps * SUM_LANES * sizeof(int32_t), 64) * 64;
        bytes_.reset(new (std::align_val_t(64)) char[rows * row_bytes_]);
    }

    const char* row(int64_t index) const { return bytes_.get() + index * row_bytes_; }
    static const int16_t* values(const char* row) { return (const int16_t*)row; }
    const float* scales(const char* row) const { return (const float*)(row + scales_at_); }
    const int32_t* sums(const char* row) const { return (const int32_t*)(row + sums_at_); }

    template <class Element> void round(int64_t index, const Element* x) {
        matrix_.bits == 8 ? round_for<8>(index, x) : round_for<4>(index, x);
    }

private:
    template <int Bits, class Element> void round_for(int64_t index, const Element* x) {
        char* row = bytes_.get() + index * row_bytes_;
        int16_t* values = (int16_t*)row;
        float* scales = (float*)(row + scales_at_);
        int32_t* sums = (int32_t*)(row + sums_at_);
        int64_t room = matrix_.chunks_per_step * CHUNK<Bits>;
        for (int64_t i = 0; i < matrix_.num_steps; i++, values += room, sums += SUM_LANES) {
            auto [start, size, group] = matrix_.steps[i];
            scales[i] = round_values(x + start, size, values);
            std::memset(values + size, 0, (room - size) * sizeof(int16_t));
            begin_sums<Bits>(values, room, sums);
            for (int64_t at = 0; at < room; at += CHUNK<Bits>) arrange<Bits>(values + at);
        }
    }

    // Every lane starts with -zero times the inputs that it will be multiplied with.
    template <int Bits>
    static void begin_sums(const int16_t* values, int64_t count, int32_t* sums) {
        constexpr int64_t IN_LANE = CHUNK<Bits> / SUM_LANES;
        std::memset(sums, 0, SUM_LANES * sizeof(int32_t));
        if (WEIGHT_ZERO<Bits> == 0) return;
        for (int64_t at = 0; at < count; at += CHUNK<Bits>)
            for (int64_t lane = 0; lane < SUM_LANES; lane++)
                for (int64_t i = 0; i < IN_LANE; i++)
                    sums[lane] -= WEIGHT_ZERO<Bits> * values[at + lane * IN_LANE + i];
    }

    const IntMatrix& matrix_;
    int64_t scales_at_, sums_at_, row_bytes_;
    std::unique_ptr<char[], DeleteAligned> bytes_;
};

}  // namespace ISA
