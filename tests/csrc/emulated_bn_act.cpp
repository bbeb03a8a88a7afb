// The launchers of csrc/switchable_bn_act.h for the emulated GPU.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <vector>

#include "switchable_bn_act.cuh"

namespace rsfast {

std::string emulation_error;  // of the last launch

namespace {

// Of the real tiles, and of narrow ones in which few rows fill many chunks.
template <bool kNarrow>
using ForwardTile = Tile<kNarrow ? 128 : 512, 4>;
template <bool kNarrow>
using BackwardTile = Tile<kNarrow ? 128 : 512, 2>;

struct Gpu {
  int num_multiprocessors = 1, ring_slots = 2, narrow = 1, seed = 0, skip_barrier = -1;
} gpu;

// Results of a kernel, in copies between guards that it must leave alone.
class Guards {
 public:
  // Points `pointer` to a copy of its memory.
  template <typename T>
  void add(T*& pointer, size_t bytes) {
    if (pointer == nullptr || bytes == 0) return;
    auto* target = reinterpret_cast<unsigned char*>(pointer);
    results_.push_back({target, bytes, std::vector<unsigned char>(bytes + 2 * kGuardBytes, kFill)});
    unsigned char* copy = results_.back().buffer.data() + kGuardBytes;
    std::copy_n(target, bytes, copy);
    pointer = reinterpret_cast<T*>(copy);
  }

  // Copies the results back. Returns whether all guards are as they were.
  bool finish() const {
    bool intact = true;
    for (const Result& result : results_) {
      std::copy_n(result.buffer.begin() + kGuardBytes, result.bytes, result.target);
      const auto is_fill = [](unsigned char byte) { return byte == kFill; };
      intact &= std::all_of(result.buffer.begin(), result.buffer.begin() + kGuardBytes, is_fill) &&
                std::all_of(result.buffer.end() - kGuardBytes, result.buffer.end(), is_fill);
    }
    return intact;
  }

 private:
  static constexpr int kGuardBytes = 256;
  static constexpr unsigned char kFill = 0xa5;
  struct Result {
    unsigned char* target;
    size_t bytes;
    std::vector<unsigned char> buffer;
  };
  std::vector<Result> results_;
};

// Sizes of the operands in bytes.
struct Sizes {
  size_t rows, of_levels, of_banks;  // of 16-bit [M, C], of float32 [L, C] and [B, C]
  explicit Sizes(const Problem& problem) {
    const size_t channels = problem.channels;
    const int last = problem.num_levels - 1;
    rows = (problem.first_row[last] + problem.rows[last]) * channels * sizeof(uint16_t);
    of_levels = problem.num_levels * channels * sizeof(float);
    of_banks = problem.num_banks * channels * sizeof(float);
  }
};

// Runs a kernel, with its counters at 0.
template <typename Tile, int kTensors, typename Arguments>
void launch(void (*kernel)(Arguments), Arguments arguments, Guards& guards) {
  Problem& problem = arguments.problem;
  const Schedule& schedule = problem.schedule;
  const int num_counters = (problem.num_levels + 1) * schedule.num_slices;
  std::fill_n(problem.counters, num_counters, 0);
  guards.add(problem.counters, num_counters * sizeof(int));
  guards.add(problem.partials,
             sizeof(float) * 2 * kSlice * schedule.num_blocks * count_waves(schedule));
  const int bytes = sizeof(Scratch<Tile>) +
                    problem.ring_slots * kTensors * Tile::kRows * Tile::kThreads * sizeof(uint4);
  emulation_error = run({schedule.num_blocks, Tile::kThreads, bytes,
                         static_cast<unsigned>(gpu.seed), gpu.skip_barrier},
                        [&] { kernel(arguments); });
  if (!guards.finish() && emulation_error.empty()) {
    emulation_error = "a block wrote beyond a tensor";
  }
}

template <bool kNarrow, typename T, Activation kActivation>
void forward(ForwardArguments arguments) {
  using Tile = ForwardTile<kNarrow>;
  const Sizes sizes(arguments.problem);
  Guards guards;
  guards.add(arguments.y, sizes.rows);
  guards.add(arguments.mask, sizes.rows / sizeof(uint16_t) / kVector);
  guards.add(arguments.mean, sizes.of_levels);
  guards.add(arguments.var, sizes.of_levels);
  guards.add(arguments.running_mean, sizes.of_banks);
  guards.add(arguments.running_var, sizes.of_banks);
  guards.add(arguments.num_batches, arguments.problem.num_banks * sizeof(int64_t));
  const auto kernel = arguments.residual != nullptr
                          ? switchable_bn_act_fwd_kernel<Tile, T, kActivation, true>
                          : switchable_bn_act_fwd_kernel<Tile, T, kActivation, false>;
  launch<Tile, 1>(kernel, arguments, guards);
}

template <bool kNarrow, typename T, Gate kGate>
void backward(BackwardArguments arguments) {
  using Tile = BackwardTile<kNarrow>;
  const Sizes sizes(arguments.problem);
  Guards guards;
  guards.add(arguments.dx, sizes.rows);
  guards.add(arguments.dresidual, sizes.rows);
  guards.add(arguments.sums, 2 * sizes.of_levels);
  guards.add(arguments.dweight, sizes.of_banks);
  guards.add(arguments.dbias, sizes.of_banks);
  launch<Tile, 2>(switchable_bn_act_bwd_kernel<Tile, T, kGate>, arguments, guards);
}

template <bool kNarrow, typename T>
void forward(const ForwardArguments& arguments, Activation activation) {
  switch (activation) {
    case Activation::kNone: return forward<kNarrow, T, Activation::kNone>(arguments);
    case Activation::kRelu: return forward<kNarrow, T, Activation::kRelu>(arguments);
    case Activation::kRelu6: return forward<kNarrow, T, Activation::kRelu6>(arguments);
  }
}

template <bool kNarrow, typename T>
void backward(const BackwardArguments& arguments, Gate gate) {
  switch (gate) {
    case Gate::kOpen: return backward<kNarrow, T, Gate::kOpen>(arguments);
    case Gate::kRelu: return backward<kNarrow, T, Gate::kRelu>(arguments);
    case Gate::kRelu6: return backward<kNarrow, T, Gate::kRelu6>(arguments);
    case Gate::kMask: return backward<kNarrow, T, Gate::kMask>(arguments);
  }
}

template <typename Tile>
void make_plan_of(const int* rows, int num_levels, int channels, Plan* plan) {
  plan->ring_slots = gpu.ring_slots;
  plan->schedule = make_schedule(rows, num_levels, channels, gpu.num_multiprocessors,
                                 gpu.ring_slots * Tile::kChunkRows, Tile::kRowLanes);
  plan->num_waves = count_waves(plan->schedule);
}

cudaError_t result() { return emulation_error.empty() ? cudaSuccess : cudaErrorLaunchFailure; }

}  // namespace

cudaError_t make_plan(const int* rows, int num_levels, int channels, bool is_backward, Plan* plan) {
  const auto narrow =
      is_backward ? make_plan_of<BackwardTile<true>> : make_plan_of<ForwardTile<true>>;
  const auto full =
      is_backward ? make_plan_of<BackwardTile<false>> : make_plan_of<ForwardTile<false>>;
  (gpu.narrow ? narrow : full)(rows, num_levels, channels, plan);
  return cudaSuccess;
}

cudaError_t launch_forward(const ForwardArguments& arguments, Activation activation, bool is_half,
                           cudaStream_t) {
  const auto narrow = is_half ? forward<true, __half> : forward<true, __nv_bfloat16>;
  const auto full = is_half ? forward<false, __half> : forward<false, __nv_bfloat16>;
  (gpu.narrow ? narrow : full)(arguments, activation);
  return result();
}

cudaError_t launch_backward(const BackwardArguments& arguments, Gate gate, bool is_half,
                            cudaStream_t) {
  const auto narrow = is_half ? backward<true, __half> : backward<true, __nv_bfloat16>;
  const auto full = is_half ? backward<false, __half> : backward<false, __nv_bfloat16>;
  (gpu.narrow ? narrow : full)(arguments, gate);
  return result();
}

// Sets what the emulated GPU is like: see EmulatedGpu in tests/emulator.py.
extern "C" void emulate_gpu(int num_multiprocessors, int ring_slots, int narrow, int seed,
                            int skip_barrier) {
  gpu = {num_multiprocessors, ring_slots, narrow, seed, skip_barrier};
}

// Sets `sizes` to slices, vectors of a slice, blocks and waves, and `shares` to level, slice, first
// block and number of blocks for each block of each wave.
extern "C" void emulate_schedule(const int* rows, int num_levels, int channels, int max_blocks,
                                 int rows_on_chip, int min_rows, int* sizes, int* shares) {
  const Schedule schedule =
      make_schedule(rows, num_levels, channels, max_blocks, rows_on_chip, min_rows);
  sizes[0] = schedule.num_slices;
  sizes[1] = schedule.slice_vectors;
  sizes[2] = schedule.num_blocks;
  sizes[3] = count_waves(schedule);
  for (Wave wave = wave_from(schedule, 0, 0); wave.wanted > 0;) {
    for (int block = 0; block < schedule.num_blocks; ++block, shares += 4) {
      const Unit unit = unit_of(schedule, wave, block);
      shares[0] = unit.level;
      shares[1] = unit.slice;
      shares[2] = unit.first_block;
      shares[3] = unit.num_blocks;
    }
    wave = wave_from(schedule, wave.next_level, wave.next_slice);
  }
}

}  // namespace rsfast
