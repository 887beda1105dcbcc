// A read on its way.
#pragma once

#include <chrono>
#include <exception>
#include <optional>

#include "plan.h"

enum Step { MORE = 0, FINISHED = 1, FAILED = 2 };             // what a call into Python answers
enum Outcome { READ = 0, ERROR = 1, DROPPED = 2, CLOSED = 3 };  // how a read has ended
using CallerStep = int (*)(int64_t ticket);

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

struct Counts {  // for Python to look at without a call
    std::atomic<int64_t> finished{0};  // reads that have ended
    int64_t collected = 0;             // ... and were handed out
};

struct Job {
    int64_t ticket;
    const Plan* plan;         // null: the parts are the caller's
    const uint64_t* parts;    // addresses of the slot's parts
    int64_t num_steps;
    bool is_urgent;
    int64_t next_step = 0;
    double seconds = 0;  // of the steps of a plan; 0 if the caller did it
    bool is_dropped = false, is_done = false, is_awaited = false;
    Outcome outcome = READ;

    // How it has ended after a step, if it has. A closed queue ends what would have to wait.
    std::optional<Outcome> end_after(Step step, bool is_closed, bool is_for_another) const {
        if (step == FINISHED) return READ;
        if (step == FAILED) return ERROR;
        if (is_dropped && !is_urgent) return DROPPED;
        if (is_closed && (is_for_another || !is_urgent)) return CLOSED;
        return std::nullopt;
    }

    // Reads a chunk. What fails, for want of memory for one, becomes the caller's.
    Step step_of_plan() {
        auto started = Clock::now();
        bool is_last = next_step + 1 == num_steps, is_good = false;
        try {
            is_good = read_chunk(*plan, next_step, parts) && (!is_last || is_whole(*plan, parts));
        } catch (const std::exception&) {
        }
        if (!is_good) {
            plan = nullptr;
            num_steps = 1;
            next_step = 0;
            seconds = 0;
            return MORE;
        }
        next_step++;
        seconds += seconds_since(started);
        return is_last ? FINISHED : MORE;
    }

    Step step_of_caller(CallerStep call) {
        Step result = Step(call(ticket));
        if (result != FAILED && next_step < num_steps) next_step++;
        return result;
    }
};
