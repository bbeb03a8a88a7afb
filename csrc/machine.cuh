// What the kernels ask of the machine beyond CUDA C++: asynchronous copies, and counters in global
// memory by which blocks wait for each other. tests/csrc/emulated_gpu.h has the same functions for
// kernels that run on a CPU.
#pragma once

#ifdef RSFAST_EMULATED_GPU
#include "emulated_gpu.h"
#else

#include <cuda_runtime.h>

namespace rsfast {

// Returns the block's dynamic shared memory.
__device__ inline void* shared_memory() {
  extern __shared__ uint4 rsfast_shared_memory[];
  return rsfast_shared_memory;
}

// Begins to copy 16 bytes from global to shared memory, both aligned to 16; zeros if they are not
// there to be read.
__device__ inline void copy_async(uint4* shared, const void* global, bool is_there) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = is_there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
               "r"(bytes)
               : "memory");
}

// Closes a group of this thread's copies, possibly of none.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups of this thread's copies but the last kPending.
template <int kPending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Returns the counter's value before one is added. What this thread wrote, or saw written, before
// is there for whoever sees the addition; what others wrote before theirs is there for this thread.
__device__ inline int count_up(int* counter) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
}

// Waits until a counter has come to `value`; everything written before those additions is there.
__device__ inline void wait_for_count(const int* counter, int value) {
  int count;
  while (true) {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
    if (count >= value) return;
    __nanosleep(20);
  }
}

}  // namespace rsfast

#endif
