// The memory of keys and values: blocks of positions, found by a sequence's table.
#pragma once

#include "arguments.h"
#include "vectors.h"

namespace ISA {

// Keys (which = 0) or values (which = 1) of one head of a sequence. Rows are `width` long.
// Stored is the type of the rows that attend, or int8_t with a scale for each row.
template <class Stored> struct StoredHead {
    Stored* values;
    float* scales;  // int8_t only
    const int64_t* table;
    int64_t width;

    int64_t place(int64_t position) const {
        return table[position / KV_BLOCK] * KV_BLOCK + position % KV_BLOCK;
    }
    Stored* row(int64_t position) const { return values + place(position) * width; }
    float& scale(int64_t position) const { return scales[place(position)]; }
};

template <class Stored>
StoredHead<Stored> stored_head(const CachedRows& to, int64_t layer, int64_t b, int64_t g, int which,
                               int64_t width) {
    int64_t first = g * to.capacities[b];
    void* const* parts = to.caches[b] + layer * (to.are_int8[b] ? 4 : 2);
    float* scales = to.are_int8[b] ? static_cast<float*>(parts[2 + which]) + first : nullptr;
    return {static_cast<Stored*>(parts[which]) + first * width, scales, to.tables[b], width};
}

// Stores a row in its own type, as it is.
template <class Element>
inline void store_row(const StoredHead<Element>& head, int64_t position, const Element* x) {
    std::memcpy(head.row(position), x, head.width * sizeof(Element));
}

// Rounds a row to integers of up to 127 times a scale. A row with NaN or infinity becomes NaN.
template <class Element>
inline void store_row(const StoredHead<int8_t>& head, int64_t position, const Element* x) {
    int8_t* row = head.row(position);
    float highest = 0;
    bool is_finite = true;
    for (int64_t i = 0; i < head.width; i++) {
        float size = std::fabs(widen(x[i]));
        is_finite &= size <= 3.4028235e38f;
        highest = size > highest ? size : highest;
    }
    head.scale(position) = is_finite ? highest / 127 : NAN;
    // Of the smallest rows, dividing would overflow.
    float factor = is_finite && highest > 1e-30f ? 127 / highest : 0;
    for (int64_t i = 0; i < head.width; i++) {
        float value = is_finite ? widen(x[i]) * factor : 0;
        row[i] = int8_t((value + 12582912.0f) - 12582912.0f);  // 1.5 * 2^23: to an integer
    }
}

// Stores a position's key or value of one head.
template <class Element>
inline void store(const CachedRows& to, int64_t layer, int64_t b, int64_t g, int which,
                  int64_t width, int64_t position, const Element* x) {
    if (to.are_int8[b])
        store_row(stored_head<int8_t>(to, layer, b, g, which, width), position, x);
    else
        store_row(stored_head<Element>(to, layer, b, g, which, width), position, x);
}

}  // namespace ISA
