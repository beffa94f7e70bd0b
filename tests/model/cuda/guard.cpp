// torch asks whoever guards a type of device which one is present. A build without CUDA has nobody for CUDA.

#include <c10/core/impl/DeviceGuardImplInterface.h>

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
    c10::Device getDevice() const override { return {c10::DeviceType::CUDA, 0}; }
    c10::Device exchangeDevice(c10::Device) const override { return {c10::DeviceType::CUDA, 0}; }
};

extern "C" void guard_cuda() {
    static const Guard guard;
    c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)].store(&guard);
}
