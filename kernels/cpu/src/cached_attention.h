// Attention of new rows to the positions in their sequence's cache, their own included.
//
// A row's bits depend on the positions it sees and on nothing else: not on the rows of its text that
// are new with it, not on other sequences, not on where blocks are. For each key, the products of a
// score are added in the order of the width. For each column, values are added in the order of
// positions, from the first that is seen. Probabilities are added in LANES partial sums, by
// position modulo LANES. So a panel may hold positions that some of its rows do not see: they count
// as 0, and adding 0 changes nothing.
#pragma once

#include <algorithm>

#include "attention_panels.h"
#include "norm.h"

namespace ISA {

// Rows of queries, a position's heads being a row each, that share packed keys and values.
constexpr int64_t TASK_QUERIES = 96;
// Heads of a position in one task.
constexpr int64_t TASK_HEADS = 16;
// Scores of a task: they stay in the second-level cache.
constexpr int64_t TASK_SCORES = 1 << 18;

// What the layers' attention has in common.
struct Heads {
    int64_t num_heads, num_kv_heads, key_width, value_width;
    int64_t values_in_keys;  // a value is the first part of the key
    int64_t window;          // positions a query sees, its own included; 0 = all
    float scale;             // of scores; above 0
    const void* sinks;       // [num_heads]; null = none
};

// Queries of one task: `count` rows of a sequence from its new row `first` on, and some heads.
struct QueryTask {
    int64_t b, first, count, from_head, num_heads;
};

// The queries of a task, and where their outputs go: one line for each row and head.
template <class Element> struct QueryLines {
    const Element* queries[TASK_QUERIES];
    Element* outputs[TASK_QUERIES];
    const Element* sinks[TASK_QUERIES];
    int64_t positions[TASK_QUERIES];
    int64_t count;
};

// Calls body(line, some, seen) for tiles of lines; `seen` is what at least one of them sees.
template <class Element, class Body>
inline void for_each_tile(const QueryLines<Element>& lines, int64_t window, Body body) {
    for (int64_t m = 0; m < lines.count; m += PANEL_ROWS) {
        int64_t some = least(PANEL_ROWS, lines.count - m);
        Seen seen = {seen_at(lines.positions[m], window).from, lines.positions[m + some - 1] + 1};
        body(m, some, seen);
    }
}

// Attention of some lines, whose keys and values are those of one head. Lines are in the order of
// their positions.
template <class Element, class Stored>
void attend_lines(const Heads& heads, const StoredHead<Stored>& keys,
                  const StoredHead<Stored>& values, const QueryLines<Element>& lines) {
    using S = Step<Element>;
    int64_t begin = seen_at(lines.positions[0], heads.window).from / PANEL * PANEL;
    int64_t end = lines.positions[lines.count - 1] + 1, panels = blocks(end - begin, PANEL);
    int64_t steps = blocks(heads.key_width, S::SIZE), distance = lines.count * PANEL;
    std::unique_ptr<float[]> memory(new float[(panels + 1) * distance + PANEL * PANEL]);
    float(*sums)[PANEL] = reinterpret_cast<float(*)[PANEL]>(memory.get() + panels * distance);
    float* value_panel = memory.get() + (panels + 1) * distance;
    std::unique_ptr<typename S::Value[]> key_panel(new typename S::Value[steps * PANEL]);
    constexpr bool IS_INT8 = std::is_same_v<Stored, int8_t>;
    std::unique_ptr<Element[]> wide(IS_INT8 ? new Element[PANEL * heads.key_width] : nullptr);
    for (int64_t i = 0; i < panels; i++) {
        int64_t p = begin + i * PANEL, count = least(PANEL, end - p);
        auto c = reinterpret_cast<float(*)[PANEL]>(memory.get() + i * distance);
        pack_keys(keys, p, count, wide.get(), key_panel.get());
        for_each_tile(lines, heads.window, [&](int64_t m, int64_t some, Seen seen) {
            if (seen.to <= p || seen.from >= p + PANEL) return;
            panel_tile(
                some, [&](int64_t n, int64_t s) { return broadcast(lines.queries[m + n], s); },
                key_panel.get(), steps, true, c + m);
        });
        if constexpr (IS_INT8) {
            float scales[PANEL] = {};
            for (int64_t j = 0; j < count; j++) scales[j] = keys.scale(p + j);
            for (int64_t m = 0; m < lines.count; m++)
                for (int64_t j = 0; j < PANEL; j++) c[m][j] *= scales[j];
        }
    }
    float totals[TASK_QUERIES];
    for (int64_t m = 0; m < lines.count; m++) {
        Seen seen = seen_at(lines.positions[m], heads.window);
        float sink = heads.sinks ? widen(*lines.sinks[m]) : 0;
        totals[m] = soften({memory.get() + m * PANEL, distance}, panels,
                           {seen.from - begin, seen.to - begin}, heads.scale,
                           heads.sinks ? &sink : nullptr);
    }
    for (int64_t from = 0; from < heads.value_width; from += PANEL) {
        int64_t columns = least(PANEL, heads.value_width - from);
        std::memset(sums, 0, distance * sizeof(float));
        for (int64_t i = 0; i < panels; i++) {
            int64_t p = begin + i * PANEL, count = least(PANEL, end - p);
            const float* probabilities = memory.get() + i * distance;
            pack_values(values, p, count, from, columns, value_panel);
            for_each_tile(lines, heads.window, [&](int64_t m, int64_t some, Seen seen) {
                if (seen.to <= p || seen.from >= p + PANEL) return;
                const float* a = probabilities + m * PANEL;
                panel_tile(
                    some, [&](int64_t n, int64_t s) { return a[n * PANEL + s]; },
                    static_cast<const float*>(value_panel), least(count, seen.to - p), false,
                    sums + m);
            });
        }
        for (int64_t m = 0; m < lines.count; m++)
            for (int64_t n = 0; n < columns; n++)
                lines.outputs[m][from + n] = narrow<Element>(sums[m][n] / totals[m]);
    }
}

// Divides the new rows into tasks: many rows for each read of the keys, but not all scores at once.
inline std::unique_ptr<QueryTask[]> query_tasks(const Heads& heads, const CachedRows& to,
                                                int64_t* num_tasks) {
    int64_t group = heads.num_heads / heads.num_kv_heads, some = least(group, TASK_HEADS);
    auto rows_of = [&](int64_t b) {
        int64_t span = to.lengths[b] + to.counts[b];
        if (heads.window) span = least(span, heads.window + TASK_QUERIES);
        return std::max(int64_t(1), least(TASK_QUERIES, TASK_SCORES / span) / some);
    };
    *num_tasks = 0;
    for (int64_t b = 0; b < to.sequences; b++)
        *num_tasks += blocks(to.counts[b], rows_of(b)) * heads.num_kv_heads * blocks(group, some);
    std::unique_ptr<QueryTask[]> tasks(new QueryTask[*num_tasks]);
    QueryTask* next = tasks.get();
    for (int64_t b = 0; b < to.sequences; b++)
        for (int64_t first = 0; first < to.counts[b]; first += rows_of(b))
            for (int64_t g = 0; g < heads.num_kv_heads; g++)
                for (int64_t h = 0; h < group; h += some)
                    *next++ = {b, first, least(rows_of(b), to.counts[b] - first), g * group + h,
                               least(some, group - h)};
    return tasks;
}

// out = attention of all new rows, whose keys and values are stored. Rows of q and out are
// `q_stride` and `out_stride` apart.
template <class Element>
void attend_stored(const Heads& heads, const CachedRows& to, int64_t layer, const Element* q,
                   int64_t q_stride, Element* out, int64_t out_stride, int threads) {
    int64_t num_tasks, group = heads.num_heads / heads.num_kv_heads;
    std::unique_ptr<QueryTask[]> tasks = query_tasks(heads, to, &num_tasks);
    std::unique_ptr<int64_t[]> starts(new int64_t[to.sequences + 1]());
    for (int64_t b = 0; b < to.sequences; b++) starts[b + 1] = starts[b] + to.counts[b];
    for_each_task(num_tasks, threads, [&](int64_t index) {
        const QueryTask& task = tasks[index];
        QueryLines<Element> lines;
        lines.count = 0;
        for (int64_t r = task.first; r < task.first + task.count; r++)
            for (int64_t h = task.from_head; h < task.from_head + task.num_heads; h++) {
                int64_t line = lines.count++, row = starts[task.b] + r;
                lines.queries[line] = q + row * q_stride + h * heads.key_width;
                lines.outputs[line] = out + row * out_stride + h * heads.value_width;
                lines.sinks[line] = static_cast<const Element*>(heads.sinks) + h;
                lines.positions[line] = to.lengths[task.b] + r;
            }
        int64_t g = task.from_head / group;
        auto run = [&](auto example) {
            using Stored = decltype(example);
            auto stored = [&](int which, int64_t width) {
                return stored_head<Stored>(to, layer, task.b, g, which, width);
            };
            auto keys = stored(0, heads.key_width);
            attend_lines<Element, Stored>(
                heads, keys, heads.values_in_keys ? keys : stored(1, heads.value_width), lines);
        };
        to.are_int8[task.b] ? run(int8_t()) : run(Element());
    });
}

// Calls body(sequence, row, position) for all new rows.
template <class Body> void for_each_new_row(const CachedRows& to, int threads, Body body) {
    struct NewRow {
        int64_t b, position;
    };
    std::unique_ptr<NewRow[]> new_rows(new NewRow[to.rows]);
    NewRow* next = new_rows.get();
    for (int64_t b = 0; b < to.sequences; b++)
        for (int64_t i = 0; i < to.counts[b]; i++) *next++ = {b, to.lengths[b] + i};
    for_each_row(to.rows, threads,
                 [&](int64_t r) { body(new_rows[r].b, r, new_rows[r].position); });
}

// Attention of finished queries, keys and values.
template <class Element> void attend(const AttendArguments& a) {
    const CachedRows& to = *a.to;
    const Element *q = static_cast<const Element*>(a.q), *k = static_cast<const Element*>(a.k);
    const Element* v = static_cast<const Element*>(a.v);
    Heads heads{a.num_heads,      a.num_kv_heads, a.key_width, a.value_width,
                a.values_in_keys, a.window,       a.scale,     a.sinks};
    int64_t work = 0;
    for (int64_t b = 0; b < to.sequences; b++)
        work += to.counts[b] * (to.lengths[b] + to.counts[b]) * a.num_heads * a.key_width;
    int threads = work < (1 << 19) ? 1 : int(a.threads);
    for_each_new_row(to, threads, [&](int64_t b, int64_t r, int64_t position) {
        for (int64_t g = 0; g < a.num_kv_heads; g++) {
            int64_t at = r * a.num_kv_heads + g;
            store(to, a.layer, b, g, 0, a.key_width, position, k + at * a.key_width);
            if (!a.values_in_keys)
                store(to, a.layer, b, g, 1, a.value_width, position, v + at * a.value_width);
        }
    });
    attend_stored<Element>(heads, to, a.layer, q, a.num_heads * a.key_width,
                           static_cast<Element*>(a.out), a.num_heads * a.value_width, threads);
}

}  // namespace ISA
