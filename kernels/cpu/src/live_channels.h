// Which channels of experts some row needs, judged by their gates: the others' rows of up and columns
// of down need not be in memory. The sums and the rule are those of channel_experts().
#pragma once

#include "experts.h"

namespace ISA {

// Marks the channels in `live`. Returns the first wrong row, and marks none if there is one; else -1.
template <class Element> int64_t live_channels(const LiveChannelArguments& l) {
    const ExpertArguments& a = l.of.rest;
    int64_t wrong = first_wrong_row(a);
    if (wrong >= 0) return wrong;
    Order order(a, BLOCK_ROWS);
    const Element* x = static_cast<const Element*>(a.x);
    PlainMatrix<Element> fc1{static_cast<const Element*>(a.fc1), a.fc1_stride, a.d_model};
    auto expert_of = [&](const RowBlock& block) { return a.experts[order.rows[block.from]]; };
    // A line for each block: two blocks of an expert may be computed at the same time.
    std::unique_ptr<uint8_t[]> marks(new uint8_t[order.num_blocks * a.d_expert]());
    for_each_block(order, a.d_expert, expert_threads(a, order),
                   [&](const RowBlock& block, int64_t from, int64_t to) {
        const Element* rows[BLOCK_ROWS];
        for (int64_t r = block.from; r < block.to; r++)
            rows[r - block.from] = x + order.rows[r] / a.choices * a.d_model;
        float gates[BLOCK_ROWS * BLOCK_OUTPUTS];
        gate_sums(a, fc1, block, rows, from, to, gates);
        const float* limits = l.of.gate_limits;
        if (limits) limits += expert_of(block) * a.d_expert;
        int64_t live[STREAM_OUTPUTS];
        int64_t count = find_live(a, Limits{limits, nullptr}, gates, block.to - block.from, from,
                                  to - from, live);
        uint8_t* line = marks.get() + (&block - order.row_blocks.get()) * a.d_expert;
        for (int64_t i = 0; i < count; i++) line[live[i]] = 1;
    });
    for (int64_t b = 0; b < order.num_blocks; b++) {
        const uint8_t* line = marks.get() + b * a.d_expert;
        uint8_t* live = l.live + l.line_of[expert_of(order.row_blocks[b])] * a.d_expert;
        for (int64_t i = 0; i < a.d_expert; i++) live[i] |= line[i];
    }
    return -1;
}

}  // namespace ISA
