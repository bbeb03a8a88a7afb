// Arguments and launchers of switchable batch norm, residual add and activation, in training.
// kernels/switchable_bn_act.py has the equations. M rows of C channels, C a multiple of 8, L levels
// of rows one after another, B sets of parameters.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "schedule.h"

namespace rsfast {

enum class Activation { kNone, kRelu, kRelu6 };

// What lets the gradient before the activation through: everything, the range of an activation
// that is computed again from x, or the bits that the forward kernel left.
enum class Gate { kOpen, kRelu, kRelu6, kMask };

struct Problem {
  int num_levels;
  int rows[kMaxLevels];
  int banks[kMaxLevels];
  int64_t first_row[kMaxLevels];
  int channels;
  int num_banks;
  float eps;
  Schedule schedule;
  int ring_slots;   // chunks that a block keeps in shared memory
  float* partials;  // [waves, blocks, 2, kSlice] scratch
  int* counters;    // [L * slices + slices] zeros: blocks of a unit, then levels of a slice, done
};

struct ForwardArguments {
  Problem problem;
  const void* x;         // [M, C] float16 or bfloat16
  const void* residual;  // like x, or null
  const float* weight;   // [B, C]
  const float* bias;     // [B, C]
  void* y;               // like x, fully overwritten
  uint8_t* mask;         // [M, C / 8] bits, where y has a gradient, fully overwritten; or null,
                         // and always without a residual or an activation
  float* mean;           // [L, C] fully overwritten
  float* var;            // [L, C] biased, fully overwritten
  float* running_mean;   // [B, C] moved towards mean
  float* running_var;    // [B, C] moved towards the unbiased variance
  int64_t* num_batches;  // [B] one added per level
  float momentum;
};

struct BackwardArguments {
  Problem problem;
  const void* dy;       // [M, C] float16 or bfloat16
  const void* x;        // like dy
  const uint8_t* mask;  // [M, C / 8], for Gate::kMask
  const float* weight;  // [B, C]
  const float* bias;    // [B, C]
  const float* mean;    // [L, C]
  const float* var;     // [L, C] biased
  float* sums;          // [2, L, C] scratch: dbias and dweight of each level
  void* dx;             // like x, fully overwritten
  void* dresidual;      // like x, fully overwritten, for Gate::kMask
  float* dweight;       // [B, C] fully overwritten
  float* dbias;         // [B, C] fully overwritten
};

// What a launch will need, known before the scratch memory is there.
struct Plan {
  Schedule schedule;
  int ring_slots;
  int num_waves;
};

// Fills `plan` for rows[num_levels] on the current device, for the forward or the backward kernel.
cudaError_t make_plan(const int* rows, int num_levels, int channels, bool backward, Plan* plan);

// Each is one cooperative launch on `stream`, of float16 rows or else bfloat16 ones.
cudaError_t launch_forward(const ForwardArguments& arguments, Activation activation, bool is_half,
                           cudaStream_t stream);
cudaError_t launch_backward(const BackwardArguments& arguments, Gate gate, bool is_half,
                            cudaStream_t stream);

}  // namespace rsfast
