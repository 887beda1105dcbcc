// A preadv that is no faster than a disk of a given rate; see paced_disk.py.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

static std::atomic<double> own{0}, rate{0};
static std::atomic<double>* free_at = &own;  // when the disk has nothing more to do

static double now() {  // Python's perf_counter
    auto since = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration<double>(since).count();
}

extern "C" {

// Shares the disk with all processes that name this file.
int paced_share(const char* path) {
    int file = open(path, O_RDWR | O_CREAT, 0600);
    if (file < 0 || ftruncate(file, sizeof(double))) return -1;
    void* memory = mmap(nullptr, sizeof(double), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory == MAP_FAILED) return -1;
    free_at = static_cast<std::atomic<double>*>(memory);
    return 0;
}

// Bytes a second; 0 = as fast as the disk is.
void paced_rate(double bytes_per_s) { rate = bytes_per_s; }

// Takes the disk for some bytes; returns when it has read them.
double paced_take(double num_bytes) {
    double known = free_at->load(), bytes_per_s = rate, ends;
    if (bytes_per_s <= 0) return 0;
    do ends = std::max(known, now()) + num_bytes / bytes_per_s;
    while (!free_at->compare_exchange_weak(known, ends));
    return ends;
}

ssize_t paced_preadv(int file, const iovec* pieces, int count, off_t start) {
    double num_bytes = 0;
    for (int n = 0; n < count; n++) num_bytes += pieces[n].iov_len;
    double ends = paced_take(num_bytes);
    ssize_t found = preadv(file, pieces, count, start);
    double left = ends - now();
    if (left > 0) std::this_thread::sleep_for(std::chrono::duration<double>(left));
    return found;
}

}  // extern "C"
