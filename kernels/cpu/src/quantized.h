// Rows times weights of 8 or 4 bits: the rows are rounded to integers of LARGEST at most, step by
// step of at most STEP inputs with a scale of its own, and multiplied exactly. What rounding loses
// is 2^-16 of a step's largest value. As in products.h, a row's result never depends on the rows beside it.
#pragma once

#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "arguments.h"
#include "int_vectors.h"
#include "products.h"

#define ALWAYS_INLINE __attribute__((always_inline))

namespace ISA {

// Inputs that share a scale of x at most. Sums of so many products of 16 and 8 bits fit 32.
constexpr int64_t STEP = 512;
// Bytes of weights between what is computed and what is fetched. With AVX512-VNNI at 35 GB/s of
// memory: 4 bits go from 20 GB/s to 29, for 4096 to 32768 alike; 8 bits are as fast as memory anyway.
constexpr int64_t AHEAD = 4096;
// The largest number with a high and a low byte that both have a sign.
constexpr float LARGEST = 127 * 256;

// What a row has one scale for: at most STEP inputs of one group, or, where several groups fit in a
// chunk, the groups of one chunk.
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

// Rows rounded to integers for one matrix. Each row is: values, every step in whole chunks; scales;
// and what the sums of each step begin with, which makes up for weights being stored without a sign.
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
            scales[i] = round_step(x + start, size, values);
            std::memset(values + size, 0, (room - size) * sizeof(int16_t));
            begin_sums<Bits>(values, room, sums);
            for (int64_t at = 0; at < room; at += CHUNK<Bits>) arrange<Bits>(values + at);
        }
    }

    // Returns the scale. Where a value is not finite it is not either, and 0 times it is NaN.
    template <class Element>
    static float round_step(const Element* x, int64_t size, int16_t* values) {
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
                        inverse <= std::numeric_limits<float>::max();  // not zeros nor subnormals
        for (int64_t i = 0; i < size; i++)
            values[i] = is_usual ? int16_t(std::lrintf(widen(x[i]) * inverse)) : 0;
        return largest / LARGEST;
    }

    // Every lane begins with -zero times the inputs that it will meet.
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

    struct Delete {
        void operator()(char* p) const { ::operator delete[](p, std::align_val_t(64)); }
    };

    const IntMatrix& matrix_;
    int64_t scales_at_, sums_at_, row_bytes_;
    std::unique_ptr<char[], Delete> bytes_;
};

// Calls body(0), body(1), ... body(Count - 1) with constants: written out, so that arrays they index
// can live in registers.
template <int Count, class Body> ALWAYS_INLINE inline void each(Body body) {
    [&]<int... Index>(std::integer_sequence<int, Index...>) ALWAYS_INLINE {
        (body(std::integral_constant<int, Index>{}), ...);
    }(std::make_integer_sequence<int, Count>{});
}

// sums[m][n] += the products of one chunk. load(p) brings the weights at p.
template <int Bits, int Rows, int Side, class Load>
ALWAYS_INLINE inline void add_chunk(const int16_t* const* x, const uint8_t* const* w, int64_t at,
                                    IntSum (&sums)[Rows][Side], Load load) {
    // One output at a time means weights that come from memory. Arithmetic takes so many
    // instructions a byte that the processor does not look far enough ahead by itself.
    if constexpr (Side == 1) __builtin_prefetch(w[0] + at * Bits / 8 + AHEAD, 0, 2);
    Weights<Bits> weights[Side];
    each<Side>([&](auto n) ALWAYS_INLINE { weights[n] = load(w[n] + at * Bits / 8); });
    each<Rows>([&](auto m) ALWAYS_INLINE {
        each<Side>([&](auto n) ALWAYS_INLINE {
            sums[m][n] = dot<Bits>(sums[m][n], x[m] + at, weights[n]);
        });
    });
}

// sums[m][n] += the products of one step of `size` inputs. A tile of few sums takes two chunks at a
// time, as each product waits for the one before it in its sum.
template <int Bits, int Rows, int Side>
ALWAYS_INLINE inline void add_step(const int16_t* const* x, const uint8_t* const* w, int64_t size,
                                   IntSum (&sums)[Rows][Side]) {
    auto load = [](const uint8_t* p) ALWAYS_INLINE { return load_weights<Bits>(p); };
    constexpr int64_t WHOLE = CHUNK<Bits>;
    int64_t at = 0;
    if constexpr (Rows * Side <= 2) {
        IntSum others[Rows][Side];
        each<Rows>([&](auto m) ALWAYS_INLINE {
            each<Side>([&](auto n) ALWAYS_INLINE { others[m][n] = no_int_sum(); });
        });
        for (; at + 2 * WHOLE <= size; at += 2 * WHOLE) {
            add_chunk<Bits>(x, w, at, sums, load);
            add_chunk<Bits>(x, w, at + WHOLE, others, load);
        }
        each<Rows>([&](auto m) ALWAYS_INLINE {
            each<Side>([&](auto n) ALWAYS_INLINE {
                sums[m][n] = both_sums(sums[m][n], others[m][n]);
            });
        });
    }
    for (; at + WHOLE <= size; at += WHOLE) add_chunk<Bits>(x, w, at, sums, load);
    if (at < size)
        add_chunk<Bits>(x, w, at, sums, [&](const uint8_t* p) ALWAYS_INLINE {
            return load_some_weights<Bits>(p, (size - at) * Bits / 8);
        });
}

// The scales of x times those of the weights, for steps [first, first + count) of one group each.
inline void set_factors(const IntMatrix& matrix, const float* x, const bf16* weights, int64_t first,
                        int64_t count, float* factors) {
    if (matrix.num_steps == matrix.groups)
        for (int64_t i = 0; i < count; i++) factors[i] = x[first + i] * widen(weights[first + i]);
    else
        for (int64_t i = 0; i < count; i++)
            factors[i] = x[first + i] * widen(weights[matrix.steps[first + i].group]);
}

// The products of `Rows` rows with `Side` outputs' weights. A chunk holds inputs of `Groups` groups.
template <int Bits, int Groups, int Rows, int Side> struct IntTile {
    const IntMatrix& matrix;
    const IntRows& all;
    const char* const* rows;
    const uint8_t* const* weights;
    const bf16* const* scales;

    // The sums of one step. `add` is add_step or, where a step is a whole chunk, add_chunk.
    template <class Add>
    ALWAYS_INLINE inline void sum_up(int64_t step, IntSum (&sums)[Rows][Side], Add add) const {
        const int16_t* x[Rows];
        const uint8_t* w[Side];
        int64_t room = matrix.chunks_per_step * CHUNK<Bits>, start = matrix.steps[step].start;
        each<Side>([&](auto n) ALWAYS_INLINE { w[n] = weights[n] + start * Bits / 8; });
        each<Rows>([&](auto m) ALWAYS_INLINE {
            x[m] = IntRows::values(rows[m]) + step * room;
            IntSum begin = begin_sum(all.sums(rows[m]) + step * SUM_LANES);
            each<Side>([&](auto n) ALWAYS_INLINE { sums[m][n] = begin; });
        });
        add(x, w, sums);
    }

    void run(Total (&total)[Rows][Side]) const {
        each<Rows>([&](auto m) ALWAYS_INLINE {
            each<Side>([&](auto n) ALWAYS_INLINE { total[m][n] = no_total(); });
        });
        if constexpr (Groups == 1) run_steps(total);
        else run_chunks(total);
    }

    void run_steps(Total (&total)[Rows][Side]) const {
        constexpr int64_t SPAN = 64;  // steps whose factors are computed together
        for (int64_t first = 0; first < matrix.num_steps; first += SPAN) {
            int64_t count = least(SPAN, matrix.num_steps - first);
            float factors[Rows][Side][SPAN];
            for (int m = 0; m < Rows; m++)
                for (int n = 0; n < Side; n++)
                    set_factors(matrix, all.scales(rows[m]), scales[n], first, count,
                                factors[m][n]);
            for (int64_t i = 0; i < count; i++) {
                IntSum sums[Rows][Side];
                int64_t size = matrix.steps[first + i].size;
                sum_up(first + i, sums, [&](auto& x, auto& w, auto& to) ALWAYS_INLINE {
                    add_step<Bits>(x, w, size, to);
                });
                each<Rows>([&](auto m) ALWAYS_INLINE {
                    each<Side>([&](auto n) ALWAYS_INLINE {
                        total[m][n] = add_scaled(total[m][n], sums[m][n], factors[m][n][i]);
                    });
                });
            }
        }
    }

    void run_chunks(Total (&total)[Rows][Side]) const {
        int64_t whole = matrix.width / CHUNK<Bits>;
        for (int64_t i = 0; i < whole; i++)
            add_groups(i, Groups, total, [](auto& x, auto& w, auto& to) ALWAYS_INLINE {
                auto load = [](const uint8_t* p) ALWAYS_INLINE { return load_weights<Bits>(p); };
                add_chunk<Bits>(x, w, 0, to, load);
            });
        if (whole == matrix.num_steps) return;
        int64_t size = matrix.steps[whole].size, groups = matrix.groups - whole * Groups;
        add_groups(whole, groups, total, [&](auto& x, auto& w, auto& to) ALWAYS_INLINE {
            add_step<Bits>(x, w, size, to);
        });
    }

    template <class Add>
    ALWAYS_INLINE inline void add_groups(int64_t step, int64_t groups, Total (&total)[Rows][Side],
                                         Add add) const {
        IntSum sums[Rows][Side];
        sum_up(step, sums, add);
        each<Side>([&](auto n) ALWAYS_INLINE {
            Total scales_of_w = scales_of_lanes<Groups>(scales[n] + step * Groups, groups);
            each<Rows>([&](auto m) ALWAYS_INLINE {
                float scale_of_x = all.scales(rows[m])[step];
                total[m][n] = add_scaled(total[m][n], sums[m][n], scales_of_w, scale_of_x);
            });
        });
    }
};

// Four outputs, streamed or side by side as in products.h.
template <int Bits, int Groups, int Rows, bool Streamed>
inline void int_tile4(const IntMatrix& matrix, const IntRows& all, const char* const* rows,
                      const uint8_t* const* weights, const bf16* const* scales, float (*out)[4]) {
    constexpr int Side = Streamed ? 1 : Rows <= 2 ? 4 : 2;
    Total sums[Rows][4];
    for (int first = 0; first < 4; first += Side) {
        Total part[Rows][Side];
        const IntTile<Bits, Groups, Rows, Side> tile{matrix, all, rows, weights + first,
                                                     scales + first};
        tile.run(part);
        for (int m = 0; m < Rows; m++)
            for (int n = 0; n < Side; n++) sums[m][first + n] = part[m][n];
    }
    for (int m = 0; m < Rows; m++) totals4(sums[m], out[m]);
}

// As products() of products.h, for rows of `all`.
template <int Bits, int Groups, class Store>
inline void int_products(const IntMatrix& matrix, int64_t slot, const IntRows& all,
                         const char* const* rows, int64_t num_rows, int64_t from, int64_t to,
                         Store store) {
    constexpr int64_t TILE = 4;
    const uint8_t* values = matrix.values + slot * matrix.stride;
    const bf16* scales = matrix.scales + slot * matrix.scale_stride;
    for (int64_t m = 0, some; m < num_rows; m += some) {
        some = least(TILE, num_rows - m);
        for (int64_t n = from; n < to; n += 4) {
            int64_t count = least(4, to - n);
            const uint8_t* w[4];
            const bf16* s[4];
            for (int64_t i = 0; i < 4; i++) {
                int64_t output = n + least(i, count - 1);
                w[i] = values + output * (matrix.width * Bits / 8);
                s[i] = scales + output * matrix.groups;
            }
            float out[TILE][4];
            auto tile = [&]<int Rows>(std::integral_constant<int, Rows>) {
                if (m == 0) int_tile4<Bits, Groups, Rows, true>(matrix, all, rows, w, s, out);
                else int_tile4<Bits, Groups, Rows, false>(matrix, all, rows + m, w, s, out);
            };
            switch (some) {
                case 1: tile(std::integral_constant<int, 1>{}); break;
                case 2: tile(std::integral_constant<int, 2>{}); break;
                case 3: tile(std::integral_constant<int, 3>{}); break;
                case 4: tile(std::integral_constant<int, 4>{}); break;
            }
            for (int64_t i = 0; i < some; i++) store(m + i, n, out[i], count);
        }
    }
}

}  // namespace ISA
