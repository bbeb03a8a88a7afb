#include "emulated_gpu.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <random>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 gridDim;

namespace rsfast {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr int kWarp = 32;
constexpr int kCanaryBytes = 256;
constexpr unsigned char kPoison = 0xff;  // NaN in every floating-point type

struct Copy {
  uint4* shared;
  const void* global;  // null for zeros
};

// Threads that wait for each other, a warp or a block.
struct Barrier {
  int size = 0, arrived = 0, generation = 0;
};

struct Warp {
  Barrier barrier;
  float values[kWarp];
};

struct Block {
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
};

enum class State { kNew, kReady, kBarrier, kCounter, kDone };

struct Fiber {
  State state = State::kNew;
  ucontext_t start;
  jmp_buf resume;
  uint3 thread, block;
  const Barrier* barrier = nullptr;  // that it waits for, since this generation
  int generation = 0;
  const int* counter = nullptr;  // that it waits for, to come to this value
  int value = 0;
  int num_barriers = 0;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

Launch launch;
std::vector<Block> blocks;
std::vector<std::unique_ptr<Fiber>> fibers;
Fiber* current = nullptr;
const std::function<void()>* body = nullptr;
jmp_buf scheduler;

// Hands over to the scheduler until this fiber may go on.
void yield(State state) {
  current->state = state;
  if (_setjmp(current->resume) == 0) _longjmp(scheduler, 1);
}

void enter() {
  (*body)();
  current->state = State::kDone;
  _longjmp(scheduler, 1);
}

bool can_run(const Fiber& fiber) {
  switch (fiber.state) {
    case State::kBarrier: return fiber.barrier->generation != fiber.generation;
    case State::kCounter: return *fiber.counter >= fiber.value;
    case State::kDone: return false;
    default: return true;
  }
}

// Runs a fiber until it waits or ends.
void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.thread;
  blockIdx = fiber.block;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.state == State::kNew) setcontext(&fiber.start);
  _longjmp(fiber.resume, 1);
}

void wait_at(Barrier& barrier) {
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  current->barrier = &barrier;
  current->generation = barrier.generation;
  yield(State::kBarrier);
}

void set_up(char* stacks) {
  blocks.assign(launch.num_blocks, {});
  fibers.clear();
  gridDim = dim3(launch.num_blocks);
  for (Block& block : blocks) {
    block.barrier.size = launch.num_threads;
    block.warps.resize(launch.num_threads / kWarp);
    for (Warp& warp : block.warps) warp.barrier.size = kWarp;
    block.shared.assign(launch.shared_bytes + kCanaryBytes, kPoison);
  }
  for (int index = 0; index < launch.num_blocks * launch.num_threads; ++index) {
    fibers.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *fibers.back();
    fiber.thread = {static_cast<unsigned>(index % launch.num_threads), 0, 0};
    fiber.block = {static_cast<unsigned>(index / launch.num_threads), 0, 0};
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stacks + index * kStackBytes;
    fiber.start.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.start, enter, 0);
  }
}

// Returns what keeps the fibers from ending, or nothing.
std::string run_all() {
  std::vector<Fiber*> order;
  for (const auto& fiber : fibers) order.push_back(fiber.get());
  std::mt19937 random(launch.seed);
  while (!order.empty()) {
    if (launch.seed != 0) std::shuffle(order.begin(), order.end(), random);
    bool someone_can = false;
    for (Fiber* fiber : order) {
      if (!can_run(*fiber)) continue;
      someone_can = true;
      if (launch.seed == 0 || random() % 2 == 0) resume(*fiber);  // else it lags behind
    }
    const auto is_done = [](const Fiber* fiber) { return fiber->state == State::kDone; };
    order.erase(std::remove_if(order.begin(), order.end(), is_done), order.end());
    if (someone_can) continue;
    const auto count = [&](State state) {
      return std::to_string(std::count_if(
          order.begin(), order.end(), [&](const Fiber* fiber) { return fiber->state == state; }));
    };
    return "deadlock: " + count(State::kBarrier) + " threads wait at a barrier, " +
           count(State::kCounter) + " for a counter";
  }
  return {};
}

// Returns whether a block has written beyond its shared memory.
bool wrote_beyond(const Block& block) {
  return std::any_of(block.shared.end() - kCanaryBytes, block.shared.end(),
                     [](unsigned char byte) { return byte != kPoison; });
}

}  // namespace

void* shared_memory() { return blocks[blockIdx.x].shared.data(); }

void copy_async(uint4* shared, const void* global, bool is_there) {
  std::memset(shared, kPoison, sizeof(uint4));
  current->open.push_back({shared, is_there ? global : nullptr});
}

void commit_copies() {
  current->groups.push_back(std::move(current->open));
  current->open.clear();
}

void wait_for_copies_but(int pending) {
  while (static_cast<int>(current->groups.size()) > pending) {
    for (const Copy& copy : current->groups.front()) {
      if (copy.global != nullptr) {
        std::memcpy(copy.shared, copy.global, sizeof(uint4));
      } else {
        std::memset(copy.shared, 0, sizeof(uint4));
      }
    }
    current->groups.pop_front();
  }
}

int count_up(int* counter) { return (*counter)++; }

void wait_for_count(const int* counter, int value) {
  current->counter = counter;
  current->value = value;
  yield(State::kCounter);
}

std::string run(const Launch& settings, const std::function<void()>& kernel) {
  launch = settings;
  body = &kernel;
  const size_t bytes = kStackBytes * launch.num_blocks * launch.num_threads;
  void* stacks = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) return "no memory for the stacks of the threads";
  set_up(static_cast<char*>(stacks));
  std::string error = run_all();
  if (error.empty() && std::any_of(blocks.begin(), blocks.end(), wrote_beyond)) {
    error = "a block wrote beyond its shared memory";
  }
  fibers.clear();
  blocks.clear();
  munmap(stacks, bytes);
  return error;
}

}  // namespace rsfast

void __syncthreads() {
  using namespace rsfast;
  if (current->num_barriers++ == launch.skip_barrier) return;
  wait_at(blocks[blockIdx.x].barrier);
}

float __shfl_xor_sync(unsigned, float value, int distance) {
  using namespace rsfast;
  Warp& warp = blocks[blockIdx.x].warps[threadIdx.x / kWarp];
  const int lane = threadIdx.x % kWarp;
  warp.values[lane] = value;
  wait_at(warp.barrier);
  const float other = warp.values[lane ^ distance];
  wait_at(warp.barrier);
  return other;
}
