// A read on its way.
#pragma once

#include <chrono>

#include "plan.h"

enum Step { MORE = 0, FINISHED = 1, FAILED = 2 };             // what a call into Python answers
enum Outcome { READ = 0, ERROR = 1, DROPPED = 2, CLOSED = 3 };  // how a read has ended
using CallerStep = int (*)(int64_t ticket);

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

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
};
