// A device that is none: its memory is the processor's, and so are its kernels, but PyTorch takes it for an accelerator.
// It refuses what CUDA refuses: tensors and generators of the processor among its own. It counts what would make CUDA
// wait (numbers read, tensors copied back, shapes that hang on numbers), and refuses that too while it is watched.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <atomic>
#include <set>

namespace {

constexpr auto HERE = c10::DeviceType::PrivateUse1;
std::atomic<bool> watching{false};
std::atomic<int> waited{0};
thread_local int inside = 0;  // calls of a kernel, whose own copies are no copies of the program's

struct Inside {
  Inside() { ++inside; }
  ~Inside() { --inside; }
};

void waits(const char* what) {
  if (inside) return;
  ++waited;
  TORCH_CHECK(!watching, "the device would be waited for: ", what);
}

void release(void* memory) { c10::free_cpu(memory); }

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = bytes ? c10::alloc_cpu(bytes) : nullptr;
    return {memory, memory, &release, c10::Device(HERE, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(HERE, &memory);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<HERE> {
  c10::Device getDevice() const override { return {HERE, 0}; }
  c10::Device exchangeDevice(c10::Device) const override { return {HERE, 0}; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, c10::Device(HERE, 0)); }
  // All that was asked is done: there is nothing to wait for.
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};

// The same memory as a tensor of the processor.
at::Tensor host(const at::Tensor& tensor) {
  if (!tensor.is_privateuseone()) return tensor;
  auto options = tensor.options().device(c10::kCPU);
  return at::from_blob(tensor.mutable_data_ptr(), tensor.sizes(), tensor.strides(), options);
}

at::Tensor empty(
    at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &memory, keys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &memory, keys, c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (to.is_cpu()) waits("a copy to the processor");
  if (from.is_cpu() && !non_blocking) waits("a blocking copy from the processor");
  host(to).copy_(host(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) const_cast<at::Tensor&>(to).resize_(from.sizes());
  return copy_from(from, to, false);
}

const at::Tensor& resize(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  auto contiguous = c10::contiguous_strides(size);
  auto bytes = at::detail::computeStorageNbytes(size, contiguous, self.itemsize(), self.storage_offset());
  auto* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  if (bytes > storage->nbytes()) {
    auto fresh = memory.allocate(bytes);
    if (storage->nbytes()) std::memcpy(fresh.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(fresh));
    storage->set_nbytes(bytes);
  }
  impl->set_sizes_contiguous(size);
  return self;
}

at::Scalar number(const at::Tensor& self) {
  waits("a number is read");
  return at::_local_scalar_dense(host(self));
}

at::Tensor& set(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_storage_offset(offset);
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return self;
}

at::Tensor& set_all(at::Tensor& self, at::Storage source) {
  int64_t size = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set(self, std::move(source), 0, {size}, {1});
}

// Operators of which CUDA takes indices from the processor, after copying them.
const std::set<std::string> INDEXING = {
    "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"};

void look(const at::Tensor& tensor, const std::string& name, bool listed) {
  if (!tensor.defined() || !tensor.is_cpu() || (tensor.dim() == 0 && !listed)) return;
  if (INDEXING.count(name) && !watching) return;
  TORCH_CHECK(
      false, "Expected all tensors to be on the same device, but found at least two, pretend:0 and cpu! (", name,
      " of a tensor of shape ", tensor.sizes(), ")");
}

at::Tensor back(const at::Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  auto made = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(HERE));
  host(made).copy_(tensor);
  return made;
}

// Convolutions are the one kind of operators that never comes to a fallback.
at::Tensor convolved(
    const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef rest, int64_t groups) {
  look(x, "convolution", true);
  look(w, "convolution", true);
  auto b = bias && bias->defined() ? std::optional<at::Tensor>(host(*bias)) : std::nullopt;
  return back(at::convolution(host(x), host(w), b, stride, padding, dilation, transposed, rest, groups));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolved_back(
    const at::Tensor& g, const at::Tensor& x, const at::Tensor& w, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, bool transposed, at::IntArrayRef rest, int64_t groups, std::array<bool, 3> wanted) {
  auto [gx, gw, gb] = at::convolution_backward(
      host(g), host(x), host(w), at::OptionalIntArrayRef(w.size(transposed ? 1 : 0) * (transposed ? groups : 1)), stride, padding, dilation,
      transposed, rest, groups, wanted);
  return {back(gx), back(gw), back(gb)};
}

// Operators whose result, or its shape, CUDA has to read.
const std::set<std::string> WAITING = {
    "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2", "aten::unique_dim", "aten::bincount",
    "aten::unique_consecutive", "aten::unique_dim_consecutive", "aten::is_nonzero", "aten::histc",
    "aten::repeat_interleave"};
// It moves running statistics without saying so: a fallback would move copies of them.
std::tuple<at::Tensor, at::Tensor, at::Tensor> normed(
    const at::Tensor& x, const std::optional<at::Tensor>& w, const std::optional<at::Tensor>& b,
    const std::optional<at::Tensor>& mean, const std::optional<at::Tensor>& variance, bool training, double momentum,
    double eps) {
  auto here = [](const std::optional<at::Tensor>& t) {
    return t && t->defined() ? std::optional<at::Tensor>(host(*t)) : std::nullopt;
  };
  auto [y, m, s] = at::native_batch_norm(
      host(x), here(w), here(b), here(mean), here(variance), training, momentum, eps);
  return {back(y), back(m), back(s)};
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  if (WAITING.count(name)) waits(name.c_str());
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  for (const auto& value : arguments) {
    if (value.isTensor()) {
      look(value.toTensor(), name, false);
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorList()) look(tensor, name, true);
    } else if (value.isOptionalTensorList()) {
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList()) {
        if (!tensor) continue;
        look(*tensor, name, true);
        if (tensor->defined() && tensor->scalar_type() == at::kBool) waits("an index by a mask");
      }
    } else if (value.isGenerator()) {
      TORCH_CHECK(
          !value.toGenerator().defined() || value.toGenerator().device().type() == HERE,
          "Expected a 'pretend' device type for generator but found 'cpu' (", name, ")");
    }
  }
  Inside here;
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  // Its loss of a shape of its own would be taken for one to be resized.
  m.impl("mse_loss", torch::CppFunction::makeFromBoxedFunction<&fallback>());
  m.impl("native_batch_norm", normed);
  m.impl("convolution_overrideable", convolved);
  m.impl("convolution_backward_overrideable", convolved_back);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("resize_", resize);
  m.impl("_local_scalar_dense", number);
  m.impl("set_.source_Storage", set_all);
  m.impl("set_.source_Storage_storage_offset", set);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("view_as_complex", at::native::view_as_complex);
}

[[maybe_unused]] const bool registered = (at::RegisterPrivateUse1HooksInterface(new Hooks), true);

}  // namespace

// Whether it looks for what would make CUDA wait; gives back whether it did.
extern "C" int watch(int on) { return watching.exchange(on); }

// How often it would have made CUDA wait so far.
extern "C" int waits_so_far() { return waited; }
