#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <system_error>
#include <thread>

namespace {

// How long a worker looks for the next job before it sleeps: longer than the gap between two
// kernels of a decode step, and short compared with the gap between two requests.
constexpr auto PATIENCE = std::chrono::microseconds(200);
constexpr int LOOKS_BETWEEN_CLOCKS = 64;
constexpr int SPINS_BEFORE_YIELD = 4096;

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// One job at a time. `ticket` is the job's number in the high half and its next task in the low
// half. While a job's fields are being written, the ticket holds an invalid task number. Fields are
// written with release and read with acquire order, so a thread that reads new fields under an old
// ticket fails its compare-and-swap.
class Pool {
public:
    void run(int64_t count, int64_t threads, Task task, void* context) {
        grow(threads - 1);
        uint64_t job = ticket_.load(std::memory_order_relaxed) >> 32;
        ticket_.store((job + 1) << 32 | UINT32_MAX);
        task_.store(task, std::memory_order_release);
        context_.store(context, std::memory_order_release);
        count_.store(count, std::memory_order_release);
        helpers_.store(threads - 1, std::memory_order_release);
        done_.store(0, std::memory_order_release);
        ticket_.store((job + 2) << 32);  // a new number, so that sleepers notice
        ticket_.notify_all();
        while (take_one()) {
        }
        for (int spins = 0; done_.load(std::memory_order_acquire) < count; spins++)
            spins < SPINS_BEFORE_YIELD ? relax() : std::this_thread::yield();
    }

private:
    // Starts as many threads as the system allows; the caller can do all the work alone.
    void grow(int64_t workers) {
        try {
            for (; num_workers_ < workers; num_workers_++)
                std::thread([this, index = num_workers_] { work(index); }).detach();
        } catch (const std::system_error&) {
        }
    }

    bool take_one() {
        uint64_t ticket = ticket_.load();
        for (;;) {
            Task task = task_.load(std::memory_order_acquire);
            void* context = context_.load(std::memory_order_acquire);
            int64_t count = count_.load(std::memory_order_acquire), index = uint32_t(ticket);
            if (index >= count) return false;
            if (ticket_.compare_exchange_weak(ticket, ticket + 1)) {
                task(context, index);
                done_.fetch_add(1, std::memory_order_release);
                return true;
            }
        }
    }

    void work(int64_t index) {
        for (;;) {
            uint64_t seen = ticket_.load();
            if (index < helpers_.load(std::memory_order_acquire))
                while (take_one()) {
                }
            wait_for_change(seen);
        }
    }

    // Returns when there may be a newer job than that of ticket `seen`.
    void wait_for_change(uint64_t seen) {
        auto start = std::chrono::steady_clock::now();
        do {
            for (int i = 0; i < LOOKS_BETWEEN_CLOCKS; i++) {
                if (ticket_.load(std::memory_order_relaxed) >> 32 != seen >> 32) return;
                relax();
            }
        } while (std::chrono::steady_clock::now() - start < PATIENCE);
        uint64_t now = ticket_.load();
        if (now >> 32 == seen >> 32) ticket_.wait(now);
    }

    std::atomic<uint64_t> ticket_{0};
    std::atomic<Task> task_{nullptr};
    std::atomic<void*> context_{nullptr};
    std::atomic<int64_t> count_{0}, helpers_{0}, done_{0};
    int64_t num_workers_ = 0;
};

// Never destroyed: its threads may outlive the statics of this library. A forked child has none of
// them and starts its own.
Pool* pool = new Pool;
std::mutex* in_use = new std::mutex;

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] {
    pool = new Pool;
    in_use = new std::mutex;
});

}  // namespace

void run_tasks(int64_t count, int64_t threads, Task task, void* context) {
    std::unique_lock<std::mutex> lock(*in_use, std::defer_lock);
    // One task, one thread, or another caller already has the helpers: run everything here.
    if (count <= 1 || threads <= 1 || count >= UINT32_MAX || !lock.try_lock()) {
        for (int64_t index = 0; index < count; index++) task(context, index);
        return;
    }
    pool->run(count, threads, task, context);
}
