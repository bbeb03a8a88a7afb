// The operators of csrc/ops.cpp on the emulated GPU, whose memory is the CPU's: the same host code,
// registered for CPU tensors in a namespace of its own.
#define aoti_torch_device_type_cuda aoti_torch_device_type_cpu
#define aoti_torch_create_device_guard emulated_create_device_guard
#define aoti_torch_delete_device_guard emulated_delete_device_guard
#define aoti_torch_get_current_cuda_stream emulated_get_current_stream
#define torch_c10_cuda_check_msg emulated_check_msg
#define torch_c10_cuda_free_error_msg emulated_free_error_msg

#include <Python.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <string>

namespace rsfast {
extern std::string emulation_error;
}

extern "C" {

AOTITorchError emulated_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = reinterpret_cast<DeviceGuardHandle>(&rsfast::emulation_error);  // anything but null
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError emulated_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

AOTITorchError emulated_get_current_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError emulated_check_msg(int32_t error, const char*, const char*, uint32_t, bool,
                                  char** message) {
  *message = error == cudaSuccess ? nullptr : strdup(rsfast::emulation_error.c_str());
  return AOTI_TORCH_SUCCESS;
}

void emulated_free_error_msg(char* message) { std::free(message); }

}  // extern "C"

#define cudaGetLastError() cudaSuccess
#define rsfast_C rsfast_emulated
#define CUDA CPU
#include "ops.cpp"
