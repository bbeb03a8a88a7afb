// Runs CUDA kernels on one CPU thread: what csrc/machine.cuh and CUDA C++ offer a kernel, for g++.
//
// Every thread of every block of the grid is a fiber. A fiber runs until it has to wait for others:
// at a barrier, at a shuffle, at a counter in global memory. Who is next is fixed, or drawn with a
// seed: a missing barrier then lets threads see what others have not written yet. Asynchronous
// copies happen as late as they may, at the wait, and until then their destination is full of NaN.
// If all fibers wait, that is reported as a deadlock.
//
// It shows nothing of weak memory order or of speed; that is for compute-sanitizer and a GPU.
#pragma once

#include <vector_types.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#undef __launch_bounds__
#define __launch_bounds__(...)

extern uint3 threadIdx, blockIdx;
extern dim3 gridDim;

void __syncthreads();
float __shfl_xor_sync(unsigned mask, float value, int distance);
inline float __ldcg(const float* pointer) { return *pointer; }

namespace rsfast {

void* shared_memory();
void copy_async(uint4* shared, const void* global, bool is_there);
void commit_copies();
void wait_for_copies_but(int pending);
template <int kPending>
void wait_for_copies() {
  wait_for_copies_but(kPending);
}
int count_up(int* counter);
void wait_for_count(const int* counter, int value);

struct Launch {
  int num_blocks, num_threads, shared_bytes;
  unsigned seed;     // of the order of fibers; 0 for a fixed order
  int skip_barrier;  // number of the __syncthreads that each thread leaves out, or -1
};

// Runs `kernel` in every thread of the grid. Returns what went wrong, or nothing.
std::string run(const Launch& launch, const std::function<void()>& kernel);

}  // namespace rsfast
