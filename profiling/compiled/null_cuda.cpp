// CUDA in torch's CPU wheel, without a GPU: a device guard, hooks and generators, with which fake tensors on "cuda" have
// autograd; and, once null_compute() was called, tensors of device "cuda:i" that lie in host memory, on which the CPU's
// kernels run. The library must be loaded after libtorch_cpu.so and before `import torch`, which looks the hooks up once
// while it starts. null_device.py compiles and loads this file.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/EmptyTensor.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
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

// ---- memory: the host's, counted for each device, and filled with NaN so that reading what was never written shows

struct Counter {
  std::atomic<int64_t> now{0}, peak{0}, count{0};
  void add(int64_t bytes) {
    int64_t total = now += bytes;
    if (bytes > 0) ++count;
    for (int64_t seen = peak; total > seen && !peak.compare_exchange_weak(seen, total);) {}
  }
};
Counter counters[kMaxDevices];

struct Block {  // what a data pointer of the device holds on to
  void* memory;
  int64_t bytes;
  DeviceIndex index;
  c10::intrusive_ptr<c10::StorageImpl> owner;  // the CPU storage whose memory it is, if any
};

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  counters[block->index].add(-block->bytes);
  if (!block->owner) c10::free_cpu(block->memory);
  delete block;
}

struct NullAllocator final : public c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    DeviceIndex index = current_device;
    void* memory = bytes ? c10::alloc_cpu(bytes) : nullptr;
    if (memory) std::memset(memory, 0xFF, bytes);
    counters[index].add(int64_t(bytes));
    auto* block = new Block{memory, int64_t(bytes), index, {}};
    return {memory, block, &free_block, Device(DeviceType::CUDA, index)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t count) const override { std::memcpy(to, from, count); }
};
NullAllocator allocator;

struct Pinned {
  std::mutex lock;
  std::map<const char*, size_t> blocks;
} pinned;

struct PinnedAllocator final : public c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = c10::alloc_cpu(bytes ? bytes : 1);
    std::lock_guard<std::mutex> guard(pinned.lock);
    pinned.blocks[static_cast<char*>(memory)] = bytes ? bytes : 1;
    return {memory, memory, &release, Device(DeviceType::CPU)};
  }
  static void release(void* memory) {
    std::lock_guard<std::mutex> guard(pinned.lock);
    pinned.blocks.erase(static_cast<char*>(memory));
    c10::free_cpu(memory);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t count) const override { std::memcpy(to, from, count); }
};
PinnedAllocator pinned_allocator;

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> guard(pinned.lock);
  auto next = pinned.blocks.upper_bound(static_cast<const char*>(data));
  if (next == pinned.blocks.begin()) return false;
  auto found = std::prev(next);
  return static_cast<const char*>(data) < found->first + found->second;
}

// ---- copies that need not have happened when the call returns (non_blocking, pinned memory) happen as late as they may

struct Late {
  at::Tensor to, from;  // kept alive
  std::string bytes;    // of a copy to the host: what the device held when it was its turn
};
std::mutex late_lock;
std::vector<Late> to_device, to_host;

// To the device: before anything else of the device runs, and after the host went on.
void copy_late_to_device() {
  std::vector<Late> done;  // let go without the lock: a tensor's end may wait for Python's
  std::lock_guard<std::mutex> guard(late_lock);
  for (auto& copy : to_device) std::memcpy(copy.to.mutable_data_ptr(), copy.from.const_data_ptr(), copy.to.nbytes());
  done.swap(to_device);
}

// To the host: when the host waits. Until then it finds NaN there.
void copy_late_to_host() {
  copy_late_to_device();
  std::vector<Late> done;
  std::lock_guard<std::mutex> guard(late_lock);
  for (auto& copy : to_host) std::memcpy(copy.to.mutable_data_ptr(), copy.bytes.data(), copy.bytes.size());
  done.swap(to_host);
}

bool late(const at::Tensor& to, const at::Tensor& from) {
  const at::Tensor& host = to.is_cuda() ? from : to;
  if (to.is_cuda() == from.is_cuda() || !host.is_cpu() || !to.nbytes() || !is_pinned(host.const_data_ptr())) return false;
  if (to.dtype() != from.dtype() || to.sizes() != from.sizes() || !to.is_contiguous() || !from.is_contiguous()) {
    return false;
  }
  std::lock_guard<std::mutex> guard(late_lock);
  if (to.is_cuda()) {
    to_device.push_back({to, from, {}});
  } else {
    to_host.push_back({to, from, std::string(static_cast<const char*>(from.const_data_ptr()), from.nbytes())});
    std::memset(to.mutable_data_ptr(), 0xFF, to.nbytes());
  }
  return true;
}

// ---- one operator call: its CUDA tensors are lent to the CPU's kernel as CPU tensors of the same memory

bool is_index_op(const std::string& name) {
  static const std::set<std::string> names{"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put",
                                           "aten::_unsafe_index", "aten::_unsafe_index_put"};
  return names.count(name) > 0;
}

bool copies(const std::string& name) {  // from one device to another: allowed
  static const std::set<std::string> names{"aten::copy_", "aten::_foreach_copy_"};
  return names.count(name) > 0;
}

class Call {
 public:
  explicit Call(const c10::OperatorHandle& op) : op_(op), name_(op.schema().name()) {}

  void run(torch::jit::Stack* stack) {
    const auto& schema = op_.schema();
    const size_t count = schema.arguments().size();
    const size_t begin = stack->size() - count;
    for (size_t i = 0; i < count; ++i) look((*stack)[begin + i]);
    if (!target_) target_ = Device(DeviceType::CUDA, current_device);
    if (!target_->has_index()) target_ = Device(DeviceType::CUDA, current_device);
    check_devices(count ? (*stack)[begin] : c10::IValue());
    for (size_t i = 0; i < count; ++i) {
      auto& value = (*stack)[begin + i];
      const bool generator = schema.arguments()[i].type()->str().rfind("Generator", 0) == 0;
      if (value.isNone() && generator) value = default_generator(target_->index());
      value = lend(value);
    }
    op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
    for (auto& [alias, original] : lent_) take_back(alias, original);
    const size_t results = schema.returns().size();
    for (size_t i = stack->size() - results; i < stack->size(); ++i) (*stack)[i] = give((*stack)[i]);
  }

 private:
  // The device of the call, and whether its tensors are where CUDA would want them.
  void look(const c10::IValue& value) {
    if (value.isTensor()) {
      const at::Tensor& tensor = value.toTensor();
      if (!tensor.defined()) return;
      if (tensor.is_cuda()) {
        if (!target_) target_ = tensor.device();
        if (tensor.device() != *target_ && tensor.dim()) other_cuda_ = tensor.device();
      } else if (tensor.is_cpu() && tensor.dim()) {
        cpu_ = true;
      }
    } else if (value.isList() && has_tensors(value)) {
      for (const c10::IValue& item : value.toListRef()) look(item);
    } else if (value.isStorage()) {
      if (value.toStorage().device().is_cuda()) target_ = value.toStorage().device();
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      target_ = value.toDevice();
    }
  }

  void check_devices(const c10::IValue& first) {
    if (copies(name_) || name_.rfind("aten::", 0) != 0) return;
    TORCH_CHECK(!other_cuda_, "Expected all tensors to be on the same device, but found at least two devices, ", *target_,
                " and ", *other_cuda_, "! (", name_, " on the null device)");
    if (!cpu_) return;
    const bool indexed = is_index_op(name_) && first.isTensor() && first.toTensor().is_cuda();
    TORCH_CHECK(indexed, "Expected all tensors to be on the same device, but found at least two devices, ", *target_,
                " and cpu! (", name_, " on the null device)");
  }

  c10::IValue lend(const c10::IValue& value) {
    if (value.isTensor()) return lend(value.toTensor());
    if (value.isStorage()) return value.toStorage().device().is_cuda() ? lend(value.toStorage()) : value.toStorage();
    if (value.isDevice()) return value.toDevice().is_cuda() ? c10::IValue(Device(DeviceType::CPU)) : value;
    if (value.isGenerator()) {
      auto* generator = dynamic_cast<NullGenerator*>(value.toGenerator().unsafeGetGeneratorImpl());
      return generator ? c10::IValue(generator->cpu) : value;
    }
    if (!value.isList() || !has_tensors(value)) return value;
    auto list = value.toList();
    c10::impl::GenericList converted(list.elementType());
    for (const c10::IValue& item : value.toListRef()) converted.push_back(lend(item));
    return converted;
  }

  at::Tensor lend(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) return tensor;
    if (auto found = by_original_.find(tensor.unsafeGetTensorImpl()); found != by_original_.end()) return found->second;
    at::Tensor alias = at::detail::make_tensor<c10::TensorImpl>(
        lend(tensor.storage()), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
    shape_like(alias, tensor);
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) alias.unsafeGetTensorImpl()->set_wrapped_number(true);
    by_original_[tensor.unsafeGetTensorImpl()] = alias;
    lent_.emplace_back(alias, tensor);
    return alias;
  }

  c10::Storage lend(const c10::Storage& of) {
    auto* storage = of.unsafeGetStorageImpl();
    auto& shared = storages_[storage];
    if (!shared) {
      auto* holder = new c10::intrusive_ptr<c10::StorageImpl>(
          c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(storage));
      c10::DataPtr data(storage->mutable_data(), holder, &drop, Device(DeviceType::CPU));
      shared = c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), storage->nbytes(),
                                                     std::move(data), c10::GetAllocator(DeviceType::CPU), true);
      originals_[shared.get()] = c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(storage);
    }
    return c10::Storage(shared);
  }

  static bool has_tensors(const c10::IValue& list) {
    auto kind = list.toList().elementType()->kind();
    return kind == c10::TypeKind::TensorType || kind == c10::TypeKind::OptionalType || kind == c10::TypeKind::ListType;
  }

  static void drop(void* holder) { delete static_cast<c10::intrusive_ptr<c10::StorageImpl>*>(holder); }

  static void shape_like(const at::Tensor& to, const at::Tensor& from) {
    to.unsafeGetTensorImpl()->set_sizes_and_strides(from.sizes(), from.strides(), from.storage_offset());
    to._set_conj(from.is_conj());
    to._set_neg(from.is_neg());
  }

  // A kernel may have resized what it was lent, in shape or in memory, or put it on another storage.
  void take_back(const at::Tensor& alias, const at::Tensor& original) {
    auto* storage = original.storage().unsafeGetStorageImpl();
    auto* shared = alias.storage().unsafeGetStorageImpl();
    if (auto found = originals_.find(shared); found == originals_.end() || found->second.get() != storage) {
      original.unsafeGetTensorImpl()->set_storage_keep_dtype(
          found == originals_.end() ? c10::Storage(wrap(shared)) : c10::Storage(found->second));
    } else if (shared->mutable_data() != storage->mutable_data() || shared->nbytes() != storage->nbytes()) {
      storage->set_data_ptr(owned(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(shared)));
      storage->set_nbytes(shared->nbytes());
    }
    if (alias.sizes() != original.sizes() || alias.strides() != original.strides() ||
        alias.storage_offset() != original.storage_offset()) {
      original.unsafeGetTensorImpl()->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
    }
  }

  c10::DataPtr owned(c10::intrusive_ptr<c10::StorageImpl> cpu) {
    auto* block = new Block{cpu->mutable_data(), int64_t(cpu->nbytes()), target_->index(), cpu};
    counters[block->index].add(block->bytes);
    return {block->memory, block, &free_block, *target_};
  }

  // The CUDA storage of a CPU storage: the one that was lent, or a new one on the same memory.
  c10::intrusive_ptr<c10::StorageImpl> wrap(c10::StorageImpl* cpu) {
    auto& storage = originals_[cpu];
    if (!storage) {
      auto kept = c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(cpu);
      storage = c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), kept->nbytes(), owned(kept),
                                                      &allocator, true);
    }
    return storage;
  }

  c10::IValue give(const c10::IValue& value) {
    if (value.isTensor()) return give(value.toTensor());
    if (!value.isList() || !has_tensors(value)) return value;
    auto list = value.toList();
    c10::impl::GenericList converted(list.elementType());
    for (const c10::IValue& item : value.toListRef()) converted.push_back(give(item));
    return converted;
  }

  at::Tensor give(const at::Tensor& result) {
    if (!result.defined() || !result.is_cpu()) return result;
    for (auto& [alias, original] : lent_) {
      if (alias.is_same(result)) return original;
    }
    for (auto& [alias, wrapped] : given_) {
      if (alias.is_same(result)) return wrapped;
    }
    c10::Storage storage(wrap(result.storage().unsafeGetStorageImpl()));
    at::Tensor wrapped;
    if (const at::Tensor* base = lent_from(storage)) {  // a view: what autograd keeps for it goes by the base's keys
      wrapped = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, std::move(storage), base->key_set(),
                                                         result.dtype());
    } else {
      wrapped = at::detail::make_tensor<c10::TensorImpl>(
          std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CUDA), result.dtype());
    }
    shape_like(wrapped, result);
    given_.emplace_back(result, wrapped);
    return wrapped;
  }

  const at::Tensor* lent_from(const c10::Storage& storage) const {
    for (auto& [alias, original] : lent_) {
      if (original.storage().unsafeGetStorageImpl() == storage.unsafeGetStorageImpl()) return &original;
    }
    return nullptr;
  }

  const c10::OperatorHandle& op_;
  std::string name_;
  std::optional<Device> target_, other_cuda_;
  bool cpu_ = false;
  std::unordered_map<c10::TensorImpl*, at::Tensor> by_original_;
  std::unordered_map<c10::StorageImpl*, c10::intrusive_ptr<c10::StorageImpl>> storages_;   // CUDA's → the CPU alias
  std::unordered_map<c10::StorageImpl*, c10::intrusive_ptr<c10::StorageImpl>> originals_;  // CPU's → CUDA's
  std::vector<std::pair<at::Tensor, at::Tensor>> lent_, given_;
};

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  copy_late_to_device();
  if (op.schema().name() == "aten::_local_scalar_dense") copy_late_to_host();
  Call(op).run(stack);
}

void copy(const c10::OperatorHandle& op, torch::jit::Stack* stack) {  // copy_(self, src, non_blocking)
  copy_late_to_device();
  const at::Tensor to = torch::jit::peek(*stack, 0, 3).toTensor(), from = torch::jit::peek(*stack, 1, 3).toTensor();
  const bool blocking = !torch::jit::peek(*stack, 2, 3).toBool();
  if (!blocking && late(to, from)) {
    torch::jit::drop(*stack, 3);
    torch::jit::push(*stack, to);
    return;
  }
  if (!to.is_cuda()) copy_late_to_host();  // which waits for the device
  Call(op).run(stack);
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<Device> device, std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  c10::DeviceGuard guard(Device(DeviceType::CUDA, index_of(device.value_or(Device(DeviceType::CUDA)))));
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<Device> device, std::optional<bool> pin) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  c10::DeviceGuard guard(Device(DeviceType::CUDA, index_of(device.value_or(Device(DeviceType::CUDA)))));
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           c10::dtype_or_default(dtype));
}

void record_stream(at::Tensor&, Stream) {}

int64_t math_attention(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double,
                       bool, std::optional<double>, bool) {
  return 0;  // SDPBackend::math
}
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
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &allocator; }
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
int64_t null_memory(int index, int what) {  // bytes now, at most, and how many allocations
  auto& counter = counters[index];
  return what == 0 ? counter.now : what == 1 ? counter.peak : counter.count;
}
void null_wait() { copy_late_to_host(); }  // the host waits for the device
void null_reset_peak(int index) { counters[index].peak = counters[index].now.load(); }

void null_compute() {
  using torch::CppFunction;
  using torch::Library;
  constexpr auto kCuda = c10::DispatchKey::CUDA;
  c10::SetAllocator(DeviceType::CUDA, &allocator);
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&math_attention);
  static Library every(Library::IMPL, "_", kCuda, __FILE__, __LINE__);
  every.fallback(CppFunction::makeFromBoxedFunction<&on_cpu>());
  static Library aten(Library::IMPL, "aten", kCuda, __FILE__, __LINE__);
  aten.impl("empty.memory_format", &empty);
  aten.impl("empty_strided", &empty_strided);
  aten.impl("record_stream", &record_stream);
  // These have one implementation for all devices, which would look for a CUDA kernel.
  aten.impl("copy_", CppFunction::makeFromBoxedFunction<&copy>());
}

void null_collectives() {  // of torch.distributed: the CPU's backend, gloo, works on the lent memory
  using torch::CppFunction;
  static torch::Library c10d(torch::Library::IMPL, "c10d", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  for (const char* name :
       {"send", "recv_", "broadcast_", "allreduce_", "allreduce_coalesced_", "allgather_", "_allgather_base_",
        "allgather_coalesced_", "allgather_into_tensor_coalesced_", "reduce_scatter_", "_reduce_scatter_base_",
        "reduce_scatter_tensor_coalesced_", "reduce_", "gather_", "scatter_", "alltoall_", "alltoall_base_", "barrier"}) {
    c10d.impl(name, CppFunction::makeFromBoxedFunction<&on_cpu>());
  }
}
}
