// Reads of experts by a few threads: what compute waits for goes first (read_queue.py says more).
//
// A read has a plan, or it is the caller's: then its parts are calls into Python. A plan that fails
// becomes the caller's, who tries again and words the error. One thread calls; any may close.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <optional>
#include <unordered_map>

#include "job.h"
#include "threads.h"

class Queue {
public:
    Counts counts;

    Queue(int64_t num_threads, int64_t small_bytes, CallerStep caller_step)
        : num_threads_(num_threads),
          most_early_(std::max<int64_t>(num_threads / 2, 1)),
          small_bytes_(small_bytes),
          caller_step_(caller_step),
          threads_(num_threads) {}

    ~Queue() { close(); }

    // False if no thread can be started to do it.
    bool submit(const Job& job) {
        std::unique_lock lock(mutex_);
        Job& mine = jobs_[job.ticket] = job;
        if (is_closed_) {
            finish(mine, CLOSED);
            return true;
        }
        auto& queue = mine.is_urgent ? urgent_ : early_;
        queue.push_back(&mine);
        if ((!mine.is_urgent && num_early_ >= most_early_) || wake()) return true;
        queue.pop_back();
        jobs_.erase(job.ticket);
        return false;
    }

    // False if it has ended; how, says what the caller collects or has collected.
    bool make_urgent(int64_t ticket) {
        std::unique_lock lock(mutex_);
        auto found = jobs_.find(ticket);
        if (found == jobs_.end() || found->second.is_done) return false;
        Job& job = found->second;
        job.is_dropped = false;
        bool was_waiting = std::erase(early_, &job);
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
        if (!std::erase(found->second.is_urgent ? urgent_ : early_, &found->second)) return false;
        jobs_.erase(found);
        return true;
    }

    // Waits until `wanted` of the reads are done, some time at most; says whether they are. The
    // caller's thread does small reads meanwhile: waking another one takes as long.
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
            if (!urgent_.empty() && is_small(*urgent_.front()) && num_active_ < num_threads_) {
                Job* job = urgent_.front();
                urgent_.pop_front();
                num_callers_++;
                run(*job, lock, false);
                num_callers_--;
                if (is_closed_) changed_.notify_all();
                continue;
            }
            // Marks that an earlier wait has left only end this one early; then it counts again.
            num_awaited_ = wanted - num_done;
            changed_.wait_for(lock, std::chrono::duration<double>(left),
                              [&] { return num_awaited_ <= 0; });
        }
    }

    // Hands out reads that are done, once each: the n-th of all goes to place n % most. Called when
    // the caller is through with those before.
    void collect(int64_t* tickets, int64_t* outcomes, double* seconds, int64_t most) {
        std::unique_lock lock(mutex_);
        for (int64_t count = 0; count < most && !finished_.empty(); count++) {
            Job& job = *finished_.front();
            finished_.pop_front();
            int64_t place = counts.collected++ % most;
            tickets[place] = job.ticket;
            outcomes[place] = job.outcome;
            seconds[place] = job.seconds;
            jobs_.erase(job.ticket);
        }
    }

    // Reads that were done so far, a step as its share, and seconds in which some thread read.
    void progress(double* reads, double* busy_s) {
        std::unique_lock lock(mutex_);
        *reads = reads_;
        *busy_s = busy_s_ + (num_active_ ? seconds_since(busy_since_) : 0);
    }

    // Reads that have not begun fail, so that waiting callers return; nothing is read any more
    // afterwards. False if one of its own threads calls: that cannot wait for its own end.
    bool close() {
        std::unique_lock lock(mutex_);
        is_closed_ = true;
        for (auto* queue : {&urgent_, &early_}) {
            for (Job* job : *queue) finish(*job, CLOSED);
            queue->clear();
        }
        has_work_.notify_all();
        if (threads_.include_caller()) return false;
        auto threads = threads_.take();
        changed_.wait(lock, [&] { return num_callers_ == 0; });
        lock.unlock();
        for (std::thread& thread : threads) thread.join();
        return true;
    }

private:
    bool is_small(const Job& job) const { return job.plan && job.plan->num_bytes <= small_bytes_; }

    // Lets one more thread look for work; false if there is none, and none can be started.
    bool wake() {
        int64_t room = std::max<int64_t>(most_early_ - num_early_, 0);
        int64_t wanted = urgent_.size() + std::min<int64_t>(early_.size(), room);
        // A thread that was woken counts as idle until it runs.
        if (wanted > num_idle_ && threads_.start([this] { work(); })) return true;
        has_work_.notify_one();
        return !threads_.empty();
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
            bool is_for_another = !job.plan && !may_call;
            auto end = job.end_after(step, is_closed_, is_for_another);
            if (end) {
                finish(job, *end);
            } else if (is_for_another) {
                urgent_.push_front(&job);
                wake();
            } else if (!job.is_urgent && !urgent_.empty()) {
                early_.push_front(&job);
            } else {
                continue;
            }
            break;
        }
        if (job.next_step > first) reads_ += double(job.next_step - first) / job.num_steps;
        num_early_ -= counts_as_early;
        if (--num_active_ == 0) busy_s_ += seconds_since(busy_since_);
        if (num_idle_ && (!urgent_.empty() || !early_.empty())) has_work_.notify_one();
    }

    Step one_step(Job& job, std::unique_lock<std::mutex>& lock) {
        Job now = job;  // others may make it urgent meanwhile
        lock.unlock();
        Step result = now.plan ? now.step_of_plan() : now.step_of_caller(caller_step_);
        lock.lock();
        job.plan = now.plan;
        job.num_steps = now.num_steps;
        job.next_step = now.next_step;
        job.seconds = now.seconds;
        return result;
    }

    void finish(Job& job, Outcome outcome) {
        job.is_done = true;
        job.outcome = outcome;
        finished_.push_back(&job);
        counts.finished.fetch_add(1, std::memory_order_release);
        if (job.is_awaited && --num_awaited_ <= 0) changed_.notify_all();
    }

    const int64_t num_threads_, most_early_, small_bytes_;
    const CallerStep caller_step_;
    std::mutex mutex_;
    std::condition_variable has_work_, changed_;
    Threads threads_;
    std::deque<Job*> urgent_, early_, finished_;
    std::unordered_map<int64_t, Job> jobs_;  // its values stay where they are
    int64_t num_idle_ = 0, num_active_ = 0, num_early_ = 0, num_awaited_ = 0, num_callers_ = 0;
    double reads_ = 0, busy_s_ = 0;
    Clock::time_point busy_since_;
    bool is_closed_ = false;
};
