// Reads of experts by a few threads: what compute waits for goes first (read_queue.py says more).
//
// A read has a plan, or it is the caller's: then its parts are calls into Python. A plan that fails
// becomes the caller's, who tries again and words the error. One thread calls; any may close.
#pragma once

#include <signal.h>

#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <unordered_map>

#include "job.h"

class Queue {
public:
    // Reads that have ended, for Python to look at without a call.
    std::atomic<int64_t> num_finished{0};

    Queue(int64_t num_threads, CallerStep caller_step)
        : num_threads_(num_threads),
          most_early_(num_threads / 2 > 1 ? num_threads / 2 : 1),
          caller_step_(caller_step) {}

    ~Queue() { close(); }

    void submit(const Job& job) {
        std::unique_lock lock(mutex_);
        Job& mine = jobs_[job.ticket] = job;
        if (is_closed_) return finish(mine, CLOSED);
        (mine.is_urgent ? urgent_ : early_).push_back(&mine);
        if (mine.is_urgent || num_early_ < most_early_) wake();
    }

    // False if it was dropped and has ended.
    bool make_urgent(int64_t ticket) {
        std::unique_lock lock(mutex_);
        auto found = jobs_.find(ticket);
        if (found == jobs_.end()) return true;
        Job& job = found->second;
        if (job.is_done) return job.outcome != DROPPED;
        job.is_dropped = false;
        bool was_waiting = remove(early_, &job);
        job.is_urgent = true;
        if (was_waiting) {
            urgent_.push_back(&job);
            wake();
        }
        return true;
    }

    void drop(int64_t ticket) {
        std::unique_lock lock(mutex_);
        auto found = jobs_.find(ticket);
        if (found != jobs_.end()) found->second.is_dropped = true;
    }

    bool cancel(int64_t ticket) {
        std::unique_lock lock(mutex_);
        auto found = jobs_.find(ticket);
        if (found == jobs_.end()) return false;
        if (!remove(found->second.is_urgent ? urgent_ : early_, &found->second)) return false;
        jobs_.erase(found);
        return true;
    }

    // Waits until `wanted` of the reads are done, some time at most; says whether they are. The
    // caller's thread reads meanwhile: waking another one takes as long as a small read.
    bool wait(const int64_t* tickets, int64_t count, int64_t wanted, double seconds) {
        auto started = Clock::now();
        std::unique_lock lock(mutex_);
        for (;;) {
            int64_t num_done = 0;
            for (int64_t n = 0; n < count; n++) {
                auto found = jobs_.find(tickets[n]);
                bool is_done = found == jobs_.end() || found->second.is_done;
                num_done += is_done;
                if (!is_done) found->second.is_awaited = true;
            }
            if (num_done >= wanted) return true;
            double left = seconds - seconds_since(started);
            if (left <= 0) return false;
            if (!urgent_.empty() && urgent_.front()->plan && num_active_ < num_threads_) {
                Job* job = urgent_.front();
                urgent_.pop_front();
                run(*job, lock, false);
                continue;
            }
            num_awaited_ = wanted - num_done;
            changed_.wait_for(lock, std::chrono::duration<double>(left),
                              [&] { return num_awaited_ <= 0; });
        }
    }

    // Hands out reads that are done, once each.
    int64_t collect(int64_t* tickets, int64_t* outcomes, double* seconds, int64_t most) {
        std::unique_lock lock(mutex_);
        int64_t count = 0;
        for (; count < most && !finished_.empty(); count++) {
            Job& job = *finished_.front();
            finished_.pop_front();
            tickets[count] = job.ticket;
            outcomes[count] = job.outcome;
            seconds[count] = job.seconds;
            jobs_.erase(job.ticket);
        }
        return count;
    }

    // Reads that were done so far, a step as its share, and seconds in which some thread read.
    void progress(double* reads, double* busy_s) {
        std::unique_lock lock(mutex_);
        *reads = reads_;
        *busy_s = busy_s_ + (num_active_ ? seconds_since(busy_since_) : 0);
    }

    // Reads that have not begun fail, so that waiting callers return.
    void close() {
        std::unique_lock lock(mutex_);
        is_closed_ = true;
        for (auto* queue : {&urgent_, &early_}) {
            for (Job* job : *queue) finish(*job, CLOSED);
            queue->clear();
        }
        has_work_.notify_all();
        auto threads = std::move(threads_);
        threads_.clear();
        lock.unlock();
        for (std::thread& thread : threads) thread.join();
    }

private:
    static bool remove(std::deque<Job*>& queue, Job* job) {
        for (auto at = queue.begin(); at != queue.end(); ++at)
            if (*at == job) return queue.erase(at), true;
        return false;
    }

    void wake() {
        if (num_idle_) {
            has_work_.notify_one();
        } else if (int64_t(threads_.size()) < num_threads_) {
            sigset_t all, before;  // signals are for Python's main thread
            sigfillset(&all);
            pthread_sigmask(SIG_SETMASK, &all, &before);
            threads_.emplace_back([this] { work(); });
            pthread_sigmask(SIG_SETMASK, &before, nullptr);
        }
    }

    Job* next() {
        if (num_active_ >= num_threads_) return nullptr;
        auto& queue = urgent_.empty() ? early_ : urgent_;
        if (queue.empty() || (&queue == &early_ && num_early_ >= most_early_)) return nullptr;
        Job* job = queue.front();
        queue.pop_front();
        return job;
    }

    void work() {
        std::unique_lock lock(mutex_);
        for (;;) {
            Job* job = next();
            if (job) {
                run(*job, lock, true);
                continue;
            }
            if (is_closed_) return;
            num_idle_++;
            has_work_.wait(lock);
            num_idle_--;
        }
    }

    // Does a read, or a part of it if urgent ones wait, or if Python must go on and may not be called
    // from here.
    void run(Job& job, std::unique_lock<std::mutex>& lock, bool may_call) {
        bool counts_as_early = !job.is_urgent;
        num_early_ += counts_as_early;
        if (num_active_++ == 0) busy_since_ = Clock::now();
        int64_t first = job.next_step;
        for (;;) {
            Step step = one_step(job, lock);
            if (step == FINISHED) finish(job, READ);
            else if (step == FAILED) finish(job, ERROR);
            else if (!job.is_urgent && job.is_dropped) finish(job, DROPPED);
            else if (is_closed_ && !job.is_urgent) finish(job, CLOSED);
            else if (!job.plan && !may_call) urgent_.push_front(&job), wake();
            else if (job.is_urgent || urgent_.empty()) continue;
            else early_.push_front(&job);
            break;
        }
        if (job.next_step > first) reads_ += double(job.next_step - first) / job.num_steps;
        num_early_ -= counts_as_early;
        if (--num_active_ == 0) busy_s_ += seconds_since(busy_since_);
        if (num_idle_ && (!urgent_.empty() || !early_.empty())) has_work_.notify_one();
    }

    Step one_step(Job& job, std::unique_lock<std::mutex>& lock) {
        const Plan* plan = job.plan;
        int64_t step = job.next_step;
        lock.unlock();
        Step result;
        if (plan) {
            auto started = Clock::now();
            bool is_last = step + 1 == job.num_steps;
            bool is_good = read_chunk(*plan, step, job.parts) &&
                           (!is_last || is_whole(*plan, job.parts));
            result = is_good && is_last ? FINISHED : MORE;
            lock.lock();
            job.seconds += seconds_since(started);
            if (!is_good) job.plan = nullptr, job.num_steps = 1, job.seconds = 0;
            job.next_step = is_good ? step + 1 : 0;
        } else {
            result = Step(caller_step_(job.ticket));
            lock.lock();
            if (result != FAILED && job.next_step < job.num_steps) job.next_step++;
        }
        return result;
    }

    void finish(Job& job, Outcome outcome) {
        job.is_done = true;
        job.outcome = outcome;
        finished_.push_back(&job);
        num_finished.fetch_add(1, std::memory_order_release);
        if (job.is_awaited && --num_awaited_ <= 0) changed_.notify_all();
    }

    const int64_t num_threads_, most_early_;
    const CallerStep caller_step_;
    std::mutex mutex_;
    std::condition_variable has_work_, changed_;
    std::vector<std::thread> threads_;  // started as they are needed
    std::deque<Job*> urgent_, early_, finished_;
    std::unordered_map<int64_t, Job> jobs_;  // its values stay where they are
    int64_t num_idle_ = 0, num_active_ = 0, num_early_ = 0, num_awaited_ = 0;
    double reads_ = 0, busy_s_ = 0;
    Clock::time_point busy_since_;
    bool is_closed_ = false;
};
