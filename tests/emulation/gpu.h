// The threads of a GPU's blocks as fibers of one thread of the CPU, for tests of device code.
//
// What runs when is drawn at random: which warps go on, when the copy engine copies, and whether a
// warpgroup's products happen when they are started or when they are waited for.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace fa::emulated {

struct Index {
  unsigned x;
};
extern Index thread_index, block_index, block_size, grid_size;

inline constexpr unsigned kWarp = 32;
inline constexpr uint32_t kSharedBytes = 227 << 10;
// Where the launch's own shared memory lies in the shared window; 18 bits tell a place in it.
inline constexpr uint32_t kSharedStart = 1024;

// The launch's shared memory, which holds NaN at each block's start.
unsigned char* shared_memory();

// `body` by each thread of each block, one block after another. What went wrong, or "": all threads
// wait and nothing will wake them, or a barrier is made twice, not at all, or gets more arrivals
// than it counts.
std::string run(unsigned blocks, unsigned threads, uint64_t seed,
                const std::function<void()>& body);

// ---- Of the calling thread. ----

// What went wrong: the launch ends.
void fail(const std::string& why);

void wait_until(bool (*ready)(void*), void* what);
template <class Ready>
void wait_until(Ready ready) {
  wait_until([](void* it) { return (*static_cast<Ready*>(it))(); }, &ready);
}

// What each lane of the warp has given. All lanes call it; the answer holds until the next but one.
const uint32_t* exchange(uint32_t value);

// Named barriers of so many threads; 0 is __syncthreads()'s.
void sync(int id, unsigned threads);
void arrive(int id, unsigned threads);

// The copy engine does it some time later.
void copy_later(std::function<void()> copy);
// How many of them there have been in all.
int64_t num_copies();

// Products are done at some time between their group's end and a wait for it.
void multiply(std::function<void()> product);
void end_group();
void wait_for_groups(size_t pending);

// ---- Barriers in shared memory. ----

void make_barrier(uint32_t address, int arrivals);
void arrive_at(uint32_t address, int64_t expected_bytes);
void bytes_came(uint32_t address, int64_t bytes);
bool has_ended(uint32_t address, int parity);

}  // namespace fa::emulated
