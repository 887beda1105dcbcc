// The functions that Python calls.
#include "queue.h"

#define PUBLIC __attribute__((visibility("default")))

namespace {

// What a call answers, or null or false where it throws, for want of memory for one: an exception
// that came as far as Python would end the process.
template <class Call>
auto answer_of(Call call) -> decltype(call()) {
    try {
        return call();
    } catch (const std::exception&) {
        return {};
    }
}

Plan* plan_of(const int64_t* chunks, int64_t num_chunks, const int64_t* segments,
              int64_t num_segments, uint64_t digest) {
    auto plan = std::make_unique<Plan>(Plan{{}, {}, 0, digest});
    for (const int64_t* at = chunks; at < chunks + 5 * num_chunks; at += 5)
        plan->chunks.push_back({at[0], at[1], at[2], at[3], at[4]});
    for (const int64_t* at = segments; at < segments + 3 * num_segments; at += 3) {
        plan->segments.push_back({at[0], at[1], at[2]});
        plan->num_bytes += at[2];
    }
    return plan.release();
}

}  // namespace

extern "C" {

PUBLIC Queue* moeyard_reads_open(int64_t num_threads, int64_t small_bytes, CallerStep step) {
    return answer_of([&] { return new Queue(num_threads, small_bytes, step); });
}

PUBLIC int moeyard_reads_close(Queue* queue) { return queue->close(); }

PUBLIC void moeyard_reads_free(Queue* queue) { delete queue; }

PUBLIC const void* moeyard_reads_counts(Queue* queue) { return &queue->counts; }

// Chunks and segments are five and three numbers each, as in plan.h.
PUBLIC Plan* moeyard_reads_plan(const int64_t* chunks, int64_t num_chunks, const int64_t* segments,
                                int64_t num_segments, uint64_t digest) {
    return answer_of(
        [&] { return plan_of(chunks, num_chunks, segments, num_segments, digest); });
}

PUBLIC void moeyard_reads_free_plan(Plan* plan) { delete plan; }

PUBLIC int moeyard_reads_submit(Queue* queue, int64_t ticket, const Plan* plan,
                                const uint64_t* parts, int64_t num_steps, int is_urgent) {
    return answer_of(
        [&] { return queue->submit({ticket, plan, parts, num_steps, is_urgent != 0}); });
}

PUBLIC int moeyard_reads_make_urgent(Queue* queue, int64_t ticket) {
    return queue->make_urgent(ticket);
}

PUBLIC void moeyard_reads_drop(Queue* queue, int64_t ticket) { queue->drop(ticket); }

PUBLIC int moeyard_reads_cancel(Queue* queue, int64_t ticket) { return queue->cancel(ticket); }

PUBLIC int moeyard_reads_wait(Queue* queue, const int64_t* tickets, int64_t count, int64_t wanted,
                              double seconds) {
    return queue->wait(tickets, count, wanted, seconds);
}

PUBLIC void moeyard_reads_collect(Queue* queue, int64_t* tickets, int64_t* outcomes,
                                  double* seconds, int64_t most) {
    queue->collect(tickets, outcomes, seconds, most);
}

PUBLIC void moeyard_reads_progress(Queue* queue, double* reads_and_busy_s) {
    queue->progress(reads_and_busy_s, reads_and_busy_s + 1);
}

// Lets another function read; null is the system's. Returns the one before.
PUBLIC ReadAt moeyard_reads_read_with(ReadAt function) {
    static const ReadAt systems = read_at;
    return read_at.exchange(function ? function : systems);
}

PUBLIC uint64_t moeyard_reads_hash(const iovec* pieces, int64_t count, int64_t total) {
    return xxh3::hash(pieces, count, total);
}

}  // extern "C"
