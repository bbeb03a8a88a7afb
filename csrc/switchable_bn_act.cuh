// Forward and backward kernels of training batch norm per level, residual add and activation.
//
// Each is one cooperative launch over all levels. The blocks of a unit (schedule.h) read their rows
// once for the statistics or sums, keep the last of them in shared memory, meet, and go through
// their rows again from the last to the first, of which they load what they could not keep. What
// belongs to all levels of a slice is left to the block that completes the slice.
#pragma once

#include "bn_tiles.cuh"
#include "group_reduce.cuh"

namespace rsfast {

// Sets `origin` to values near the level's means: the medians of its first, middle and last row.
template <typename T>
__device__ inline void load_origin(const void* x, const Problem& problem, int level, int channel,
                                   float (&origin)[kVector]) {
  const int rows = problem.rows[level];
  const int64_t first = problem.first_row[level] * problem.channels + channel;
  const int64_t stride = problem.channels;
  float middle[kVector], last[kVector];
  unpack<T>(load_vector(x, first), origin);
  unpack<T>(load_vector(x, first + rows / 2 * stride), middle);
  unpack<T>(load_vector(x, first + (rows - 1) * stride), last);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const float low = fminf(origin[i], middle[i]), high = fmaxf(origin[i], middle[i]);
    origin[i] = fmaxf(low, fminf(high, last[i]));
  }
}

// Adds kRows rows, less the origin, to the moments of a thread's rows before: their own mean and
// squared deviations first, which are then merged. No square is subtracted from another.
template <typename T, int kRows>
__device__ inline void add_rows(const uint4 (&vectors)[kRows], const float (&origin)[kVector],
                                float& count, float (&moments)[2][kVector]) {
  const float total = count + kRows;
  const float share = kRows / total;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    float values[kRows], sum = 0.0f, m2 = 0.0f;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      values[row] = number<T>(vectors[row], i) - origin[i];
      sum += values[row];
    }
    const float mean = sum * (1.0f / kRows);
#pragma unroll
    for (int row = 0; row < kRows; ++row) m2 += (values[row] - mean) * (values[row] - mean);
    const float delta = mean - moments[0][i];
    moments[0][i] += delta * share;
    moments[1][i] += m2 + delta * delta * (count * share);
  }
  count = total;
}

// Adds a thread's rows of a chunk to its moments.
template <typename T, typename Tile>
__device__ inline void add_chunk(const Ring<Tile, 1>& ring, int slot, int rows,
                                 const float (&origin)[kVector], float& count,
                                 float (&moments)[2][kVector]) {
  if (rows == Tile::kRows) {
    uint4 vectors[Tile::kRows];
#pragma unroll
    for (int row = 0; row < Tile::kRows; ++row) vectors[row] = *ring.at(0, slot, row);
    add_rows<T>(vectors, origin, count, moments);
  } else {
    for (int row = 0; row < rows; ++row) {
      const uint4 vectors[] = {*ring.at(0, slot, row)};
      add_rows<T>(vectors, origin, count, moments);
    }
  }
}

// Moves the running statistics of a slice towards those of its levels, in level order. Thread c <
// kSlice does channel c.
__device__ inline void move_running_statistics(const ForwardArguments& arguments,
                                               const Share& share) {
  const Problem& problem = arguments.problem;
  const int c = threadIdx.x;
  const float momentum = arguments.momentum;
  for (int level = 0; level < problem.num_levels && c < share.num_channels; ++level) {
    const int64_t from = static_cast<int64_t>(level) * problem.channels + share.first_channel + c;
    const int64_t to = from + static_cast<int64_t>(problem.banks[level] - level) * problem.channels;
    const float rows = problem.rows[level];
    // A single row has no unbiased variance: it counts as 0, which its biased one is.
    const float unbiased = __ldcg(arguments.var + from) * (rows / fmaxf(rows - 1.0f, 1.0f));
    const float mean = __ldcg(arguments.mean + from);
    const float keep = 1.0f - momentum;
    arguments.running_mean[to] = keep * arguments.running_mean[to] + momentum * mean;
    arguments.running_var[to] = keep * arguments.running_var[to] + momentum * unbiased;
    if (share.slice == 0 && c == 0) arguments.num_batches[problem.banks[level]] += 1;
  }
}

// Turns the moments of channel c of a unit into what its rows are multiplied by and shifted by, in
// scratch.column: mean, weight / deviation and bias.
template <typename Tile>
__device__ inline void finish_channel(const ForwardArguments& arguments, const Share& share, int c,
                                      const Partial& moments, Scratch<Tile>& scratch) {
  const Problem& problem = arguments.problem;
  const int channel = share.first_channel + c;
  const int64_t of_level = static_cast<int64_t>(share.level) * problem.channels + channel;
  const int64_t of_bank =
      static_cast<int64_t>(problem.banks[share.level]) * problem.channels + channel;
  const float mean = scratch.origin[c] + moments.value[0];
  const float var = moments.value[1] / problem.rows[share.level];
  scratch.column[0][c] = mean;
  scratch.column[1][c] = arguments.weight[of_bank] * invstd_of(var, problem.eps);
  scratch.column[2][c] = arguments.bias[of_bank];
  if (share.rank == 0) {
    arguments.mean[of_level] = mean;
    arguments.var[of_level] = var;
  }
}

// Fills the rows in y and in the mask of the chunk in a slot.
template <typename T, Activation kActivation, bool kResidual, typename Tile>
__device__ inline void write_chunk(const ForwardArguments& arguments, const Place<Tile>& place,
                                   const Ring<Tile, 1>& ring, int chunk, int slot,
                                   const float (&column)[3][kVector]) {
  constexpr bool kMask = kResidual && kActivation != Activation::kNone;
  const int rows = place.rows_in(chunk);
  int64_t offset = place.offset_of(chunk);
  [[maybe_unused]] uint4 residual[Tile::kRows];
  if (kResidual) {
#pragma unroll
    for (int row = 0; row < Tile::kRows; ++row) {
      if (row < rows) residual[row] = load_vector(arguments.residual, offset + row * place.stride);
    }
  }
#pragma unroll
  for (int row = 0; row < Tile::kRows; ++row, offset += place.stride) {
    if (row >= rows) break;
    float values[kVector], added[kVector];
    unpack<T>(*ring.at(0, slot, row), values);
    if (kResidual) unpack<T>(residual[row], added);
    [[maybe_unused]] unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      // The backward kernel computes the same again, to the bit.
      values[i] = fmaf(values[i] - column[0][i], column[1][i], column[2][i]);
      if (kResidual) values[i] += added[i];
      const unsigned kept = activate<kActivation>(values[i]);
      if (kMask) bits |= kept << i;
    }
    store_vector(arguments.y, offset, pack<T>(values));
    if (kMask && arguments.mask != nullptr) arguments.mask[offset / kVector] = bits;
  }
}

// Does a block's share of a unit.
template <typename T, Activation kActivation, bool kResidual, typename Tile>
__device__ inline void forward_unit(const ForwardArguments& arguments, const Share& share, int turn,
                                    Scratch<Tile>& scratch, void* ring_memory) {
  const Problem& problem = arguments.problem;
  const Place<Tile> place(problem, share);
  const Ring<Tile, 1> ring(ring_memory, problem.ring_slots, place, {arguments.x});
  const int num_chunks = ceil_div(share.count, Tile::kChunkRows);
  ring.start(num_chunks);
  float count = 0.0f, moments[2][kVector] = {}, origin[kVector] = {};
  if (place.rows > 0) load_origin<T>(arguments.x, problem, share.level, place.channel, origin);
  ring.walk(num_chunks, [&](int chunk, int slot) {
    add_chunk<T>(ring, slot, place.rows_in(chunk), origin, count, moments);
  });
  if (place.row_lane == 0) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) scratch.origin[threadIdx.x * kVector + i] = origin[i];
  }
  Partial total = reduce_over_block<Moments>(count, moments, scratch);
  total.count = share.count;
  total = reduce_over_group<Moments>(problem, share, turn, total, scratch);
  const int c = threadIdx.x;
  if (c < share.num_channels) finish_channel(arguments, share, c, total, scratch);
  __syncthreads();
  float column[3][kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    for (int n = 0; n < 3; ++n) {
      column[n][i] = scratch.column[n][threadIdx.x % kLanes * kVector + i];
    }
  }
  if (share.rank == 0 && completes_slice(problem, share.slice, scratch)) {
    move_running_statistics(arguments, share);
  }
  ring.walk_back(num_chunks, [&](int chunk, int slot) {
    write_chunk<T, kActivation, kResidual>(arguments, place, ring, chunk, slot, column);
  });
}

// One block of the grid; see ForwardArguments.
template <typename Tile, typename T, Activation kActivation, bool kResidual>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    switchable_bn_act_fwd_kernel(const __grid_constant__ ForwardArguments arguments) {
  Scratch<Tile>& scratch = *static_cast<Scratch<Tile>*>(shared_memory());
  const Schedule& schedule = arguments.problem.schedule;
  Wave wave = wave_from(schedule, 0, 0);
  for (int turn = 0; wave.wanted > 0; ++turn) {
    const Share share = share_of<Tile>(arguments.problem, wave, blockIdx.x);
    if (share.count > 0) {
      forward_unit<T, kActivation, kResidual>(arguments, share, turn, scratch, &scratch + 1);
    }
    wave = wave_from(schedule, wave.next_level, wave.next_slice);
  }
}

// What a thread knows of its channels in the backward kernel.
struct Channels {
  float mean[kVector], scale[kVector], bias[kVector];  // scale: weight / deviation

  __device__ Channels(const BackwardArguments& arguments, int level, int channel) {
    const Problem& problem = arguments.problem;
    const int64_t of_level = static_cast<int64_t>(level) * problem.channels + channel;
    const int64_t of_bank = static_cast<int64_t>(problem.banks[level]) * problem.channels + channel;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      mean[i] = arguments.mean[of_level + i];
      bias[i] = arguments.bias[of_bank + i];
      scale[i] =
          arguments.weight[of_bank + i] * invstd_of(arguments.var[of_level + i], problem.eps);
    }
  }
};

// Sets `x` to the row less its means and `dz` to its gradients before the activation.
template <typename T, Gate kGate>
__device__ inline void open_row(const uint4& x_vector, const uint4& dy_vector, unsigned bits,
                                const Channels& channels, float (&x)[kVector],
                                float (&dz)[kVector]) {
  unpack<T>(x_vector, x);
  unpack<T>(dy_vector, dz);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    x[i] -= channels.mean[i];
    float y = fmaf(x[i], channels.scale[i], channels.bias[i]);
    bool kept = true;
    if (kGate == Gate::kRelu) kept = activate<Activation::kRelu>(y);
    if (kGate == Gate::kRelu6) kept = activate<Activation::kRelu6>(y);
    if (kGate == Gate::kMask) kept = bits >> i & 1;
    if (!kept) dz[i] = 0.0f;
  }
}

// Writes the gradients of weight and bias of a slice, for all sets: sums over the levels of a set
// in level order, 0 for a set without levels. Thread c < kSlice does channel c.
__device__ inline void write_parameter_gradients(const BackwardArguments& arguments,
                                                 const Share& share) {
  const Problem& problem = arguments.problem;
  const int c = threadIdx.x;
  if (c >= share.num_channels) return;
  const int64_t stride = static_cast<int64_t>(problem.num_levels) * problem.channels;
  for (int bank = 0; bank < problem.num_banks; ++bank) {
    float dbias = 0.0f, dweight = 0.0f;
    for (int level = 0; level < problem.num_levels; ++level) {
      if (problem.banks[level] != bank) continue;
      const float* sums = arguments.sums + static_cast<int64_t>(level) * problem.channels;
      dbias += __ldcg(sums + share.first_channel + c);
      dweight += __ldcg(sums + stride + share.first_channel + c);
    }
    const int64_t to = static_cast<int64_t>(bank) * problem.channels + share.first_channel + c;
    arguments.dbias[to] = dbias;
    arguments.dweight[to] = dweight;
  }
}

// Turns the sums of channel c of a unit into what dx is made of, in scratch.column: the mean of dz,
// and the mean of dz * xhat over the deviation.
template <typename Tile>
__device__ inline void finish_channel(const BackwardArguments& arguments, const Share& share, int c,
                                      const Partial& sums, Scratch<Tile>& scratch) {
  const Problem& problem = arguments.problem;
  const int64_t of_level =
      static_cast<int64_t>(share.level) * problem.channels + share.first_channel + c;
  const float invstd = invstd_of(arguments.var[of_level], problem.eps);
  const float dbias = sums.value[0], dweight = sums.value[1] * invstd;
  const float rows = problem.rows[share.level];
  scratch.column[0][c] = dbias / rows;
  scratch.column[1][c] = dweight * (invstd / rows);
  if (share.rank == 0) {
    const int64_t stride = static_cast<int64_t>(problem.num_levels) * problem.channels;
    arguments.sums[of_level] = dbias;
    arguments.sums[stride + of_level] = dweight;
  }
}

// Does a block's share of a unit.
template <typename T, Gate kGate, typename Tile>
__device__ inline void backward_unit(const BackwardArguments& arguments, const Share& share,
                                     int turn, Scratch<Tile>& scratch, void* ring_memory) {
  const Problem& problem = arguments.problem;
  const Place<Tile> place(problem, share);
  const Ring<Tile, 2> ring(ring_memory, problem.ring_slots, place, {arguments.x, arguments.dy});
  const int num_chunks = ceil_div(share.count, Tile::kChunkRows);
  ring.start(num_chunks);
  const int own = place.rows > 0 ? place.channel : share.first_channel;  // one that exists
  const Channels channels(arguments, share.level, own);
  const auto visit_rows = [&](int chunk, int slot, auto visit) {
    const int rows = place.rows_in(chunk);
    int64_t offset = place.offset_of(chunk);
#pragma unroll
    for (int row = 0; row < Tile::kRows; ++row, offset += place.stride) {
      if (row >= rows) break;
      const unsigned bits = kGate == Gate::kMask ? arguments.mask[offset / kVector] : 0;
      float x[kVector], dz[kVector];
      open_row<T, kGate>(*ring.at(0, slot, row), *ring.at(1, slot, row), bits, channels, x, dz);
      visit(offset, x, dz);
    }
  };
  float sums[2][kVector] = {};
  ring.walk(num_chunks, [&](int chunk, int slot) {
    visit_rows(chunk, slot, [&](int64_t, const float (&x)[kVector], const float (&dz)[kVector]) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        sums[0][i] += dz[i];
        sums[1][i] = fmaf(dz[i], x[i], sums[1][i]);
      }
    });
  });
  Partial total = reduce_over_block<Sums>(0.0f, sums, scratch);
  total = reduce_over_group<Sums>(problem, share, turn, total, scratch);
  const int c = threadIdx.x;
  if (c < share.num_channels) finish_channel(arguments, share, c, total, scratch);
  __syncthreads();
  float mean_dz[kVector], slope[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    mean_dz[i] = scratch.column[0][threadIdx.x % kLanes * kVector + i];
    slope[i] = scratch.column[1][threadIdx.x % kLanes * kVector + i];
  }
  if (share.rank == 0 && completes_slice(problem, share.slice, scratch)) {
    write_parameter_gradients(arguments, share);
  }
  ring.walk_back(num_chunks, [&](int chunk, int slot) {
    visit_rows(chunk, slot, [&](int64_t offset, float (&x)[kVector], const float (&dz)[kVector]) {
      if (kGate == Gate::kMask) store_vector(arguments.dresidual, offset, pack<T>(dz));
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        x[i] = channels.scale[i] * (dz[i] - mean_dz[i] - x[i] * slope[i]);
      }
      store_vector(arguments.dx, offset, pack<T>(x));
    });
  });
}

// One block of the grid; see BackwardArguments.
template <typename Tile, typename T, Gate kGate>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    switchable_bn_act_bwd_kernel(const __grid_constant__ BackwardArguments arguments) {
  Scratch<Tile>& scratch = *static_cast<Scratch<Tile>*>(shared_memory());
  const Schedule& schedule = arguments.problem.schedule;
  Wave wave = wave_from(schedule, 0, 0);
  for (int turn = 0; wave.wanted > 0; ++turn) {
    const Share share = share_of<Tile>(arguments.problem, wave, blockIdx.x);
    if (share.count > 0) {
      backward_unit<T, kGate>(arguments, share, turn, scratch, &scratch + 1);
    }
    wave = wave_from(schedule, wave.next_level, wave.next_slice);
  }
}

}  // namespace rsfast
