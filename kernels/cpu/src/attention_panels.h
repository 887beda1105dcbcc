// Panels of keys, scores and values. cached_attention.h says what is added in which order.
#pragma once

#include "kv_memory.h"
#include "panels.h"

namespace ISA {

static_assert(PANEL % LANES == 0);

// Where a query's positions begin and end.
struct Seen {
    int64_t from, to;
};
inline Seen seen_at(int64_t position, int64_t window) {
    return {window && position >= window ? position - window + 1 : 0, position + 1};
}

// Packs keys of positions [p, p + count) for panel_tile.
template <class Element>
inline void pack_keys(const StoredHead<Element>& keys, int64_t p, int64_t count, Element*,
                      typename Step<Element>::Value* panel) {
    auto row = [&](int64_t i) { return keys.row(p + i); };
    pack_transposed<Element>(row, keys.width, count, panel);
}
template <class Element>
inline void pack_keys(const StoredHead<int8_t>& keys, int64_t p, int64_t count, Element* scratch,
                      typename Step<Element>::Value* panel) {
    for (int64_t i = 0; i < count; i++) {
        const int8_t* row = keys.row(p + i);
        for (int64_t k = 0; k < keys.width; k++)  // exact: bf16 has 8 bits
            scratch[i * keys.width + k] = narrow<Element>(float(row[k]));
    }
    auto row = [&](int64_t i) { return scratch + i * keys.width; };
    pack_transposed<Element>(row, keys.width, count, panel);
}

inline float value_at(const StoredHead<int8_t>& values, int64_t place, int64_t i) {
    return float(values.values[place * values.width + i]) * values.scales[place];
}
template <class Element>
inline float value_at(const StoredHead<Element>& values, int64_t place, int64_t i) {
    return widen(values.values[place * values.width + i]);
}

// Packs columns [from, from + count) of the values of positions [p, p + depth), zero-padded.
template <class Stored>
inline void pack_values(const StoredHead<Stored>& values, int64_t p, int64_t depth, int64_t from,
                        int64_t count, float* panel) {
    for (int64_t k = 0; k < depth; k++, panel += PANEL) {
        int64_t place = values.place(p + k);
        if (count == PANEL) {
            for (int64_t n = 0; n < PANEL; n++) panel[n] = value_at(values, place, from + n);
        } else {
            for (int64_t n = 0; n < count; n++) panel[n] = value_at(values, place, from + n);
            for (int64_t n = count; n < PANEL; n++) panel[n] = 0;
        }
    }
}

// Scores of one query, PANEL positions together; panels are `distance` apart.
struct ScoreLine {
    float* values;
    int64_t distance;
    float* panel(int64_t i) const { return values + i * distance; }
};

// Scores become exp(scale * (score - highest)), or 0 for positions that are not seen. `seen` counts
// from the first panel's first position. Returns their sum, with the sink's.
inline float soften(const ScoreLine& line, int64_t panels, Seen seen, float scale,
                    const float* sink) {
    int64_t first = seen.from / PANEL, last = (seen.to - 1) / PANEL;
    auto hide = [&](float hidden) {  // only the first and the last panel have such positions
        for (int64_t j = 0; j < seen.from - first * PANEL; j++) line.panel(first)[j] = hidden;
        for (int64_t j = seen.to - last * PANEL; j < PANEL; j++) line.panel(last)[j] = hidden;
    };
    hide(-INFINITY);
    float tops[LANES], sums[LANES] = {};
    for (int64_t j = 0; j < LANES; j++) tops[j] = -INFINITY;
    for (int64_t i = first; i <= last; i++)
        for (int64_t v = 0; v < PANEL; v += LANES)
            for (int64_t j = 0; j < LANES; j++) {
                float score = line.panel(i)[v + j];
                tops[j] = score > tops[j] ? score : tops[j];
            }
    float highest = tops[0];
    for (int64_t j = 1; j < LANES; j++) highest = tops[j] > highest ? tops[j] : highest;
    float sink_score = sink ? *sink / scale : 0;
    if (sink) highest = sink_score > highest ? sink_score : highest;
    for (int64_t i = first; i <= last; i++) {
        float* scores = line.panel(i);
        for (int64_t j = 0; j < PANEL; j++)
            scores[j] = exponential((scores[j] - highest) * scale);
    }
    hide(0);
    for (int64_t i = 0; i < panels; i++)
        if (i < first || i > last) std::memset(line.panel(i), 0, PANEL * sizeof(float));
    for (int64_t i = first; i <= last; i++)
        for (int64_t v = 0; v < PANEL; v += LANES)
            for (int64_t j = 0; j < LANES; j++) sums[j] += line.panel(i)[v + j];
    float total = sink ? exponential((sink_score - highest) * scale) : 0;
    for (int64_t j = 0; j < LANES; j++) total += sums[j];
    return total;
}

}  // namespace ISA
