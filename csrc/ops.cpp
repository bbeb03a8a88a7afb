// The operators of rsfast._C, on PyTorch's stable ABI: one binary for every torch from 2.11 on.
// kernels/_bn_cuda.py calls them. They check what would make a kernel read or write astray.
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "switchable_bn_act.h"

namespace rsfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Returns PyTorch's current stream of the tensor's device.
cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Refuses a tensor that is not contiguous `type` of this shape on the device of `x`.
void check(const char* name, const Tensor& tensor, const Tensor& x, ScalarType type,
           const std::vector<int64_t>& shape) {
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index() &&
                      tensor.is_contiguous() && tensor.scalar_type() == type &&
                      std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()),
                  name, " does not have the device, type, shape or strides that x asks for");
}

// Returns uninitialised memory of a shape on the device of `x`.
Tensor allocate(const Tensor& x, const std::vector<int64_t>& shape, ScalarType type) {
  return torch::stable::new_empty(x, shape, type);
}

const float* floats(const Tensor& tensor) { return tensor.const_data_ptr<float>(); }

// Returns the memory of a tensor that kernels read 16 bytes at a time.
const void* vectors(const char* name, const Tensor& tensor) {
  const void* memory = tensor.const_data_ptr();
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(memory) % 16 == 0, name,
                  " must begin at a multiple of 16 bytes");
  return memory;
}

// A kernel's problem, and the memory behind its pointers.
struct PreparedProblem {
  Problem problem{};
  Tensor partials, counters;
};

// Returns the problem of x [M, C] and weight [B, C], checked, with its schedule and scratch memory.
PreparedProblem prepare(const Tensor& x, const Tensor& weight,
                        const std::vector<int64_t>& level_rows, const std::vector<int64_t>& banks,
                        double eps, bool backward) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(
      x.is_cuda() && x.dim() == 2 && x.is_contiguous() && x.size(1) > 0 &&
          x.size(1) % kVector == 0 && (type == ScalarType::Half || type == ScalarType::BFloat16),
      "x must be contiguous float16 or bfloat16 [M, C] on a GPU, C a multiple of ", kVector);
  STD_TORCH_CHECK(
      !level_rows.empty() && level_rows.size() <= kMaxLevels && banks.size() == level_rows.size(),
      "level_rows and banks must be of 1 to ", kMaxLevels, " levels");
  PreparedProblem prepared;
  Problem& problem = prepared.problem;
  problem.num_levels = static_cast<int>(level_rows.size());
  problem.channels = static_cast<int>(x.size(1));
  problem.num_banks = static_cast<int>(weight.size(0));
  problem.eps = static_cast<float>(eps);
  int64_t first_row = 0;
  for (int level = 0; level < problem.num_levels; ++level) {
    const int64_t rows = level_rows[level], bank = banks[level];
    STD_TORCH_CHECK(rows > 0 && rows <= std::numeric_limits<int>::max() / 2 && bank >= 0 &&
                        bank < problem.num_banks,
                    "level ", level, " has ", rows, " rows and set ", bank);
    problem.rows[level] = static_cast<int>(rows);
    problem.banks[level] = static_cast<int>(bank);
    problem.first_row[level] = first_row;
    first_row += rows;
  }
  STD_TORCH_CHECK(first_row == x.size(0), "level_rows must add up to the rows of x");
  check("weight", weight, x, ScalarType::Float, {problem.num_banks, problem.channels});
  Plan plan{};
  STD_CUDA_CHECK(make_plan(problem.rows, problem.num_levels, problem.channels, backward, &plan));
  problem.schedule = plan.schedule;
  problem.ring_slots = plan.ring_slots;
  prepared.partials =
      allocate(x, {plan.num_waves, plan.schedule.num_blocks, 2, kSlice}, ScalarType::Float);
  prepared.counters =
      allocate(x, {problem.num_levels + 1, plan.schedule.num_slices}, ScalarType::Int);
  problem.partials = prepared.partials.mutable_data_ptr<float>();
  problem.counters = prepared.counters.mutable_data_ptr<int32_t>();
  return prepared;
}

Activation activation_of(const std::optional<std::string>& name) {
  if (!name) return Activation::kNone;
  STD_TORCH_CHECK(*name == "relu" || *name == "relu6", "activation must be relu or relu6, got ",
                  *name);
  return *name == "relu" ? Activation::kRelu : Activation::kRelu6;
}

// Returns y [M, C] like x, the mask [M, C / 8] uint8 (no rows without save_mask), mean and biased
// var [L, C] float32 of the levels. Moves running_mean, running_var [B, C] float32 and
// num_batches_tracked [B] int64.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor x, std::optional<Tensor> residual,
                                                   Tensor weight, Tensor bias, Tensor running_mean,
                                                   Tensor running_var, Tensor num_batches_tracked,
                                                   std::vector<int64_t> level_rows,
                                                   std::vector<int64_t> banks,
                                                   std::optional<std::string> activation,
                                                   bool save_mask, double momentum, double eps) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const PreparedProblem prepared = prepare(x, weight, level_rows, banks, eps, false);
  const int64_t num_levels = prepared.problem.num_levels, num_banks = prepared.problem.num_banks;
  const int64_t num_rows = x.size(0), channels = x.size(1);
  check("bias", bias, x, ScalarType::Float, {num_banks, channels});
  check("running_mean", running_mean, x, ScalarType::Float, {num_banks, channels});
  check("running_var", running_var, x, ScalarType::Float, {num_banks, channels});
  check("num_batches_tracked", num_batches_tracked, x, ScalarType::Long, {num_banks});
  if (residual) check("residual", *residual, x, x.scalar_type(), {num_rows, channels});
  STD_TORCH_CHECK(!save_mask || (residual && activation),
                  "save_mask is for an activation after a residual");
  Tensor y = allocate(x, {num_rows, channels}, x.scalar_type());
  Tensor mask = allocate(x, {save_mask ? num_rows : 0, channels / kVector}, ScalarType::Byte);
  Tensor mean = allocate(x, {num_levels, channels}, ScalarType::Float);
  Tensor var = allocate(x, {num_levels, channels}, ScalarType::Float);

  ForwardArguments arguments{};
  arguments.problem = prepared.problem;
  arguments.x = vectors("x", x);
  arguments.residual = residual ? vectors("residual", *residual) : nullptr;
  arguments.weight = floats(weight);
  arguments.bias = floats(bias);
  arguments.y = y.mutable_data_ptr();
  arguments.mask = save_mask ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  arguments.mean = mean.mutable_data_ptr<float>();
  arguments.var = var.mutable_data_ptr<float>();
  arguments.running_mean = running_mean.mutable_data_ptr<float>();
  arguments.running_var = running_var.mutable_data_ptr<float>();
  arguments.num_batches = num_batches_tracked.mutable_data_ptr<int64_t>();
  arguments.momentum = static_cast<float>(momentum);
  STD_CUDA_CHECK(launch_forward(arguments, activation_of(activation),
                                x.scalar_type() == ScalarType::Half, current_stream(x)));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {y, mask, mean, var};
}

// Returns dx [M, C] like x, dresidual like x (no rows where `mask` has none), dweight and dbias
// [B, C] float32. mean and var [L, C] are those of the forward operator.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dy, Tensor x, Tensor mask, Tensor weight,
                                                    Tensor bias, Tensor mean, Tensor var,
                                                    std::vector<int64_t> level_rows,
                                                    std::vector<int64_t> banks,
                                                    std::optional<std::string> activation,
                                                    double eps) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const PreparedProblem prepared = prepare(x, weight, level_rows, banks, eps, true);
  const int64_t num_levels = prepared.problem.num_levels, num_banks = prepared.problem.num_banks;
  const int64_t num_rows = x.size(0), channels = x.size(1);
  const bool has_mask = mask.size(0) > 0;
  check("dy", dy, x, x.scalar_type(), {num_rows, channels});
  check("mask", mask, x, ScalarType::Byte, {has_mask ? num_rows : 0, channels / kVector});
  check("bias", bias, x, ScalarType::Float, {num_banks, channels});
  check("mean", mean, x, ScalarType::Float, {num_levels, channels});
  check("var", var, x, ScalarType::Float, {num_levels, channels});
  Tensor dx = allocate(x, {num_rows, channels}, x.scalar_type());
  Tensor dresidual = allocate(x, {has_mask ? num_rows : 0, channels}, x.scalar_type());
  Tensor dweight = allocate(x, {num_banks, channels}, ScalarType::Float);
  Tensor dbias = allocate(x, {num_banks, channels}, ScalarType::Float);
  Tensor sums = allocate(x, {2, num_levels, channels}, ScalarType::Float);

  BackwardArguments arguments{};
  arguments.problem = prepared.problem;
  arguments.dy = vectors("dy", dy);
  arguments.x = vectors("x", x);
  arguments.mask = has_mask ? mask.const_data_ptr<uint8_t>() : nullptr;
  arguments.weight = floats(weight);
  arguments.bias = floats(bias);
  arguments.mean = floats(mean);
  arguments.var = floats(var);
  arguments.sums = sums.mutable_data_ptr<float>();
  arguments.dx = dx.mutable_data_ptr();
  arguments.dresidual = has_mask ? dresidual.mutable_data_ptr() : nullptr;
  arguments.dweight = dweight.mutable_data_ptr<float>();
  arguments.dbias = dbias.mutable_data_ptr<float>();
  Gate gate = has_mask ? Gate::kMask : Gate::kOpen;
  const Activation kind = activation_of(activation);
  if (!has_mask && kind == Activation::kRelu) gate = Gate::kRelu;
  if (!has_mask && kind == Activation::kRelu6) gate = Gate::kRelu6;
  STD_CUDA_CHECK(
      launch_backward(arguments, gate, x.scalar_type() == ScalarType::Half, current_stream(x)));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {dx, dresidual, dweight, dbias};
}

}  // namespace
}  // namespace rsfast

STABLE_TORCH_LIBRARY(rsfast_C, library) {
  library.def(
      "switchable_bn_act_fwd(Tensor x, Tensor? residual, Tensor weight, Tensor bias, "
      "Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!) num_batches_tracked, "
      "int[] level_rows, int[] banks, str? activation, bool save_mask, float momentum, float eps)"
      " -> (Tensor y, Tensor mask, Tensor mean, Tensor var)");
  library.def(
      "switchable_bn_act_bwd(Tensor dy, Tensor x, Tensor mask, Tensor weight, Tensor bias, "
      "Tensor mean, Tensor var, int[] level_rows, int[] banks, str? activation, float eps)"
      " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)");
}

STABLE_TORCH_LIBRARY_IMPL(rsfast_C, CUDA, library) {
  library.impl("switchable_bn_act_fwd", TORCH_BOX(&rsfast::forward));
  library.impl("switchable_bn_act_bwd", TORCH_BOX(&rsfast::backward));
}

// `import rsfast._C` loads the operators; the module itself is empty.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C"};
  return PyModule_Create(&definition);
}
