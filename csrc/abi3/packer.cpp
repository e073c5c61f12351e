// The packer for torch >= 2.14 that needs no compiler: a Python module on CPython's limited API (3.10) and torch's stable C
// interface, so that one build serves all later versions of both. What it cannot say is plain, it leaves to the packer in
// Python, fastclip/packers/python.py.
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "../cpu/launch.h"
#include "torch_shim.h"

namespace fastclip::abi3 {
namespace {

constexpr int64_t LONG_WORK =
    1 << 22;  // elements; takes long enough for other threads to want the interpreter meanwhile

Shim torch;
decltype(&cpu::fastclip_cpu_clip) clip_tables;
decltype(&cpu::fastclip_cpu_table) fill_table;
struct {
  PyObject *tensor, *parameter;                                            // types
  PyObject *is_neg, *untyped_storage, *storage_data_ptr, *storage_nbytes;  // methods of tensors
  PyObject *bump_versions, *is_watched;                                    // functions
  PyObject *grad, *is_nested;                                              // names of attributes
} python;
bool alone = false;

// A reference that is given back.
class Object {
 public:
  explicit Object(PyObject* owned = nullptr) : object_(owned) {}
  Object(Object&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Object& operator=(Object&& other) noexcept { return std::swap(object_, other.object_), *this; }
  ~Object() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_;
};

class Tensor {
 public:
  explicit Tensor(TensorHandle owned) : handle_(owned) {}
  static Tensor of(PyObject* object) {
    TensorHandle handle = nullptr;
    torch.torch_tensor_from_pyobject(object, &handle);
    return Tensor(handle);
  }
  Tensor(const Tensor&) = delete;
  ~Tensor() {
    if (handle_) torch.aoti_torch_delete_tensor_object(handle_);
  }
  explicit operator bool() const { return handle_ != nullptr; }

  template <class Result, class Get>
  Result ask(Get get) const {
    Result result{};
    get(handle_, &result);
    return result;
  }
  Object object() const {
    void* result = nullptr;
    torch.torch_tensor_to_pyobject(handle_, nullptr, &result);
    return Object(static_cast<PyObject*>(result));
  }

 private:
  TensorHandle handle_;
};

// Gradients of one device and dtype, in the order of the call.
struct Group {
  int32_t device_type, device_index;
  Dtype dtype;
  std::vector<int64_t> addresses, numels, positions;  // positions among all gradients
};

struct Found {
  std::vector<Object> gradients;
  std::vector<Object> storages;  // of the gradients, which keep their memory alive; empty until hold()
  std::vector<Group> groups;
  int64_t elements = 0;
};

int64_t itemsize_of(Dtype dtype) { return dtype == Dtype::F64 ? 8 : dtype == Dtype::F32 ? 4 : 2; }

bool kernel_dtype(int32_t dtype, Dtype& result) {
  if (dtype == torch.aoti_torch_dtype_float32()) result = Dtype::F32;
  else if (dtype == torch.aoti_torch_dtype_bfloat16()) result = Dtype::BF16;
  else if (dtype == torch.aoti_torch_dtype_float16()) result = Dtype::F16;
  else if (dtype == torch.aoti_torch_dtype_float64()) result = Dtype::F64;
  else return false;
  return true;
}

// Whether a tensor that is not contiguous has no gaps and no element twice: its dimensions, from the innermost stride on,
// follow each other.
bool is_dense(const Tensor& tensor) {
  const auto dim = tensor.ask<int64_t>(torch.aoti_torch_get_dim);
  const auto* sizes = tensor.ask<int64_t*>(torch.aoti_torch_get_sizes);
  const auto* strides = tensor.ask<int64_t*>(torch.aoti_torch_get_strides);
  std::vector<std::pair<int64_t, int64_t>> order;
  for (int64_t i = 0; i < dim; i++)
    if (sizes[i] != 1) order.emplace_back(strides[i], sizes[i]);
  std::sort(order.begin(), order.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : order) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

bool is_plain_type(PyObject* object) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == python.tensor || type == python.parameter;
}

// Whether `object`, a True or False that is given back, is False.
bool is_false(PyObject* object) {
  if (!object) PyErr_Clear();
  return Object(object).get() == Py_False;
}

bool is_on_cpu(PyObject* object) {
  const auto tensor = Tensor::of(object);
  return tensor && tensor.ask<int32_t>(torch.aoti_torch_get_device_type) == torch.aoti_torch_device_type_cpu();
}

// Whether a gradient is real memory, as far as Python must be asked. Other threads may run meanwhile.
bool is_real(PyObject* gradient) {
  return is_false(PyObject_GetAttr(gradient, python.is_nested)) &&
      is_false(PyObject_CallFunctionObjArgs(python.is_neg, gradient, nullptr));
}

// An integer that a method of `object` returns; -1 if it fails.
int64_t integer(PyObject* method, PyObject* object) {
  const Object result(PyObject_CallFunctionObjArgs(method, object, nullptr));
  const int64_t value = result ? PyLong_AsLongLong(result.get()) : -1;
  if (PyErr_Occurred()) PyErr_Clear();
  return value;
}

// Appends a gradient to the group that it belongs to. False if it is not plain memory that the kernels know. Where a storage
// is held, the address is the storage's, whatever another thread does to the gradient; else no other thread can run.
bool add(PyObject* gradient, PyObject* storage, int64_t position, std::vector<Group>& groups) {
  const auto tensor = Tensor::of(gradient);
  Dtype dtype;
  if (!tensor || !tensor.ask<bool>(torch.torch_has_storage) ||
      tensor.ask<int32_t>(torch.aoti_torch_get_layout) != torch.aoti_torch_layout_strided() ||
      !kernel_dtype(tensor.ask<int32_t>(torch.aoti_torch_get_dtype), dtype))
    return false;
  const auto device = tensor.ask<int32_t>(torch.aoti_torch_get_device_type);
  const auto index = tensor.ask<int32_t>(torch.aoti_torch_get_device_index);
  if (device != torch.aoti_torch_device_type_cpu() && device != torch.aoti_torch_device_type_cuda() &&
      device != torch.aoti_torch_device_type_xpu())
    return false;
  if (!tensor.ask<bool>(torch.aoti_torch_is_contiguous) && !is_dense(tensor)) return false;
  const auto numel = tensor.ask<int64_t>(torch.aoti_torch_get_numel);
  const auto begin = tensor.ask<int64_t>(torch.aoti_torch_get_storage_offset) * itemsize_of(dtype);
  auto address = reinterpret_cast<int64_t>(tensor.ask<void*>(torch.aoti_torch_get_data_ptr));
  auto bytes = tensor.ask<int64_t>(torch.aoti_torch_get_storage_size);
  if (numel > 0 && !address) return false;
  if (storage) {
    address = integer(python.storage_data_ptr, storage) + begin;
    bytes = integer(python.storage_nbytes, storage);
  }
  if (numel > 0 && bytes < begin + numel * itemsize_of(dtype)) return false;  // freed
  auto group = std::find_if(groups.begin(), groups.end(), [&](const Group& g) {
    return g.device_type == device && g.device_index == index && g.dtype == dtype;
  });
  if (group == groups.end()) group = groups.insert(group, Group{device, index, dtype, {}, {}, {}});
  group->addresses.push_back(address);
  group->numels.push_back(numel);
  group->positions.push_back(position);
  return true;
}

// Whether two gradients share memory, also if they are the same one.
bool any_overlap(const std::vector<Group>& groups) {
  std::vector<std::pair<int64_t, int64_t>> spans;
  for (const auto& group : groups)
    for (size_t i = 0; i < group.addresses.size(); i++)
      if (group.numels[i] > 0)
        spans.emplace_back(group.addresses[i], group.addresses[i] + group.numels[i] * itemsize_of(group.dtype));
  if (!std::is_sorted(spans.begin(), spans.end())) std::sort(spans.begin(), spans.end());
  for (size_t i = 1; i < spans.size(); i++)
    if (spans[i].first < spans[i - 1].second) return true;
  return false;
}

// The gradients of a list of parameters, or its tensors themselves. False if an item is not a plain parameter, or if
// `on_cpu` and the first one is elsewhere.
bool collect(PyObject* items, bool gradients_of, bool on_cpu, Found& found) {
  if (!PyList_CheckExact(items)) return false;
  const Py_ssize_t size = PyList_Size(items);
  found.gradients.reserve(size);
  for (Py_ssize_t i = 0; i < size; i++) {
    PyObject* item = PyList_GetItem(items, i);
    if (!item || !is_plain_type(item)) return PyErr_Clear(), false;
    Object gradient(gradients_of ? PyObject_GetAttr(item, python.grad) : (Py_INCREF(item), item));
    if (gradient.get() == Py_None) continue;
    if (!gradient || !is_plain_type(gradient.get())) return PyErr_Clear(), false;
    if (on_cpu && found.gradients.empty() && !is_on_cpu(gradient.get())) return false;
    found.gradients.push_back(std::move(gradient));
  }
  for (const auto& gradient : found.gradients)
    if (!is_real(gradient.get())) return false;
  return !found.gradients.empty();
}

// Holds the storages of the gradients. False if one has none.
bool hold(Found& found) {
  for (const auto& gradient : found.gradients) {
    Object storage(PyObject_CallFunctionObjArgs(python.untyped_storage, gradient.get(), nullptr));
    if (!storage) return PyErr_Clear(), false;
    found.storages.push_back(std::move(storage));
  }
  return true;
}

// Sorts the gradients into groups. False if one is not plain, or two overlap.
bool group(Found& found) {
  found.groups.clear();
  found.elements = 0;
  for (size_t i = 0; i < found.gradients.size(); i++)
    if (!add(found.gradients[i].get(), found.storages.empty() ? nullptr : found.storages[i].get(), i, found.groups))
      return false;
  std::vector<PyObject*> empty;
  for (const auto& group : found.groups) {
    for (size_t i = 0; i < group.numels.size(); i++) {
      found.elements += group.numels[i];
      if (group.numels[i] == 0) empty.push_back(found.gradients[group.positions[i]].get());
    }
  }
  std::sort(empty.begin(), empty.end());  // without elements they are the same only as one object
  return std::adjacent_find(empty.begin(), empty.end()) == empty.end() && !any_overlap(found.groups);
}

Object list_of(const std::vector<Object>& objects) {
  Object list(PyList_New(0));
  for (const auto& object : objects)
    if (!list || PyList_Append(list.get(), object.get()) < 0) return Object();
  return list;
}

Object bytes_of(const std::vector<int64_t>& numbers) {
  return Object(PyBytes_FromStringAndSize(reinterpret_cast<const char*>(numbers.data()), numbers.size() * 8));
}

// pack(items: list, gradients_of: bool) -> None, or (gradients, their storages, groups): lists, a group being a tuple of
// three bytes objects that hold an int64 for each of its gradients: addresses, element counts, positions.
PyObject* pack(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2) return PyErr_SetString(PyExc_TypeError, "pack takes 2 arguments"), nullptr;
  Found found;
  if (!collect(args[0], args[1] == Py_True, false, found) || !hold(found) || !group(found)) Py_RETURN_NONE;
  const Object gradients = list_of(found.gradients), storages = list_of(found.storages), groups(PyList_New(0));
  if (!gradients || !storages || !groups) return nullptr;
  for (const auto& group : found.groups) {
    const Object addresses = bytes_of(group.addresses), numels = bytes_of(group.numels),
                 positions = bytes_of(group.positions);
    if (!addresses || !numels || !positions) return nullptr;
    const Object one(PyTuple_Pack(3, addresses.get(), numels.get(), positions.get()));
    if (!one || PyList_Append(groups.get(), one.get()) < 0) return nullptr;
  }
  return PyTuple_Pack(3, gradients.get(), storages.get(), groups.get());
}

// A new tensor on the CPU, [count] or, for count < 0, []; `fill` writes its memory.
template <class Fill>
Object new_tensor(int64_t count, int32_t dtype, Fill fill) {
  const int64_t stride = 1;
  TensorHandle handle = nullptr;
  torch.aoti_torch_empty_strided(count >= 0, &count, &stride, dtype, torch.aoti_torch_device_type_cpu(), 0, &handle);
  if (!handle) return PyErr_SetString(PyExc_RuntimeError, "torch could not make a tensor"), Object();
  const Tensor tensor(handle);
  fill(tensor.ask<void*>(torch.aoti_torch_get_data_ptr));
  return tensor.object();
}

Object scalar(double value, bool wide) {
  return new_tensor(-1, wide ? torch.aoti_torch_dtype_float64() : torch.aoti_torch_dtype_float32(), [&](void* memory) {
    if (wide) *static_cast<double*>(memory) = value;
    else *static_cast<float*>(memory) = float(value);
  });
}

Object column(const std::vector<NormPartial>& each, double NormPartial::* field) {
  return new_tensor(each.size(), torch.aoti_torch_dtype_float64(), [&](void* memory) {
    for (size_t i = 0; i < each.size(); i++) static_cast<double*>(memory)[i] = each[i].*field;
  });
}

// Tell autograd which gradients were written. False: an error.
bool bump_versions(const Found& found, const std::vector<char>& written) {
  if (std::find(written.begin(), written.end(), char(1)) == written.end()) return true;
  const Object list(PyList_New(0));
  size_t i = 0;
  for (const auto& group : found.groups)
    for (auto position : group.positions)
      if (written[i++] && (!list || PyList_Append(list.get(), found.gradients[position].get()) < 0)) return false;
  return bool(Object(PyObject_CallFunctionObjArgs(python.bump_versions, list.get(), nullptr)));
}

// A Python float or int as a double; NaN for anything else.
double number(PyObject* object) {
  if (PyFloat_Check(object)) return PyFloat_AsDouble(object);
  if (!PyLong_CheckExact(object)) return NAN;
  const double value = PyLong_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) PyErr_Clear();
  return value;
}

// clip_norm_fused as FusedClip in fastclip/packers/base.py has it, but that it returns None in place of groups: its caller
// packs again.
PyObject* clip_norm_fused(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 6) return PyErr_SetString(PyExc_TypeError, "clip_norm_fused takes 6 arguments"), nullptr;
  const bool clips = args[1] == Py_True, per_tensor = args[5] == Py_True;
  const int refuses = PyObject_IsTrue(args[4]);
  if (refuses < 0) return nullptr;
  const cpu::ClipOptions options{number(args[3]), clips ? number(args[2]) : 0, clips, refuses == 1};
  if (!(options.max_norm >= 0) || !(options.p > 0)) Py_RETURN_NONE;
  if (!is_false(PyObject_CallFunctionObjArgs(python.is_watched, nullptr))) Py_RETURN_NONE;

  Found found;
  if (!collect(args[0], clips, true, found) || !group(found)) Py_RETURN_NONE;
  if (per_tensor && found.groups.size() > 1) Py_RETURN_NONE;
  const bool is_long = found.elements > LONG_WORK;
  if (is_long && (!hold(found) || !group(found))) Py_RETURN_NONE;
  // Since group() took the addresses nothing of Python has run, and nothing will before the kernels are done: unless the
  // interpreter is released, for which the storages are held.
  std::vector<char> written(found.gradients.size());
  std::vector<cpu::Segment> segments(found.gradients.size());
  std::vector<cpu::Table> tables(found.groups.size());
  bool wide = false;
  size_t first = 0;
  for (size_t i = 0; i < tables.size(); i++) {
    const auto& g = found.groups[i];
    if (g.device_type != torch.aoti_torch_device_type_cpu()) Py_RETURN_NONE;
    wide |= g.dtype == Dtype::F64;
    fill_table(g.addresses.data(), g.numels.data(), g.addresses.size(), int32_t(g.dtype), &written[first],
               &segments[first], &tables[i]);
    first += g.addresses.size();
  }
  std::vector<NormPartial> each(per_tensor ? segments.size() : 0);
  uint32_t workers = 1;
  if (!alone) torch.torch_get_num_threads(&workers);
  const cpu::Threads threads{workers, torch.torch_parallel_for};
  cpu::GlobalNorm all;
  PyThreadState* const released = is_long ? PyEval_SaveThread() : nullptr;
  const bool refused =
      clip_tables(tables.data(), tables.size(), &threads, &options, per_tensor ? each.data() : nullptr, &all);
  if (released) PyEval_RestoreThread(released);
  if (refused) Py_RETURN_NONE;
  if (!bump_versions(found, written)) return nullptr;
  if (!per_tensor) return scalar(all.norm, wide).release();
  const Object power = column(each, &NormPartial::power), absmax = column(each, &NormPartial::absmax),
               norm = scalar(all.norm, true), coef = scalar(all.coef, true);
  if (!power || !absmax || !norm || !coef) return nullptr;
  return PyTuple_Pack(5, power.get(), absmax.get(), norm.get(), coef.get(), wide ? Py_True : Py_False);
}

// work_alone(): with one thread from now on, since torch's do not survive a fork.
PyObject* work_alone(PyObject*, PyObject* const*, Py_ssize_t) {
  alone = true;
  Py_RETURN_NONE;
}

void* address(PyObject* addresses, const char* name) {
  PyObject* found = PyDict_GetItemString(addresses, name);
  void* value = found ? PyLong_AsVoidPtr(found) : nullptr;
  if (!value) PyErr_Format(PyExc_RuntimeError, "the packer was not given the address of %s", name);
  return value;
}

// bind(addresses: dict of function names, objects: dict of the names in `python`): what the module works with.
PyObject* bind(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2) return PyErr_SetString(PyExc_TypeError, "bind takes 2 arguments"), nullptr;
#define FASTCLIP_BIND(result, name, arguments)                                                          \
  if (void* found = address(args[0], #name)) torch.name = reinterpret_cast<result(*) arguments>(found); \
  else return nullptr;
  FASTCLIP_TORCH_SHIM(FASTCLIP_BIND)
#undef FASTCLIP_BIND
  clip_tables = reinterpret_cast<decltype(clip_tables)>(address(args[0], "fastclip_cpu_clip"));
  fill_table = reinterpret_cast<decltype(fill_table)>(address(args[0], "fastclip_cpu_table"));
  if (!clip_tables || !fill_table) return nullptr;
  const std::pair<const char*, PyObject**> objects[] = {
      {"tensor", &python.tensor},
      {"parameter", &python.parameter},
      {"is_neg", &python.is_neg},
      {"untyped_storage", &python.untyped_storage},
      {"storage_data_ptr", &python.storage_data_ptr},
      {"storage_nbytes", &python.storage_nbytes},
      {"bump_versions", &python.bump_versions},
      {"is_watched", &python.is_watched},
  };
  for (const auto& [name, place] : objects) {
    PyObject* found = PyDict_GetItemString(args[1], name);
    if (!found) return PyErr_Format(PyExc_RuntimeError, "the packer was not given %s", name), nullptr;
    Py_INCREF(found);  // for as long as the process lives
    *place = found;
  }
  python.grad = PyUnicode_InternFromString("grad");
  python.is_nested = PyUnicode_InternFromString("is_nested");
  Py_RETURN_NONE;
}

template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)>
PyMethodDef method(const char* name, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, doc};
}

PyMethodDef methods[] = {
    method<bind>("bind", "what the module works with"),
    method<pack>("pack", "gradients as groups"),
    method<clip_norm_fused>("clip_norm_fused", "pack, measure, decide and apply in one call"),
    method<work_alone>("work_alone", "with one thread from now on"),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "packer", "See csrc/abi3/packer.cpp.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace fastclip::abi3

PyMODINIT_FUNC PyInit_packer() {
#define FASTCLIP_NAME(result, name, arguments) #name,
  const char* names[] = {FASTCLIP_TORCH_SHIM(FASTCLIP_NAME)};
#undef FASTCLIP_NAME
  PyObject *module = PyModule_Create(&fastclip::abi3::definition), *list = PyList_New(0);
  for (const char* name : names) {
    PyObject* text = PyUnicode_FromString(name);
    if (list && text) PyList_Append(list, text);
    Py_XDECREF(text);
  }
  if (!module || PyModule_AddObject(module, "TORCH_FUNCTIONS", list) < 0) return nullptr;
  return module;
}
