// A pretend CUDA device: tensors that say cuda:0 and whose memory is the CPU's.
//
// To torch they are CUDA tensors in every respect (dispatch, autograd, autocast, storages, views). Every operator
// that torch would run on the GPU arrives at `run_on_cpu`, which hands it to the CPU kernel over the same memory. As
// a real device does, it refuses operands on two devices. Memory that is not initialised holds NaN.

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstring>
#include <map>
#include <mutex>

namespace {

const c10::Device CUDA(c10::DeviceType::CUDA, 0);
const c10::Stream STREAM(c10::Stream::DEFAULT, CUDA);

// ------------------------------------------------------------------ memory

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto memory = c10::GetCPUAllocator()->allocate(bytes);
    if (bytes) std::memset(memory.get(), 0xFF, bytes);
    memory.unsafe_set_device(CUDA);
    return memory;
  }
  c10::DeleterFnPtr raw_deleter() const override { return c10::GetCPUAllocator()->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

// Pinned memory is ordinary memory whose addresses are remembered.
struct PinnedMemory final : c10::Allocator {
  static inline std::mutex mutex;
  static inline std::map<const char*, size_t> blocks;

  static void free(void* context) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      blocks.erase(static_cast<const char*>(context));
    }
    std::free(context);
  }
  static bool holds(const void* address) {
    std::lock_guard<std::mutex> lock(mutex);
    auto block = blocks.upper_bound(static_cast<const char*>(address));
    if (block == blocks.begin()) return false;
    --block;
    return address < block->first + block->second;
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* address = std::malloc(bytes ? bytes : 1);
    std::lock_guard<std::mutex> lock(mutex);
    blocks[static_cast<const char*>(address)] = bytes;
    return {address, address, &free, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

DeviceMemory device_memory;
PinnedMemory pinned_memory;

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return CUDA.type(); }
  c10::Device exchangeDevice(c10::Device) const override { return CUDA; }
  c10::Device getDevice() const override { return CUDA; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return STREAM; }
  c10::Stream getNewStream(c10::Device, int) const override { return STREAM; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return STREAM; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};

// ------------------------------------------------------------------ operators

// CPU tensors over the memory of CUDA tensors, for one call of an operator.
class Aliases {
 public:
  at::Tensor to_cpu(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) return tensor;
    for (auto& [cuda, cpu] : tensors_)
      if (cuda.is_same(tensor)) return cpu;
    auto cpu = make(cpu_storage(tensor.storage()), c10::DispatchKey::CPU, tensor);
    tensors_.emplace_back(tensor, cpu);
    return cpu;
  }

  at::Tensor to_cuda(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cpu()) return tensor;
    for (auto& [cuda, cpu] : tensors_)
      if (cpu.is_same(tensor)) return cuda;
    for (auto& [cuda, cpu] : tensors_)
      if (cpu.is_alias_of(tensor)) return view(cuda, tensor);
    return make(cuda_storage(tensor.storage()), c10::DispatchKey::CUDA, tensor);
  }

  // Carry over what the operator resized.
  void finish() {
    for (auto& [cuda, cpu] : storages_)
      if (cpu.data() != cuda.data() || cpu.nbytes() != cuda.nbytes()) {
        cuda.set_data_ptr_noswap(memory_of(cpu, CUDA));
        cuda.set_nbytes(cpu.nbytes());
      }
    for (auto& [cuda, cpu] : tensors_)
      if (cuda.sizes() != cpu.sizes() || cuda.strides() != cpu.strides())
        cuda.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
  }

 private:
  std::vector<std::pair<at::Tensor, at::Tensor>> tensors_;      // CUDA, CPU
  std::vector<std::pair<c10::Storage, c10::Storage>> storages_;  // CUDA, CPU

  static c10::DataPtr memory_of(const c10::Storage& storage, c10::Device device) {
    auto owner = new c10::Storage(storage);
    return {storage.mutable_data(), owner, [](void* context) { delete static_cast<c10::Storage*>(context); }, device};
  }

  static c10::Storage over(const c10::Storage& storage, c10::Device device, c10::Allocator* allocator) {
    return c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), memory_of(storage, device), allocator, true);
  }

  static at::Tensor make(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
    auto tensor = at::detail::make_tensor<c10::TensorImpl>(
        std::move(storage), c10::DispatchKeySet(key), like.dtype());
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
    return tensor;
  }

  // A view is an inference tensor where its base is one, whatever mode it is made in.
  static at::Tensor view(const at::Tensor& base, const at::Tensor& like) {
    auto tensor = at::detail::make_tensor<c10::TensorImpl>(
        c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(), like.dtype());
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
    return tensor;
  }

  c10::Storage cpu_storage(const c10::Storage& storage) {
    for (auto& [cuda, cpu] : storages_)
      if (cuda.is_alias_of(storage)) return cpu;
    auto cpu = over(storage, c10::Device(c10::DeviceType::CPU), c10::GetCPUAllocator());
    storages_.emplace_back(storage, cpu);
    return cpu;
  }

  c10::Storage cuda_storage(const c10::Storage& storage) {
    for (auto& [cuda, cpu] : storages_)
      if (cpu.is_alias_of(storage)) return cuda;
    auto cuda = over(storage, CUDA, &device_memory);
    storages_.emplace_back(cuda, storage);
    return cuda;
  }
};

class Operands {
 public:
  void see(const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    if (tensor.is_cuda())
      on_cuda_ = true;
    else if (tensor.dim())  // a CPU tensor without dimensions counts as a number
      on_cpu_ = true;
  }
  bool mixed() const { return on_cuda_ && on_cpu_; }

 private:
  bool on_cuda_ = false, on_cpu_ = false;
};

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto first = stack->size() - schema.arguments().size();
  Aliases aliases;
  Operands operands;
  for (auto at = first; at < stack->size(); ++at) {
    auto& value = (*stack)[at];
    if (value.isTensor()) {
      auto tensor = value.toTensor();
      operands.see(tensor);
      value = aliases.to_cpu(tensor);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) {
        operands.see(tensor);
        list.push_back(aliases.to_cpu(tensor));
      }
      value = list;
    } else if (value.isOptionalTensorList()) {  // indices, which may be the CPU's
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
        if (tensor && tensor->is_cuda()) operands.see(*tensor);
        list.push_back(tensor ? std::optional<at::Tensor>(aliases.to_cpu(*tensor)) : std::nullopt);
      }
      value = list;
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      value = c10::Device(c10::DeviceType::CPU);
    }
  }
  TORCH_CHECK(
      !operands.mixed() || schema.name() == "aten::copy_",
      "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (", schema.name(),
      " on the pretend CUDA device)");
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    op.callBoxed(stack);
  }
  for (auto at = stack->size() - schema.returns().size(); at < stack->size(); ++at) {
    auto& value = (*stack)[at];
    if (value.isTensor()) {
      value = aliases.to_cuda(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(aliases.to_cuda(tensor));
      value = list;
    }
  }
  aliases.finish();
}

at::Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  const auto type = c10::scalarTypeToTypeMeta(dtype.value_or(at::get_default_dtype_as_scalartype()));
  const auto bytes = at::detail::computeStorageNbytes(size, stride, type.itemsize());
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(c10::Storage::use_byte_size_t(), bytes, device_memory.allocate(bytes), &device_memory, true),
      c10::DispatchKeySet(c10::DispatchKey::CUDA), type);
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return tensor;
}

at::Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
    std::optional<at::Device> device, std::optional<bool> pinned, std::optional<at::MemoryFormat>) {
  std::vector<int64_t> stride(size.size(), 1);
  for (auto at = static_cast<int64_t>(size.size()) - 2; at >= 0; --at)
    stride[at] = stride[at + 1] * std::max<int64_t>(size[at + 1], 1);
  return empty_strided(size, stride, dtype, layout, device, pinned);
}

at::Tensor& set_storage(
    at::Tensor& tensor, c10::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return tensor;
}

// The same memory as a tensor of the other device, for stand-ins written in Python.
at::Tensor on_cpu(const at::Tensor& tensor) { return Aliases().to_cpu(tensor); }
at::Tensor on_cuda(const at::Tensor& tensor) { return Aliases().to_cuda(tensor); }

}  // namespace

namespace at {

struct PretendHooks : public CUDAHooksInterface {
  explicit PretendHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* data) const override { return PinnedMemory::holds(data); }
};

C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, PretendHooks);

}  // namespace at

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
}

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  c10::SetAllocator(c10::DeviceType::CUDA, &device_memory);
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

// What torch composes of pieces that ask for a kernel of the device themselves.
TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY(pretend, library) {
  library.def("on_cpu(Tensor(a) tensor) -> Tensor(a)");
  library.def("on_cuda(Tensor(a) tensor) -> Tensor(a)");
}

TORCH_LIBRARY_IMPL(pretend, CUDA, library) { library.impl("on_cpu", &on_cpu); }
TORCH_LIBRARY_IMPL(pretend, CPU, library) { library.impl("on_cuda", &on_cuda); }
