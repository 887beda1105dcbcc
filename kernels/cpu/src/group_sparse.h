// Rows times group-sparse weights of 4 bits. As in quantized.h, rows are rounded to integers of
// LARGEST at most and multiplied exactly within a group, but here one scale serves a whole row:
// outputs keep different groups, so steps with scales would differ from output to output. The error
// has a norm below that of rounding to bf16 for rows of up to 16,000 inputs. A row's result never
// depends on the other rows.
#pragma once

#include "group_vectors.h"
#include "quantized.h"

namespace ISA {

// One group-sparse matrix of all slots, [outputs, width] each.
struct GroupSparse {
    GroupSparse(const GroupSparseMatrix& from, int64_t width)
        : values(static_cast<const uint8_t*>(from.values)), columns(from.columns),
          scales(static_cast<const bf16*>(from.scales)), kept(from.kept),
          column_bytes(from.column_bytes), width(width), value_stride(from.value_stride),
          column_stride(from.column_stride), scale_stride(from.scale_stride) {}

    const uint8_t* values;
    const void* columns;
    const bf16* scales;
    int64_t kept, column_bytes, width;
    int64_t value_stride, column_stride, scale_stride;  // from one slot to the next
};

// Rows rounded to integers for one matrix. Each row is: values, in groups as arrange_group() leaves
// them; for each group, the sum that corrects for weights stored as q + 8; the row's scale.
class GroupRows {
public:
    GroupRows(int64_t rows, const GroupSparse& matrix)
        : width_(matrix.width), sums_at_(width_ * sizeof(int16_t)),
          scale_at_(sums_at_ + width_ / GROUP * sizeof(int32_t)) {
        row_bytes_ = blocks(scale_at_ + sizeof(float), 64) * 64;
        bytes_.reset(new (std::align_val_t(64)) char[rows * row_bytes_]);
    }

    const char* row(int64_t index) const { return bytes_.get() + index * row_bytes_; }
    static const int16_t* values(const char* row) { return (const int16_t*)row; }
    const int32_t* sums(const char* row) const { return (const int32_t*)(row + sums_at_); }
    float scale(const char* row) const { return *(const float*)(row + scale_at_); }

    template <class Element> void round(int64_t index, const Element* x) {
        char* row = bytes_.get() + index * row_bytes_;
        int16_t* values = (int16_t*)row;
        *(float*)(row + scale_at_) = round_values(x, width_, values);
        int32_t* sums = (int32_t*)(row + sums_at_);
        for (int64_t g = 0; g < width_ / GROUP; g++, values += GROUP) {
            sums[g] = 0;
            for (int64_t i = 0; i < GROUP; i++) sums[g] -= 8 * values[i];
            arrange_group(values);
        }
    }

private:
    int64_t width_, sums_at_, scale_at_, row_bytes_;
    std::unique_ptr<char[], DeleteAligned> bytes_;
};

// The products of `Rows` rows with one output. Neighbouring groups go to different sums, so that
// none waits for the one before it.
template <int Rows, class Column>
inline void sparse_products(const GroupSparse& matrix, const GroupRows& all,
                            const char* const* rows, const uint8_t* values, const Column* columns,
                            const bf16* scales, Total (&total)[Rows]) {
    constexpr int64_t SPAN = 32;  // groups whose scales are widened together
    Total sums[2][Rows];
    const int16_t* x[Rows];
    const int32_t* begin[Rows];
    each<Rows>([&](auto m) ALWAYS_INLINE {
        sums[0][m] = sums[1][m] = no_total();
        x[m] = GroupRows::values(rows[m]);
        begin[m] = all.sums(rows[m]);
    });
    auto add = [&](int64_t i, float scale, Total(&to)[Rows]) ALWAYS_INLINE {
        // As in quantized.h: the processor does not prefetch far enough ahead by itself.
        __builtin_prefetch(values + i * GROUP / 2 + AHEAD, 0, 2);
        GroupWeights weights = load_group(values + i * GROUP / 2);
        int64_t column = columns[i];
        each<Rows>([&](auto m) ALWAYS_INLINE {
            GroupSum sum = group_dot(begin[m][column], x[m] + column * GROUP, weights);
            to[m] = add_group(to[m], sum, scale);
        });
    };
    for (int64_t first = 0; first < matrix.kept; first += SPAN) {
        int64_t count = least(SPAN, matrix.kept - first);
        float wide[SPAN];
        for (int64_t i = 0; i < count; i++) wide[i] = widen(scales[first + i]);
        int64_t i = 0;
        for (; i + 2 <= count; i += 2) {
            add(first + i, wide[i], sums[0]);
            add(first + i + 1, wide[i + 1], sums[1]);
        }
        if (i < count) add(first + i, wide[i], sums[0]);
    }
    each<Rows>([&](auto m) ALWAYS_INLINE { total[m] = sum_of_halves(sums[0][m], sums[1][m]); });
}

// As products() of products.h, for rows of `all`.
template <class Column, class Store>
inline void sparse_products(const GroupSparse& matrix, int64_t slot, const GroupRows& all,
                            const char* const* rows, int64_t num_rows, int64_t from, int64_t to,
                            Store store) {
    constexpr int64_t TILE = 4;
    const uint8_t* values = matrix.values + slot * matrix.value_stride;
    const Column* columns = static_cast<const Column*>(matrix.columns) + slot * matrix.column_stride;
    const bf16* scales = matrix.scales + slot * matrix.scale_stride;
    for (int64_t m = 0, some; m < num_rows; m += some) {
        some = least(TILE, num_rows - m);
        auto tile = [&]<int Rows>(std::integral_constant<int, Rows>) {
            for (int64_t n = from; n < to; n += 4) {
                int64_t count = least(4, to - n);
                Total totals[Rows][4];
                for (int64_t i = 0; i < 4; i++) {
                    int64_t first = (n + least(i, count - 1)) * matrix.kept;
                    Total total[Rows];
                    sparse_products<Rows>(matrix, all, rows + m, values + first * (GROUP / 2),
                                          columns + first, scales + first, total);
                    for (int r = 0; r < Rows; r++) totals[r][i] = total[r];
                }
                for (int r = 0; r < Rows; r++) {
                    float out[4];
                    totals4(totals[r], out);
                    float scale = all.scale(rows[m + r]);
                    for (float& value : out) value *= scale;
                    store(m + r, n, out, count);
                }
            }
        };
        switch (some) {
            case 1: tile(std::integral_constant<int, 1>{}); break;
            case 2: tile(std::integral_constant<int, 2>{}); break;
            case 3: tile(std::integral_constant<int, 3>{}); break;
            case 4: tile(std::integral_constant<int, 4>{}); break;
        }
    }
}

}  // namespace ISA
