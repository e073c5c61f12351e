// A device for tests on any machine, in place of Apple's MPS: "mpslike", over torch's PrivateUse1.
//
// Like MPS it has neither float64 nor complex128, and the address of its storages is that of an object, not of memory:
// it must not be read, and says nothing of how far the memory reaches. Addresses here are 16 bytes apart, given anew as
// soon as they are free, and no process has memory there. A copy with non_blocking=True is made only
// when the host next waits for the device.
//
// Its memory is the host's. What has no kernel below runs as the CPU's, on tensors of the host that share the memory.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <functional>
#include <mutex>
#include <set>
#include <vector>

namespace {

const c10::Device DEVICE(c10::DeviceType::PrivateUse1, 0);
const c10::Stream STREAM(c10::Stream::DEFAULT, DEVICE);
const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

// ---- memory ----

struct Block {
  at::DataPtr memory;
  uintptr_t handle;
};

std::mutex mutex;  // of what the allocator and the queue below share
std::vector<uintptr_t> free_handles;
uintptr_t next_handle = 0x00d0'0000'0000'0000;  // which no process can have

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  {
    std::lock_guard<std::mutex> lock(mutex);
    free_handles.push_back(block->handle);
  }
  delete block;
}

struct DeviceAllocator final : at::Allocator {
  at::DataPtr allocate(size_t nbytes) override {
    if (nbytes == 0) return {nullptr, DEVICE};
    auto* block = new Block{at::getCPUAllocator()->allocate(nbytes), 0};
    std::memset(block->memory.get(), 0xff, nbytes);  // NaN, so that nobody relies on what was never written
    std::lock_guard<std::mutex> lock(mutex);
    if (free_handles.empty()) {
      block->handle = next_handle;
      next_handle += 16;
    } else {
      block->handle = free_handles.back();
      free_handles.pop_back();
    }
    return {reinterpret_cast<void*>(block->handle), block, &free_block, DEVICE};
  }
  void copy_data(void*, const void*, size_t) const override {
    TORCH_CHECK(false, "mpslike: an address is no memory to copy from");
  }
};

DeviceAllocator allocator;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &allocator)

void* memory_of(const c10::Storage& storage) {
  auto* block = static_cast<Block*>(storage.data_ptr().get_context());
  return block == nullptr ? nullptr : block->memory.get();
}

void resize_bytes(const c10::Storage& storage, size_t nbytes) {
  at::DataPtr data = allocator.allocate(nbytes);
  if (data && memory_of(storage) != nullptr) {
    auto* block = static_cast<Block*>(data.get_context());
    std::memcpy(block->memory.get(), memory_of(storage), std::min(nbytes, storage.nbytes()));
  }
  storage.set_data_ptr_noswap(std::move(data));
  storage.set_nbytes(nbytes);
}

// ---- what torch asks of every device ----

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::PrivateUse1> {
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  c10::Stream getStream(c10::Device) const noexcept override { return STREAM; }
  c10::Stream getDefaultStream(c10::Device) const override { return STREAM; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return STREAM; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  at::Allocator* getPinnedMemoryAllocator() const override { return at::getCPUAllocator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t nbytes) const override {
    resize_bytes(storage, nbytes);
  }
};
const bool hooked = (at::RegisterPrivateUse1HooksInterface(new Hooks), true);

void refuse_wide(c10::ScalarType dtype) {
  const char* name = dtype == at::kDouble ? "float64" : dtype == at::kComplexDouble ? "complex128" : nullptr;
  TORCH_CHECK_TYPE(name == nullptr, "Cannot convert a mpslike Tensor to ", name, " dtype as the mpslike framework ",
                   "doesn't support float64. Please use float32 instead.");
}

// ---- the host and the device ----

std::atomic<int64_t> syncs{0};
std::vector<std::function<void()>> queue;

void finish() {
  std::vector<std::function<void()>> copies;
  {
    std::lock_guard<std::mutex> lock(mutex);
    copies.swap(queue);
  }
  for (auto& copy : copies) copy();
}

// The host waits for the device.
void sync() {
  ++syncs;
  finish();
}

// A tensor like another, at the same place of `storage`.
at::Tensor view_of(const c10::Storage& storage, c10::DispatchKeySet keys, const at::Tensor& like) {
  at::Tensor view = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), keys, like.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  view._set_conj(like.is_conj());
  view._set_neg(like.is_neg());
  return view;
}

// The same memory as a tensor of the host.
at::Tensor host_of(const at::Tensor& tensor) {
  if (!tensor.is_privateuseone()) return tensor;
  refuse_wide(tensor.scalar_type());
  const c10::Storage& storage = tensor.storage();
  at::DataPtr data(memory_of(storage), c10::kCPU);
  c10::Storage host(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), nullptr, false);
  return view_of(host, c10::DispatchKeySet(c10::DispatchKey::CPU), tensor);
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool non_blocking) {
  at::AutoDispatchBelowADInplaceOrView guard;
  if (source.is_privateuseone()) refuse_wide(target.scalar_type());
  const bool waits = source.device() != target.device() && !non_blocking;
  if (waits && target.is_cpu()) sync();
  if (waits && source.is_cpu()) finish();
  if (waits || source.device() == target.device()) {
    host_of(target).copy_(host_of(source));
    return target;
  }
  const at::Tensor now = host_of(source).clone();
  std::function<void()> later;
  if (target.is_cpu()) {
    if (target.is_non_overlapping_and_dense()) std::memset(target.data_ptr(), 0xff, target.nbytes());
    later = [now, target] { target.copy_(now); };
  } else {  // Operations are run at once here, so this is too; that it would come later is checked instead.
    host_of(target).copy_(now);
    later = [now, source] {
      const at::Tensor then = source.clone();
      TORCH_CHECK(std::memcmp(then.data_ptr(), now.data_ptr(), now.nbytes()) == 0,
                  "mpslike: the source of a copy with non_blocking=True was changed before the copy was made");
    };
  }
  std::lock_guard<std::mutex> lock(mutex);
  queue.push_back(std::move(later));
  return target;
}

at::Tensor copy_from_and_resize(const at::Tensor& source, const at::Tensor& target) {
  target.resize_(source.sizes());
  return copy_from(source, target, false);
}

at::Scalar local_scalar_dense(const at::Tensor& self) {
  sync();
  return at::_local_scalar_dense(host_of(self));
}

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  refuse_wide(c10::dtype_or_default(dtype));
  return at::detail::empty_generic(size, &allocator, KEYS, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  refuse_wide(c10::dtype_or_default(dtype));
  return at::detail::empty_strided_generic(size, stride, &allocator, KEYS, c10::dtype_or_default(dtype));
}

const at::Tensor& resize_to(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  if (self.sizes() != size) impl->set_sizes_contiguous(size);
  if (format.has_value()) impl->empty_tensor_restride(*format);
  size_t needed = self.numel() ? (self.storage_offset() + self.numel()) * self.itemsize() : 0;
  if (needed > self.storage().nbytes()) resize_bytes(self.storage(), needed);
  return self;
}

at::Tensor& set_storage_offset(at::Tensor& self, at::Storage storage, int64_t offset, at::IntArrayRef size,
                               at::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  if (stride.empty() && !size.empty()) {
    impl->set_storage_offset(offset);
    impl->set_sizes_contiguous(size);
  } else {
    impl->set_sizes_and_strides(size, stride, offset);
  }
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage) {
  int64_t numel = storage.nbytes() / self.itemsize();
  return set_storage_offset(self, std::move(storage), 0, {numel}, {1});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage_offset(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Tensor& set_nothing(at::Tensor& self) {
  return set_storage_offset(self, at::empty({0}, self.options()).storage(), 0, {0}, {1});
}

// ---- everything else ----

struct Argument { at::Tensor own, host; };

// What is read back by the host to know the size of a result, or is the result.
bool waits(const std::string& name) {
  static const std::set<std::string> names{"aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2"};
  return names.count(name) != 0;
}

// Where torch takes tensors of the host, indices namely, beside those of a device.
bool mixes(const std::string& name) {
  static const std::set<std::string> names{"aten::index", "aten::index_put", "aten::index_put_",
                                           "aten::_index_put_impl_"};
  return names.count(name) != 0;
}

at::Tensor to_host(const at::Tensor& tensor, bool written, bool mixing, std::vector<Argument>& seen) {
  if (!tensor.defined()) return tensor;
  if (!tensor.is_privateuseone()) {
    TORCH_CHECK(mixing || (tensor.dim() == 0 && !written), "Expected all tensors to be on the same device, but found ",
                "at least two devices, mpslike:0 and ", tensor.device(), "!");
    return tensor;
  }
  for (const Argument& argument : seen) {
    if (argument.own.is_same(tensor)) return argument.host;
  }
  refuse_wide(tensor.scalar_type());
  bool grows = written && tensor.numel() == 0;  // as an out= may
  seen.push_back({tensor, grows ? at::empty(tensor.sizes(), tensor.options().device(at::kCPU)) : host_of(tensor)});
  return seen.back().host;
}

at::Tensor from_host(const at::Tensor& result, const std::vector<Argument>& seen) {
  if (!result.defined()) return result;
  for (const Argument& argument : seen) {
    if (argument.host.is_same(result)) return argument.own;
  }
  for (const Argument& argument : seen) {
    const bool same = result.has_storage() && argument.host.storage().data() == result.storage().data();
    if (same && result.storage().data() != nullptr) return view_of(argument.own.storage(), KEYS, result);
  }
  const at::Tensor dense = result.is_non_overlapping_and_dense() ? result : result.contiguous();
  at::Tensor own = at::empty_strided(dense.sizes(), dense.strides(), dense.options().device(DEVICE));
  host_of(own).copy_(dense);
  return own;
}

template <class Function>
c10::IValue mapped(const c10::IValue& value, Function&& map) {
  if (value.isTensor()) return map(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& t : value.toTensorVector()) list.push_back(map(t));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const auto& t : value.toOptionalTensorVector()) list.push_back(t ? std::optional(map(*t)) : std::nullopt);
    return list;
  }
  return value.isDevice() ? c10::IValue(c10::Device(c10::kCPU)) : value;
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const auto& schema = op.schema();
  const bool mixing = mixes(schema.name());
  if (waits(schema.name())) sync();
  // MPS's fused Adam and AdamW do not look at these two, and its fused SGD refuses them.
  const bool fused = schema.name().rfind("aten::_fused_", 0) == 0;
  std::vector<Argument> seen;
  const size_t first = stack->size() - schema.arguments().size();
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const auto* alias = schema.arguments()[i].alias_info();
    const bool written = alias != nullptr && alias->isWrite();
    const std::string& name = schema.arguments()[i].name();
    if (fused && (name == "grad_scale" || name == "found_inf") && !(*stack)[first + i].isNone()) {
      TORCH_CHECK(schema.name() != "aten::_fused_sgd_", "grad_scale and found_inf are not supported on mpslike");
      (*stack)[first + i] = c10::IValue();
    }
    (*stack)[first + i] =
        mapped((*stack)[first + i], [&](const at::Tensor& t) { return to_host(t, written, mixing, seen); });
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (const Argument& argument : seen) {
    if (argument.own.sizes() == argument.host.sizes()) continue;
    resize_to(argument.own, argument.host.sizes(), std::nullopt);
    host_of(argument.own).copy_(argument.host);
  }
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    (*stack)[i] = mapped((*stack)[i], [&](const at::Tensor& t) { return from_host(t, seen); });
  }
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("resize_", resize_to);
  m.impl("set_", set_nothing);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage_offset);
  m.impl("set_.source_Tensor", set_tensor);
}

// Copies resolve these themselves; what torch would do instead copies, too.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY(mpslike, m) {
  m.def("sync_count() -> int", [] { return syncs.load(); });
  m.def("synchronize() -> ()", sync);
}

}  // namespace
