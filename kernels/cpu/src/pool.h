// Threads that help with numbered tasks. Whoever is free takes the next task, the caller included,
// and the caller waits for tasks that were taken, never for threads: on a busy machine, where a
// thread may have lost its processor, the others do its share. (OpenMP's loops end in a barrier
// that all threads must reach, and a decode step has a hundred such loops.)
#pragma once

#include <cstdint>

using Task = void (*)(void* context, int64_t index);

// Runs task(context, 0 .. count - 1) on at most `threads` threads; returns when all are done.
void run_tasks(int64_t count, int64_t threads, Task task, void* context);
