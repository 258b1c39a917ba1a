// A device guard and hooks for CUDA in torch's CPU wheel: a device that exists and on which nothing happens.
// With them fake tensors on "cuda" have autograd. The library must be loaded after libtorch_cpu.so and before `import
// torch`, which looks the hooks up once while it starts. null_device.py compiles and loads this file.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <vector>

namespace {
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

constexpr int kMaxDevices = 64;
std::atomic<int> device_count{1};
std::atomic<int64_t> next_stream{1};
thread_local DeviceIndex current_device = 0;
thread_local c10::StreamId current_stream[kMaxDevices] = {};

DeviceIndex index_of(Device device) {
  return device.has_index() ? device.index() : current_device;
}

void check(DeviceIndex index) {
  TORCH_CHECK(index >= 0 && index < device_count, "CUDA error: invalid device ordinal ", int(index));
}

struct NullGuard final : public c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device getDevice() const override { return Device(DeviceType::CUDA, current_device); }
  Device exchangeDevice(Device device) const override {
    Device before = getDevice();
    setDevice(device);
    return before;
  }
  void setDevice(Device device) const override {
    check(index_of(device));
    current_device = index_of(device);
  }
  void uncheckedSetDevice(Device device) const noexcept override { current_device = index_of(device); }
  Stream getStream(Device device) const override {
    DeviceIndex index = index_of(device);
    return Stream(Stream::UNSAFE, Device(DeviceType::CUDA, index), current_stream[index]);
  }
  Stream getDefaultStream(Device device) const override {
    return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, index_of(device)));
  }
  Stream getNewStream(Device device, int) const override {
    return Stream(Stream::UNSAFE, Device(DeviceType::CUDA, index_of(device)), next_stream++);
  }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return getNewStream(device, 0); }
  Stream exchangeStream(Stream stream) const override {
    Stream before = getStream(stream.device());
    current_stream[stream.device_index()] = stream.id();
    return before;
  }
  DeviceIndex deviceCount() const noexcept override { return DeviceIndex(device_count.load()); }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, NullGuard);

// A generator of a CUDA device: the CPU's, under the other device's name.
struct NullGenerator final : public c10::GeneratorImpl {
  explicit NullGenerator(DeviceIndex index, at::Generator cpu_)
      : GeneratorImpl(Device(DeviceType::CUDA, index), c10::DispatchKeySet(c10::DispatchKey::CUDA)), cpu(std::move(cpu_)) {}
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& state) override { cpu.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
  NullGenerator* clone_impl() const override { return new NullGenerator(device().index(), cpu.clone()); }
  at::Generator cpu;
};

at::Generator new_generator(DeviceIndex index) {
  return at::make_generator<NullGenerator>(index < 0 ? current_device : index, at::detail::createCPUGenerator());
}

at::Generator& default_generator(DeviceIndex index) {
  static std::vector<at::Generator> all = [] {
    std::vector<at::Generator> made;
    for (int i = 0; i < kMaxDevices; ++i) made.push_back(new_generator(DeviceIndex(i)));
    return made;
  }();
  return all.at(index < 0 ? current_device : index);
}

thread_local bool give_default = false;  // Python has no other way to the default generators
}  // namespace

struct CUDAHooks : public at::CUDAHooksInterface {  // torch looks for a class of this name
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return DeviceIndex(device_count.load()); }
  int getNumGPUs() const override { return device_count; }
  DeviceIndex getCurrentDevice() const override { return ::current_device; }
  DeviceIndex current_device() const override { return ::current_device; }
  void setCurrentDevice(DeviceIndex index) const override { NullGuard().setDevice(Device(DeviceType::CUDA, index)); }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    if (index < 0) return -1;
    return NullGuard().exchangeDevice(Device(DeviceType::CUDA, index)).index();
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return exchangeDevice(index); }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return give_default ? default_generator(index) : new_generator(index);
  }
  void deviceSynchronize(DeviceIndex) const override {}
};

namespace at {
using ::CUDAHooks;
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

// For Python, by ctypes.
extern "C" {
void null_set_device_count(int count) { device_count = count; }
int null_device_count() { return device_count; }
int null_current_device() { return current_device; }
void null_set_device(int index) { current_device = DeviceIndex(index); }
int64_t null_current_stream(int index) { return current_stream[index]; }
void null_set_stream(int index, int64_t id) { current_stream[index] = id; }
void null_give_default_generators(bool give) { give_default = give; }
int64_t null_new_stream() { return next_stream++; }
}
