// Partial results of channels, merged over the threads of a block and the blocks of a unit in an
// order that never changes: sums come out alike from run to run.
#pragma once

#include "bn_tiles.cuh"

namespace rsfast {

// A partial result of one channel: two numbers, and the rows behind them.
struct Partial {
  float count = 0.0f;
  float value[2] = {0.0f, 0.0f};
};

// value: mean, and sum of squared deviations from it (Chan, Golub and LeVeque 1983).
struct Moments {
  static __device__ void merge(Partial& into, const Partial& other) {
    const float total = into.count + other.count;
    const float share = other.count / fmaxf(total, 1.0f);
    const float delta = other.value[0] - into.value[0];
    into.value[0] += delta * share;
    into.value[1] += other.value[1] + delta * delta * (into.count * share);
    into.count = total;
  }
};

// value: two sums.
struct Sums {
  static __device__ void merge(Partial& into, const Partial& other) {
    into.value[0] += other.value[0];
    into.value[1] += other.value[1];
  }
};

// Returns, in thread c < kSlice, the first `num_rows` rows of the scratch memory merged for channel
// c of the slice.
template <typename Merge, typename Tile>
__device__ inline Partial merge_scratch(const Scratch<Tile>& scratch, int num_rows) {
  Partial total;
  const int c = threadIdx.x;
  if (c >= kSlice) return total;
  for (int row = 0; row < num_rows; ++row) {
    const Partial part{scratch.count[row], {scratch.value[0][row][c], scratch.value[1][row][c]}};
    Merge::merge(total, part);
  }
  return total;
}

// Returns, in thread c < kSlice, the results of all threads merged for channel c of the slice. Each
// thread brings those of its kVector channels, for all of which it has seen `count` rows.
template <typename Merge, typename Tile>
__device__ inline Partial reduce_over_block(float count, float (&value)[2][kVector],
                                            Scratch<Tile>& scratch) {
  constexpr unsigned kAll = 0xffffffffu;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int distance = kLanes; distance < 32; distance *= 2) {
    const float other_count = __shfl_xor_sync(kAll, count, distance);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      Partial own{count, {value[0][i], value[1][i]}};
      const Partial other{other_count,
                          {__shfl_xor_sync(kAll, value[0][i], distance),
                           __shfl_xor_sync(kAll, value[1][i], distance)}};
      Merge::merge(own, other);
      value[0][i] = own.value[0];
      value[1][i] = own.value[1];
    }
    count += other_count;
  }
  if (lane < kLanes) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      scratch.value[0][warp][lane * kVector + i] = value[0][i];
      scratch.value[1][warp][lane * kVector + i] = value[1][i];
    }
  }
  if (lane == 0) scratch.count[warp] = count;  // the slice has a channel there in any case
  __syncthreads();
  return merge_scratch<Merge>(scratch, Tile::kWarps);
}

// Returns, in thread c < kSlice, the results of all blocks of the unit merged, of which `own` is
// this block's. `turn` numbers the waves.
template <typename Merge, typename Tile>
__device__ inline Partial reduce_over_group(const Problem& problem, const Share& share, int turn,
                                            const Partial& own, Scratch<Tile>& scratch) {
  if (share.size == 1) return own;
  constexpr int kBlockStride = 2 * kSlice;
  const int c = threadIdx.x % kSlice, part = threadIdx.x / kSlice;
  const int64_t first_block = static_cast<int64_t>(turn) * gridDim.x + blockIdx.x - share.rank;
  float* partials = problem.partials + first_block * kBlockStride + c;
  if (part == 0) {
    partials[share.rank * kBlockStride] = own.value[0];
    partials[share.rank * kBlockStride + kSlice] = own.value[1];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int* counter = problem.counters + share.level * problem.schedule.num_slices + share.slice;
    count_up(counter);
    wait_for_count(counter, share.size);
  }
  __syncthreads();
  constexpr int kParts = Tile::kThreads / kSlice;
  Partial total;
  for (int rank = part; rank < share.size; rank += kParts) {
    const int left = problem.rows[share.level] - rank * share.rows_per_block;
    Partial other{static_cast<float>(smaller(left, share.rows_per_block)), {}};
    other.value[0] = __ldcg(partials + rank * kBlockStride);
    other.value[1] = __ldcg(partials + rank * kBlockStride + kSlice);
    Merge::merge(total, other);
  }
  scratch.value[0][part][c] = total.value[0];
  scratch.value[1][part][c] = total.value[1];
  if (c == 0) scratch.count[part] = total.count;
  __syncthreads();
  return merge_scratch<Merge>(scratch, kParts);
}

// Returns, in every thread, whether all levels of the slice are done with this one; what their
// blocks wrote before the barriers that came before their calls is there then. One block of each
// unit calls it.
template <typename Tile>
__device__ inline bool completes_slice(const Problem& problem, int slice, Scratch<Tile>& scratch) {
  if (threadIdx.x == 0) {
    int* counters = problem.counters + problem.num_levels * problem.schedule.num_slices;
    scratch.is_last = count_up(counters + slice) == problem.num_levels - 1;
  }
  __syncthreads();
  return scratch.is_last;
}

}  // namespace rsfast
