// The functions of torch's stable C interface (torch/csrc/stable/c/shim.h, since 2.14) that the packer calls. It is built
// without torch, so their addresses come from Python, which finds them in the libraries that torch has loaded.
#pragma once

#include <cstdint>

namespace fastclip::abi3 {

using TensorHandle = void*;  // owned by whoever got it

// Every function but the constants returns 0, or another number for an error, of which torch prints a message: so the
// packer asks nothing that a tensor might not have.
#define FASTCLIP_TORCH_SHIM(F)                                                                         \
  F(int32_t, torch_tensor_from_pyobject, (void* object, TensorHandle* result))                         \
  F(int32_t, torch_tensor_to_pyobject, (TensorHandle tensor, void* type, void** result))               \
  F(int32_t, torch_has_storage, (TensorHandle tensor, bool* result))                                   \
  F(int32_t, torch_get_num_threads, (uint32_t* result))                                                \
  F(int32_t, torch_parallel_for,                                                                       \
    (int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context)) \
  F(int32_t, aoti_torch_delete_tensor_object, (TensorHandle tensor))                                   \
  F(int32_t, aoti_torch_empty_strided,                                                                 \
    (int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device_type,    \
     int32_t device_index, TensorHandle* result))                                                      \
  F(int32_t, aoti_torch_get_data_ptr, (TensorHandle tensor, void** result))                            \
  F(int32_t, aoti_torch_get_storage_size, (TensorHandle tensor, int64_t* bytes))                       \
  F(int32_t, aoti_torch_get_storage_offset, (TensorHandle tensor, int64_t* elements))                  \
  F(int32_t, aoti_torch_get_numel, (TensorHandle tensor, int64_t* result))                             \
  F(int32_t, aoti_torch_get_dim, (TensorHandle tensor, int64_t* result))                               \
  F(int32_t, aoti_torch_get_sizes, (TensorHandle tensor, int64_t** borrowed))                          \
  F(int32_t, aoti_torch_get_strides, (TensorHandle tensor, int64_t** borrowed))                        \
  F(int32_t, aoti_torch_is_contiguous, (TensorHandle tensor, bool* result))                            \
  F(int32_t, aoti_torch_get_dtype, (TensorHandle tensor, int32_t* result))                             \
  F(int32_t, aoti_torch_get_layout, (TensorHandle tensor, int32_t* result))                            \
  F(int32_t, aoti_torch_get_device_type, (TensorHandle tensor, int32_t* result))                       \
  F(int32_t, aoti_torch_get_device_index, (TensorHandle tensor, int32_t* result))                      \
  F(int32_t, aoti_torch_dtype_float32, ())                                                             \
  F(int32_t, aoti_torch_dtype_float64, ())                                                             \
  F(int32_t, aoti_torch_dtype_bfloat16, ())                                                            \
  F(int32_t, aoti_torch_dtype_float16, ())                                                             \
  F(int32_t, aoti_torch_layout_strided, ())                                                            \
  F(int32_t, aoti_torch_device_type_cpu, ())                                                           \
  F(int32_t, aoti_torch_device_type_cuda, ())                                                          \
  F(int32_t, aoti_torch_device_type_xpu, ())

struct Shim {
#define FASTCLIP_FIELD(result, name, arguments) result(*name) arguments = nullptr;
  FASTCLIP_TORCH_SHIM(FASTCLIP_FIELD)
#undef FASTCLIP_FIELD
};

}  // namespace fastclip::abi3
