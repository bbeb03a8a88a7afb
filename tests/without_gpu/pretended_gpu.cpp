// A GPU that does nothing, for a CUDA build of PyTorch on a machine without one.
//
// Compiled as libcuda.so.1 and loaded before everything else, it takes the place of the driver and
// of PyTorch's count of devices. Its guard is put into PyTorch's registry by pretended.py.

#include <c10/core/Stream.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

const c10::Device gpu(c10::DeviceType::CUDA, 0);
const c10::Stream stream(c10::Stream::DEFAULT, gpu);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return gpu; }
  c10::Device getDevice() const override { return gpu; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream; }
  c10::Stream getDefaultStream(c10::Device) const override { return stream; }
  c10::Stream exchangeStream(c10::Stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};

}  // namespace

extern "C" {

c10::impl::DeviceGuardImplInterface* pretended_guard() {
  static Guard guard;
  return &guard;
}

// The one function of the driver that a backward calls: nobody has used the device.
int cuDevicePrimaryCtxGetState(int, unsigned*, int* active) {
  *active = 0;
  return 0;
}

}  // extern "C"

namespace c10::cuda {
DeviceIndex device_count() noexcept { return 1; }
}  // namespace c10::cuda
