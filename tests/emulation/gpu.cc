// longjmp() between fibers' stacks looks like a mistake to the checks.
#undef _FORTIFY_SOURCE
#include "emulation/gpu.h"

#include <ucontext.h>
#include <csetjmp>

#include <algorithm>
#include <deque>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

namespace fa::cuda {
// What kernels declare as extern __shared__.
alignas(1024) constinit thread_local unsigned char unaligned[emulated::kSharedBytes];
}  // namespace fa::cuda

namespace fa::emulated {

Index thread_index, block_index, block_size, grid_size;

namespace {

constexpr size_t kStackBytes = 128 << 10;

int64_t copies_so_far = 0;

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  std::jmp_buf at;
  bool started = false, done = false;
  bool (*ready)(void*) = nullptr;
  void* what = nullptr;
  std::vector<std::function<void()>> open;  // products of the group that is being made
  std::deque<std::vector<std::function<void()>>> groups;
  uint64_t num_groups = 0;
};

struct Warp {
  uint32_t values[2][kWarp];
  unsigned arrived = 0;
  uint64_t turn = 0;
};

struct NamedBarrier {
  unsigned arrived = 0;
  uint64_t turn = 0;
};

struct MemoryBarrier {
  int arrivals, pending;
  int64_t bytes = 0;
  int parity = 0;
};

uint64_t mixed(uint64_t x) {  // splitmix64's last step
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::unordered_map<int, NamedBarrier> named;
  std::unordered_map<uint32_t, MemoryBarrier> barriers;
  std::vector<std::function<void()>> copies;
  const std::function<void()>* body = nullptr;
  Fiber* current = nullptr;
  std::jmp_buf scheduler;
  ucontext_t first_return;
  std::string error;
  uint64_t seed = 0, draws = 0;

  bool draw(unsigned one_in) { return mixed(seed + 0x9E3779B97F4A7C15 * ++draws) % one_in == 0; }
};
Block* block = nullptr;

void leave() {
  if (_setjmp(block->current->at) == 0) _longjmp(block->scheduler, 1);
}

void run_fiber() {
  (*block->body)();
  block->current->done = true;
  leave();
}

void resume(Fiber& fiber) {
  block->current = &fiber;
  if (_setjmp(block->scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = fiber.stack.get();
  start.uc_stack.ss_size = kStackBytes;
  start.uc_link = nullptr;
  makecontext(&start, run_fiber, 0);
  setcontext(&start);
}

// Whether any thread of the warp could go on.
bool step(unsigned warp) {
  bool moved = false;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    Fiber& fiber = block->fibers[warp * kWarp + lane];
    if (fiber.done || (fiber.ready != nullptr && !fiber.ready(fiber.what))) continue;
    thread_index.x = warp * kWarp + lane;
    resume(fiber);
    if (!block->error.empty()) return true;
    moved = true;
  }
  return moved;
}

void copy_some(bool all) {
  for (size_t i = block->copies.size(); i-- > 0;) {
    if (!all && !block->draw(block->seed % 2 == 0 ? 3 : 50)) continue;
    const std::function<void()> copy = std::move(block->copies[i]);
    block->copies.erase(block->copies.begin() + static_cast<std::ptrdiff_t>(i));
    copy();
  }
}

std::string stuck() {
  std::string text = "these warps wait for ever:";
  for (size_t i = 0; i < block->fibers.size(); i += kWarp) {
    if (std::any_of(&block->fibers[i], &block->fibers[i] + kWarp,
                    [](const Fiber& fiber) { return !fiber.done; })) {
      text += " " + std::to_string(i / kWarp);
    }
  }
  return text;
}

std::string run_block() {
  const auto done = [](const Fiber& fiber) { return fiber.done; };
  while (!std::all_of(block->fibers.begin(), block->fibers.end(), done)) {
    bool moved = false, skipped = false;
    for (unsigned warp = 0; warp < block->warps.size(); ++warp) {
      if (block->draw(4)) {
        skipped = true;
      } else {
        moved |= step(warp);
      }
      if (!block->error.empty()) return block->error;
    }
    const bool copied = !block->copies.empty();
    copy_some(!moved && !skipped);
    if (!block->error.empty()) return block->error;
    if (!moved && !skipped && !copied) return stuck();
  }
  return "";
}

}  // namespace

unsigned char* shared_memory() { return cuda::unaligned; }

std::string run(unsigned blocks, unsigned threads, uint64_t seed,
                const std::function<void()>& body) {
  block_size.x = threads;
  grid_size.x = blocks;
  std::string error;
  for (block_index.x = 0; block_index.x < blocks && error.empty(); ++block_index.x) {
    Block it;
    it.fibers = std::vector<Fiber>(threads);
    it.warps = std::vector<Warp>(threads / kWarp);
    it.body = &body;
    it.seed = mixed(seed + block_index.x);
    block = &it;
    std::fill_n(shared_memory(), kSharedBytes, 0xFF);
    error = run_block();
  }
  block = nullptr;
  return error;
}

void wait_until(bool (*ready)(void*), void* what) {
  if (ready(what)) return;
  Fiber& fiber = *block->current;
  fiber.ready = ready;
  fiber.what = what;
  leave();
  fiber.ready = nullptr;
}

const uint32_t* exchange(uint32_t value) {
  Warp& warp = block->warps[thread_index.x / kWarp];
  const uint64_t turn = warp.turn;
  warp.values[turn % 2][thread_index.x % kWarp] = value;
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    ++warp.turn;
  } else {
    wait_until([&] { return warp.turn != turn; });
  }
  return warp.values[turn % 2];
}

void arrive(int id, unsigned threads) {
  NamedBarrier& barrier = block->named[id];
  if (++barrier.arrived < threads) return;
  barrier.arrived = 0;
  ++barrier.turn;
}

void sync(int id, unsigned threads) {
  NamedBarrier& barrier = block->named[id];
  const uint64_t turn = barrier.turn;
  arrive(id, threads);
  wait_until([&] { return barrier.turn != turn; });
}

void fail(const std::string& why) {
  block->error = why;
  leave();
}

void copy_later(std::function<void()> copy) {
  ++copies_so_far;
  block->copies.push_back(std::move(copy));
}
int64_t num_copies() { return copies_so_far; }

void multiply(std::function<void()> product) { block->current->open.push_back(std::move(product)); }

void end_group() {
  Fiber& fiber = *block->current;
  fiber.groups.push_back(std::exchange(fiber.open, {}));
  // As all threads of the warpgroup draw.
  const uint64_t warpgroup = thread_index.x / (4 * kWarp);
  const bool at_once = mixed(block->seed ^ (warpgroup << 32 | ++fiber.num_groups)) % 2 == 0;
  if (at_once) wait_for_groups(0);
}

void wait_for_groups(size_t pending) {
  Fiber& fiber = *block->current;
  // Others go on meanwhile: for long, of some warpgroups, as all their threads draw.
  const uint64_t warpgroup = thread_index.x / (4 * kWarp);
  const bool is_long = mixed(~block->seed ^ (warpgroup << 32 | fiber.num_groups)) % 8 == 0;
  for (int rounds = is_long ? 200 : 1; rounds > 0; --rounds) leave();
  while (fiber.groups.size() > pending) {
    for (const auto& product : fiber.groups.front()) product();
    fiber.groups.pop_front();
  }
  exchange(0);  // the instruction is one of the whole warp
}

void make_barrier(uint32_t address, int arrivals) {
  if (!block->barriers.try_emplace(address, MemoryBarrier{arrivals, arrivals}).second) {
    fail("a barrier is made twice");
  }
}

namespace {

MemoryBarrier& barrier_at(uint32_t address) {
  const auto found = block->barriers.find(address);
  if (found == block->barriers.end()) fail("a barrier is used before it is made");
  return found->second;
}

void end_phase_if_complete(MemoryBarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.arrivals;
  barrier.parity ^= 1;
}

}  // namespace

void arrive_at(uint32_t address, int64_t expected_bytes) {
  MemoryBarrier& barrier = barrier_at(address);
  if (barrier.pending == 0) fail("a barrier gets more arrivals than it counts");
  barrier.bytes += expected_bytes;
  --barrier.pending;
  end_phase_if_complete(barrier);
}

void bytes_came(uint32_t address, int64_t bytes) {
  MemoryBarrier& barrier = block->barriers.at(address);
  barrier.bytes -= bytes;
  end_phase_if_complete(barrier);
}

bool has_ended(uint32_t address, int parity) { return barrier_at(address).parity != parity; }

}  // namespace fa::emulated
