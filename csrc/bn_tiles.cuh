// How the rows of a unit of work are shared out between blocks and threads, and how a thread reads,
// keeps and writes its part of them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "machine.cuh"
#include "switchable_bn_act.h"

namespace rsfast {

// A block walks its rows in chunks, in which each thread has kRows rows, kRowLanes apart. Copies
// run kDepth chunks ahead.
template <int kThreadsPerBlock, int kRowsPerThread>
struct Tile {
  static constexpr int kThreads = kThreadsPerBlock;
  static constexpr int kRows = kRowsPerThread;
  static constexpr int kDepth = 2;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kRowLanes = kThreads / kLanes;
  static constexpr int kChunkRows = kRowLanes * kRows;
  static_assert(kThreads % kSlice == 0, "whole slices of threads merge the blocks of a unit");
};

// Shared memory of a block, before its ring, which it keeps aligned to its vectors.
template <typename Tile>
struct alignas(16) Scratch {
  float value[2][Tile::kWarps][kSlice];  // partial results, of warps and then of parts of the group
  float count[Tile::kWarps];             // rows behind them
  float origin[kSlice];                  // near the mean of each channel
  float column[3][kSlice];               // a few numbers of each channel, for all threads
  int is_last;                           // whether the block completes a slice
};

// The part of a unit that a block does.
struct Share {
  int level, slice;
  int rank, size;      // among the blocks of the unit that have rows
  int rows_per_block;  // of all but the last
  int count;           // rows of this block; 0 if there is nothing to do
  int64_t first_row;   // of this block
  int num_channels;    // of the slice
  int first_channel;   // of the slice
};

// Returns the share of a block.
template <typename Tile>
__device__ inline Share share_of(const Problem& problem, const Wave& wave, int block) {
  const Unit unit = unit_of(problem.schedule, wave, block);
  const int rows = problem.rows[unit.level];
  const int width = problem.schedule.slice_vectors * kVector;
  Share share;
  share.level = unit.level;
  share.slice = unit.slice;
  share.rank = block - unit.first_block;
  const int passes = ceil_div(ceil_div(rows, unit.num_blocks), Tile::kRowLanes);
  share.rows_per_block = passes * Tile::kRowLanes;
  share.size = ceil_div(rows, share.rows_per_block);
  const int64_t first = static_cast<int64_t>(share.rank) * share.rows_per_block;
  share.count =
      share.rank < share.size ? smaller(rows - static_cast<int>(first), share.rows_per_block) : 0;
  share.first_row = problem.first_row[unit.level] + first;
  share.first_channel = unit.slice * width;
  share.num_channels = smaller(problem.channels - share.first_channel, width);
  return share;
}

// A thread's place in its block's chunks.
template <typename Tile>
struct Place {
  int rows;  // of the block; 0 for a thread beyond the channels of the slice
  int row_lane;
  int channel;     // the first of its kVector
  int64_t offset;  // of that channel of the thread's first row, in elements of [M, C]
  int64_t stride;  // from one of its rows to the next

  __device__ Place(const Problem& problem, const Share& share) {
    const int lane = threadIdx.x % kLanes;
    row_lane = threadIdx.x / kLanes;
    rows = lane * kVector < share.num_channels ? share.count : 0;
    channel = share.first_channel + lane * kVector;
    offset = (share.first_row + row_lane) * problem.channels + channel;
    stride = static_cast<int64_t>(Tile::kRowLanes) * problem.channels;
  }

  // Returns how many rows the thread has in a chunk.
  __device__ int rows_in(int chunk) const {
    const int left = rows - chunk * Tile::kChunkRows - row_lane;
    return left <= 0 ? 0 : smaller(ceil_div(left, Tile::kRowLanes), Tile::kRows);
  }

  // Returns the offset of its first row in a chunk.
  __device__ int64_t offset_of(int chunk) const {
    return offset + static_cast<int64_t>(chunk) * Tile::kRows * stride;
  }
};

// The last chunks of a block in shared memory, of one or two tensors of 16-bit numbers. A thread
// reads only what it copied itself, so no barrier is needed, and a slot can be filled again as soon
// as the thread has read it: its loads come before its copies.
template <typename Tile, int kTensors>
class Ring {
 public:
  __device__ Ring(void* memory, int num_slots, const Place<Tile>& place,
                  const void* const (&sources)[kTensors])
      : own_(static_cast<uint4*>(memory) + threadIdx.x), num_slots_(num_slots), place_(place) {
    for (int tensor = 0; tensor < kTensors; ++tensor) {
      sources_[tensor] = static_cast<const uint16_t*>(sources[tensor]);
    }
  }

  // Returns where a row's vector is, of the chunk in a slot.
  __device__ uint4* at(int tensor, int slot, int row) const {
    return own_ + ((slot * kTensors + tensor) * Tile::kRows + row) * Tile::kThreads;
  }

  // Begins the copies of a walk.
  __device__ void start(int num_chunks) const {
    for (int chunk = 0; chunk < Tile::kDepth; ++chunk) load(chunk, chunk, chunk < num_chunks);
  }

  // Calls visit(chunk, slot) for every chunk from the first to the last; the last num_slots stay.
  template <typename Visit>
  __device__ void walk(int num_chunks, Visit visit) const {
    int slot = 0;
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
      wait_for_copies<Tile::kDepth - 1>();
      visit(chunk, slot);
      const int next = chunk + Tile::kDepth;
      load(next, wrapped(slot + Tile::kDepth), next < num_chunks);
      slot = wrapped(slot + 1);
    }
  }

  // After a walk, the same from the last chunk to the first: those that stayed are not loaded, the
  // others come from where they were read last and so may still be cached.
  template <typename Visit>
  __device__ void walk_back(int num_chunks, Visit visit) const {
    int slot = (num_chunks - 1) % num_slots_;
    for (int chunk = num_chunks - 1; chunk >= 0; --chunk) {
      wait_for_copies<Tile::kDepth - 1>();
      visit(chunk, slot);
      const int next = chunk - Tile::kDepth;
      load(next, wrapped(slot - Tile::kDepth), next >= 0 && next < num_chunks - num_slots_);
      slot = wrapped(slot - 1);
    }
  }

 private:
  // Begins to copy a chunk to a slot, if there is such a one; a group of copies in any case.
  __device__ void load(int chunk, int slot, bool exists) const {
    if (exists) {
      const int rows = place_.rows_in(chunk);
      int64_t offset = place_.offset_of(chunk);
#pragma unroll
      for (int row = 0; row < Tile::kRows; ++row, offset += place_.stride) {
        for (int tensor = 0; tensor < kTensors; ++tensor) {
          copy_async(at(tensor, slot, row), sources_[tensor] + offset, row < rows);
        }
      }
    }
    commit_copies();
  }

  // Returns the slot that is meant by a number beyond the ends by less than there are slots.
  __device__ int wrapped(int slot) const {
    if (slot >= num_slots_) return slot - num_slots_;
    return slot < 0 ? slot + num_slots_ : slot;
  }

  uint4* own_;
  int num_slots_;  // at least kDepth
  const Place<Tile>& place_;
  const uint16_t* sources_[kTensors];
};

// Pairs of 16-bit numbers as float32, and back, rounded to nearest even.
template <typename T>
struct Pairs;

template <>
struct Pairs<__half> {
  static __device__ float2 unpack(uint32_t bits) {
    return __half22float2(reinterpret_cast<const __half2&>(bits));
  }
  static __device__ uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
};

template <>
struct Pairs<__nv_bfloat16> {
  static __device__ float2 unpack(uint32_t bits) {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(bits));
  }
  static __device__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
};

// Returns the i-th number of a vector; i is known when compiling.
template <typename T>
__device__ inline float number(const uint4& vector, int i) {
  const uint32_t words[] = {vector.x, vector.y, vector.z, vector.w};
  const float2 pair = Pairs<T>::unpack(words[i / 2]);
  return i % 2 == 0 ? pair.x : pair.y;
}

// Fills `numbers` with those of a vector.
template <typename T>
__device__ inline void unpack(const uint4& vector, float (&numbers)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) numbers[i] = number<T>(vector, i);
}

// Returns the numbers as one vector.
template <typename T>
__device__ inline uint4 pack(const float (&numbers)[kVector]) {
  return {Pairs<T>::pack(numbers[0], numbers[1]), Pairs<T>::pack(numbers[2], numbers[3]),
          Pairs<T>::pack(numbers[4], numbers[5]), Pairs<T>::pack(numbers[6], numbers[7])};
}

// Returns the vector at `offset` elements of a [M, C] tensor of 16-bit numbers.
__device__ inline uint4 load_vector(const void* tensor, int64_t offset) {
  return *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(tensor) + offset);
}

__device__ inline void store_vector(void* tensor, int64_t offset, const uint4& vector) {
  *reinterpret_cast<uint4*>(static_cast<uint16_t*>(tensor) + offset) = vector;
}

// Returns 1 / deviation.
__device__ inline float invstd_of(float var, float eps) { return 1.0f / sqrtf(var + eps); }

// Returns whether the activation has a gradient at y, and applies it to y; NaN stays NaN.
template <Activation kActivation>
__device__ inline bool activate(float& y) {
  if (kActivation == Activation::kNone) return true;
  bool cut = y <= 0.0f;
  if (cut) y = 0.0f;
  if (kActivation == Activation::kRelu6 && y >= 6.0f) {
    y = 6.0f;
    cut = true;
  }
  return !cut;
}

}  // namespace rsfast
