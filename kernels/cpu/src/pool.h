// Threads that help with numbered tasks. Every free thread takes the next task, also the caller.
// The caller waits for tasks that were taken, never for threads. So if a thread loses its processor
// on a busy machine, the others do its share. (OpenMP's loops end in a barrier that all threads
// must reach, and a decode step has a hundred such loops.)
#pragma once

#include <cstdint>

using Task = void (*)(void* context, int64_t index);

// Runs task(context, 0 .. count - 1) on at most `threads` threads; returns when all are done.
void run_tasks(int64_t count, int64_t threads, Task task, void* context);
