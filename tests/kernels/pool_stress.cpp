// Runs jobs of random sizes for some seconds and counts tasks that did not run exactly once.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "pool.h"

struct Job {
    std::atomic<int> runs[64];
};

int main(int, char** arguments) {
    std::mt19937 random(1);
    auto end = std::chrono::steady_clock::now() + std::chrono::seconds(std::atoi(arguments[1]));
    long jobs = 0, wrong = 0;
    static Job job[2];  // in turns, so that a stale task shows in the job that is counted
    for (; std::chrono::steady_clock::now() < end; jobs++) {
        int count = 2 + int(random() % 60);
        Job& now = job[jobs % 2];
        for (auto& runs : now.runs) runs.store(0);
        run_tasks(count, 2, [](void* c, int64_t i) { static_cast<Job*>(c)->runs[i]++; }, &now);
        for (int i = 0; i < 64; i++) wrong += now.runs[i].load() != (i < count ? 1 : 0);
    }
    std::printf("%ld jobs, %ld tasks not run exactly once\n", jobs, wrong);
    return wrong != 0;
}
