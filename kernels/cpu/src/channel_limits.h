// Which channels between an expert's products count as 0.
#pragma once

#include <cmath>

#include "activation.h"
#include "arguments.h"

namespace ISA {

// What one expert's channels are compared with, [F] each: below or at the limit they count as 0.
// Null = none.
struct Limits {
    const float *gate, *act;  // of act(gate), of act(gate) * up
    const bool* const* used;  // by row of the block, [F]: whether it uses a channel
};

// Whether a value counts as 0. NaN never does.
inline bool is_below(float value, float limit) { return std::fabs(value) <= limit; }

// The channels [from, from + count) of F whose up rows some row needs: act(gate) is not 0, or above
// its limit. A gate that is not finite needs it too, so that what is broken stays visible.
inline int64_t find_live(const ExpertArguments& a, const Limits& limits, const float* gates,
                         int64_t num_rows, int64_t from, int64_t count, int64_t* live) {
    int64_t num_live = 0;
    by_activation(a.activation, [&](auto kind) {
        for (int64_t i = 0; i < count; i++) {
            float limit = limits.gate ? limits.gate[from + i] : 0;
            bool is_live = false;
            for (int64_t m = 0; m < num_rows; m++) {
                float gate = gates[m * count + i];
                is_live |= !is_below(gate_factor<kind>(gate), limit) || !std::isfinite(gate);
            }
            live[num_live] = from + i;
            num_live += is_live;
        }
    });
    return num_live;
}

// The channels [from, from + count) of F that some row uses.
inline int64_t find_used(const bool* const* used, int64_t num_rows, int64_t from, int64_t count,
                         int64_t* found) {
    int64_t num_found = 0;
    for (int64_t n = from; n < from + count; n++) {
        bool is_used = false;
        for (int64_t m = 0; m < num_rows; m++) is_used |= used[m][n];
        found[num_found] = n;
        num_found += is_used;
    }
    return num_found;
}

}  // namespace ISA
