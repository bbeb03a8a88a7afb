// Launchers of the kernels of switchable_bn_act.cuh.
#include "switchable_bn_act.cuh"

namespace rsfast {
namespace {

// Not timed on a GPU yet. One block of 16 warps on each multiprocessor; 32 KiB per slot of its
// ring: 6 slots on an H100 or H200, 4 on an A100.
using ForwardTile = Tile<512, 4>;
using BackwardTile = Tile<512, 2>;

template <typename Tile>
constexpr int kScratchBytes = sizeof(Scratch<Tile>);

template <typename Tile, int kTensors>
constexpr int kSlotBytes = kTensors * Tile::kRows * Tile::kThreads * sizeof(uint4);

#define RSFAST_RETURN_IF_ERROR(call)        \
  do {                                      \
    const cudaError_t error = (call);       \
    if (error != cudaSuccess) return error; \
  } while (0)

// Launches one block on each multiprocessor that the schedule uses, all of them resident.
template <typename Tile, int kTensors, typename Arguments>
cudaError_t launch(void (*kernel)(Arguments), const Arguments& arguments, cudaStream_t stream) {
  const Problem& problem = arguments.problem;
  const int num_slices = problem.schedule.num_slices;
  const int num_counters = (problem.num_levels + 1) * num_slices;
  const int bytes = kScratchBytes<Tile> + problem.ring_slots * kSlotBytes<Tile, kTensors>;
  RSFAST_RETURN_IF_ERROR(cudaMemsetAsync(problem.counters, 0, num_counters * sizeof(int), stream));
  RSFAST_RETURN_IF_ERROR(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  void* kernel_arguments[] = {const_cast<Arguments*>(&arguments)};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel),
                                     dim3(problem.schedule.num_blocks), dim3(Tile::kThreads),
                                     kernel_arguments, bytes, stream);
}

template <typename T, Activation kActivation>
cudaError_t launch_forward_of(const ForwardArguments& arguments, cudaStream_t stream) {
  const auto kernel = arguments.residual != nullptr
                          ? switchable_bn_act_fwd_kernel<ForwardTile, T, kActivation, true>
                          : switchable_bn_act_fwd_kernel<ForwardTile, T, kActivation, false>;
  return launch<ForwardTile, 1>(kernel, arguments, stream);
}

template <typename T>
cudaError_t launch_forward_of(const ForwardArguments& arguments, Activation activation,
                              cudaStream_t stream) {
  switch (activation) {
    case Activation::kNone: return launch_forward_of<T, Activation::kNone>(arguments, stream);
    case Activation::kRelu: return launch_forward_of<T, Activation::kRelu>(arguments, stream);
    case Activation::kRelu6: return launch_forward_of<T, Activation::kRelu6>(arguments, stream);
  }
  return cudaErrorInvalidValue;
}

template <typename T, Gate kGate>
cudaError_t launch_backward_of(const BackwardArguments& arguments, cudaStream_t stream) {
  return launch<BackwardTile, 2>(switchable_bn_act_bwd_kernel<BackwardTile, T, kGate>, arguments,
                                 stream);
}

template <typename T>
cudaError_t launch_backward_of(const BackwardArguments& arguments, Gate gate, cudaStream_t stream) {
  switch (gate) {
    case Gate::kOpen: return launch_backward_of<T, Gate::kOpen>(arguments, stream);
    case Gate::kRelu: return launch_backward_of<T, Gate::kRelu>(arguments, stream);
    case Gate::kRelu6: return launch_backward_of<T, Gate::kRelu6>(arguments, stream);
    case Gate::kMask: return launch_backward_of<T, Gate::kMask>(arguments, stream);
  }
  return cudaErrorInvalidValue;
}

// Sets the plan for a kernel of this tile.
template <typename Tile, int kTensors>
cudaError_t make_plan_of(const int* rows, int num_levels, int channels, Plan* plan) {
  int device = 0, num_multiprocessors = 0, shared_bytes = 0;
  RSFAST_RETURN_IF_ERROR(cudaGetDevice(&device));
  RSFAST_RETURN_IF_ERROR(
      cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device));
  RSFAST_RETURN_IF_ERROR(
      cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  plan->ring_slots = (shared_bytes - kScratchBytes<Tile>) / kSlotBytes<Tile, kTensors>;
  if (plan->ring_slots < Tile::kDepth) return cudaErrorInvalidConfiguration;
  plan->schedule = make_schedule(rows, num_levels, channels, num_multiprocessors,
                                 plan->ring_slots * Tile::kChunkRows, Tile::kRowLanes);
  plan->num_waves = count_waves(plan->schedule);
  return cudaSuccess;
}

}  // namespace

cudaError_t make_plan(const int* rows, int num_levels, int channels, bool backward, Plan* plan) {
  return backward ? make_plan_of<BackwardTile, 2>(rows, num_levels, channels, plan)
                  : make_plan_of<ForwardTile, 1>(rows, num_levels, channels, plan);
}

cudaError_t launch_forward(const ForwardArguments& arguments, Activation activation, bool is_half,
                           cudaStream_t stream) {
  return is_half ? launch_forward_of<__half>(arguments, activation, stream)
                 : launch_forward_of<__nv_bfloat16>(arguments, activation, stream);
}

cudaError_t launch_backward(const BackwardArguments& arguments, Gate gate, bool is_half,
                            cudaStream_t stream) {
  return is_half ? launch_backward_of<__half>(arguments, gate, stream)
                 : launch_backward_of<__nv_bfloat16>(arguments, gate, stream);
}

}  // namespace rsfast
