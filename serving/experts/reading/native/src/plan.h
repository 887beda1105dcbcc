// Where the bytes of an expert are in files, and reading them straight into a slot.
#pragma once

#include <sys/uio.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "xxh3.h"

using ReadAt = ssize_t (*)(int file, const iovec* pieces, int count, off_t start);

// What reads. Tests and measurements put slower and faulty disks here.
inline std::atomic<ReadAt> read_at{[](int file, const iovec* pieces, int count, off_t start) {
    return ::preadv(file, pieces, count, start);
}};

constexpr int64_t PAGE = 4096;   // direct I/O wants offsets to be a multiple of this
constexpr int64_t SECTOR = 512;  // ... and addresses and lengths in memory a multiple of this

struct Segment {  // bytes that go into a part of a slot
    int64_t part, start, length;
};

struct Chunk {  // consecutive bytes of a file, read with one call
    int64_t file, direct;  // descriptors; direct is -1 for reads through the page cache
    int64_t start, first_segment, num_segments;
};

struct Plan {
    std::vector<Chunk> chunks;
    std::vector<Segment> segments;  // in the order of the disk
    int64_t num_bytes;
    uint64_t digest;  // what their hash must be
};

// Memory of a thread for direct reads that cannot go straight into a slot.
struct Pages {
    struct Free {
        void operator()(void* memory) const { std::free(memory); }
    };
    std::unique_ptr<void, Free> memory;
    int64_t size = 0;

    char* of_size(int64_t wanted) {
        if (wanted > size) {
            memory.reset(std::aligned_alloc(PAGE, wanted));
            size = memory ? wanted : 0;
        }
        return static_cast<char*>(memory.get());
    }
};

inline std::vector<iovec> pieces_of(const Plan& plan, int64_t first, int64_t count,
                                    const uint64_t* parts) {
    std::vector<iovec> pieces(count);
    for (int64_t n = 0; n < count; n++) {
        const Segment& segment = plan.segments[first + n];
        pieces[n] = {reinterpret_cast<char*>(parts[segment.part]) + segment.start,
                     size_t(segment.length)};
    }
    return pieces;
}

// Reads the pages around some bytes and copies the bytes; returns `total`, or 0 if it could not.
inline int64_t read_by_pages(const Chunk& chunk, const std::vector<iovec>& pieces, int64_t total) {
    static thread_local Pages pages;
    int64_t skip = chunk.start % PAGE, size = (skip + total + PAGE - 1) / PAGE * PAGE;
    char* memory = pages.of_size(size);
    if (!memory) return 0;
    iovec whole = {memory, size_t(size)};
    if (read_at.load()(chunk.direct, &whole, 1, chunk.start - skip) < skip + total) return 0;
    for (const iovec& piece : pieces) {
        std::memcpy(piece.iov_base, memory + skip, piece.iov_len);
        skip += piece.iov_len;
    }
    return total;
}

// Returns how many bytes one call around the page cache has brought.
inline int64_t read_around_cache(const Chunk& chunk, const std::vector<iovec>& pieces,
                                 int64_t total) {
    bool is_straight = chunk.start % PAGE == 0;
    for (const iovec& piece : pieces)
        is_straight &= (reinterpret_cast<uintptr_t>(piece.iov_base) | piece.iov_len) % SECTOR == 0;
    if (!is_straight) return read_by_pages(chunk, pieces, total);
    ssize_t count = read_at.load()(chunk.direct, pieces.data(), pieces.size(), chunk.start);
    return count > 0 ? count : 0;  // what is left is read through the cache, errors show there
}

// Fills what a chunk has of a slot; false if it could not.
inline bool read_chunk(const Plan& plan, int64_t index, const uint64_t* parts) {
    const Chunk& chunk = plan.chunks[index];
    auto pieces = pieces_of(plan, chunk.first_segment, chunk.num_segments, parts);
    int64_t total = 0;
    for (const iovec& piece : pieces) total += piece.iov_len;
    int64_t done = chunk.direct < 0 ? 0 : read_around_cache(chunk, pieces, total);
    for (size_t next = 0; done < total;) {
        int64_t before = 0;
        for (next = 0; before + int64_t(pieces[next].iov_len) <= done; next++)
            before += pieces[next].iov_len;
        iovec whole = pieces[next];
        pieces[next].iov_base = static_cast<char*>(whole.iov_base) + (done - before);
        pieces[next].iov_len = whole.iov_len - (done - before);
        ssize_t count = read_at.load()(chunk.file, &pieces[next], pieces.size() - next,
                                       chunk.start + done);
        pieces[next] = whole;
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return false;
        done += count;
    }
    return true;
}

inline bool is_whole(const Plan& plan, const uint64_t* parts) {
    auto pieces = pieces_of(plan, 0, plan.segments.size(), parts);
    return xxh3::hash(pieces.data(), pieces.size(), plan.num_bytes) == plan.digest;
}
