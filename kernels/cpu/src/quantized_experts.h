// The expert MLP with weights of 8 or 4 bits, dense or group-sparse, without gradients.
#pragma once

#include "experts.h"
#include "group_sparse.h"
#include "quantized.h"

namespace ISA {

// A quantized matrix of all slots, and the rounded rows that it is multiplied with.
struct QuantizedRowsMatrix {
    static constexpr bool READS_SOME = false;
    const IntMatrix& matrix;
    const IntRows& all;

    template <class Store>
    void multiply(const char* const* rows, int64_t num_rows, int64_t slot, int64_t from,
                  int64_t to, Store store) const {
        auto run = [&]<int Bits, int Groups>(std::integral_constant<int, Bits>,
                                             std::integral_constant<int, Groups>) {
            int_products<Bits, Groups>(matrix, slot, all, rows, num_rows, from, to, store);
        };
        by_format(run);
    }

private:
    template <class Run> void by_format(Run run) const {
        constexpr std::integral_constant<int, 8> eight;
        constexpr std::integral_constant<int, 4> four;
        constexpr std::integral_constant<int, 1> one;
        if (matrix.groups_per_step == 1) return matrix.bits == 8 ? run(eight, one) : run(four, one);
        if constexpr (CHUNK<8> > 32) {  // the smallest group
            constexpr std::integral_constant<int, 2> two;
            if (matrix.bits == 8) return run(eight, two);
            matrix.groups_per_step == 2 ? run(four, two) : run(four, std::integral_constant<int, 4>{});
        }
    }
};

// A group-sparse matrix of all slots, and the rounded rows that it is multiplied with.
struct SparseRowsMatrix {
    static constexpr bool READS_SOME = false;

    const GroupSparse& matrix;
    const GroupRows& all;

    template <class Store>
    void multiply(const char* const* rows, int64_t num_rows, int64_t slot, int64_t from,
                  int64_t to, Store store) const {
        if (matrix.column_bytes == 1)
            sparse_products<uint8_t>(matrix, slot, all, rows, num_rows, from, to, store);
        else
            sparse_products<int16_t>(matrix, slot, all, rows, num_rows, from, to, store);
    }
};

// Runs the experts on rounded rows; `RowsMatrix` is a matrix with rows of type `Rows`. Returns the
// first wrong row, and runs nothing if there is one; else -1.
template <class Element, class RowsMatrix, class Rows, class Matrix>
int64_t rounded_experts(const ExpertArguments& a, const Matrix& fc1, const Matrix& fc2) {
    int64_t wrong = first_wrong_row(a);
    if (wrong >= 0) return wrong;
    Order order(a, BLOCK_ROWS);
    int threads = expert_threads(a, order);
    int64_t num_rows = order.num_blocks ? order.row_blocks[order.num_blocks - 1].to : 0;
    Rows x(a.tokens, fc1), rounded_act(num_rows, fc2);
    std::unique_ptr<float[]> act(new float[num_rows * a.d_expert]);
    for_each_task(a.tokens, threads, [&](int64_t t) {
        x.round(t, static_cast<const Element*>(a.x) + t * a.d_model);
    });
    RowsMatrix first{fc1, x}, second{fc2, rounded_act};
    for_each_block(order, a.d_expert, threads, [&](auto& block, int64_t from, int64_t to) {
        const char* rows[BLOCK_ROWS];
        for (int64_t r = block.from; r < block.to; r++)
            rows[r - block.from] = x.row(order.rows[r] / a.choices);
        first_half(a, first, Limits{}, block, rows, from, to, act.get());
    });
    for_each_task(num_rows, threads,
                  [&](int64_t r) { rounded_act.round(r, act.get() + r * a.d_expert); });
    for_each_block(order, a.d_model, threads, [&](auto& block, int64_t from, int64_t to) {
        const char* rows[BLOCK_ROWS];
        for (int64_t r = block.from; r < block.to; r++)
            rows[r - block.from] = rounded_act.row(r);
        second_half(a, second, order, block, rows, from, to);
    });
    return -1;
}

template <class Element> int64_t quantized_experts(const QuantizedExpertArguments& q) {
    const ExpertArguments& a = q.rest;
    IntMatrix fc1(q.fc1, a.d_model), fc2(q.fc2, a.d_expert);
    return rounded_experts<Element, QuantizedRowsMatrix, IntRows>(a, fc1, fc2);
}

template <class Element> int64_t group_sparse_experts(const GroupSparseExpertArguments& q) {
    const ExpertArguments& a = q.rest;
    GroupSparse fc1(q.fc1, a.d_model), fc2(q.fc2, a.d_expert);
    return rounded_experts<Element, SparseRowsMatrix, GroupRows>(a, fc1, fc2);
}

}  // namespace ISA
