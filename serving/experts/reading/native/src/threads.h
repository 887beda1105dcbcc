// The threads of a queue, started as they are needed. The queue's lock protects them.
#pragma once

#include <signal.h>

#include <cstdint>
#include <exception>
#include <thread>
#include <utility>
#include <vector>

class Threads {
public:
    explicit Threads(int64_t most) : most_(most) {}

    bool empty() const { return threads_.empty(); }

    // False if there are as many as there may be, or the system gives no more.
    template <class Work>
    bool start(Work work) {
        if (int64_t(threads_.size()) >= most_) return false;
        bool has_started = true;
        sigset_t all, before;  // signals are for Python's main thread
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            threads_.emplace_back(std::move(work));
        } catch (const std::exception&) {
            has_started = false;
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        return has_started;
    }

    bool include_caller() const {
        for (const std::thread& thread : threads_)
            if (thread.get_id() == std::this_thread::get_id()) return true;
        return false;
    }

    // Hands them out to be joined; afterwards there are none.
    std::vector<std::thread> take() { return std::exchange(threads_, {}); }

private:
    const int64_t most_;
    std::vector<std::thread> threads_;
};
