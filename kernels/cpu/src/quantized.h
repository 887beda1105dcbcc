// Rows times weights of 8 or 4 bits: the rows are rounded to integers of LARGEST at most, in steps
// of at most STEP inputs that share a scale, and multiplied exactly. The rounding error is 2^-16 of
// a step's largest value. As in products.h, a row's result never depends on the other rows.
#pragma once

#include <type_traits>
#include <utility>

#include "int_rows.h"

#define ALWAYS_INLINE __attribute__((always_inline))

namespace ISA {

// Calls body(0), body(1), ... body(Count - 1) with constants: unrolled, so that arrays they
// index can stay in registers.
template <int Count, class Body> ALWAYS_INLINE inline void each(Body body) {
    [&]<int... Index>(std::integer_sequence<int, Index...>) ALWAYS_INLINE {
        (body(std::integral_constant<int, Index>{}), ...);
    }(std::make_integer_sequence<int, Count>{});
}

// sums[m][n] += the products of one chunk. load(p) brings the weights at p.
template <int Bits, int Rows, int Side, class Load>
ALWAYS_INLINE inline void add_chunk(const int16_t* const* x, const uint8_t* const* w, int64_t at,
                                    IntSum (&sums)[Rows][Side], Load load) {
    // One output at a time means that weights come from memory. There are so many instructions
    // a byte that the processor does not prefetch far enough ahead by itself.
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
// time, because each product waits for the previous one of its sum.
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

// The products of `Rows` rows with `Side` outputs. A chunk holds inputs of `Groups` groups.
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
