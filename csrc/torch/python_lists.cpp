// Lists of Python objects: the tensors in them, and what of them is not for the kernels.
#include "python_lists.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <structmember.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

namespace fastclip {

const std::vector<c10::TensorImpl*>* tensors_of(PyObject* list, bool* subclass) {
  static thread_local std::vector<c10::TensorImpl*> tensors;
  tensors.clear();
  if (!PyList_CheckExact(list)) return nullptr;
  const Py_ssize_t size = PyList_GET_SIZE(list);
  tensors.reserve(size);
  for (Py_ssize_t i = 0; i < size; i++) {
    PyObject* item = PyList_GET_ITEM(list, i);
    if (!THPVariable_Check(item)) return nullptr;
    if (subclass && !THPVariable_CheckTypeExact(Py_TYPE(item))) {
      *subclass = true;
      if (THPVariable_Unpack(item).key_set().has(c10::DispatchKey::Python)) return nullptr;
    }
    tensors.push_back(THPVariable_Unpack(item).unsafeGetTensorImpl());
  }
  return &tensors;
}

bool watched() { return c10::impl::TorchDispatchModeTLS::any_modes_set() || at::impl::torch_function_mode_enabled(); }

namespace {

// Whether this process is one of several that train together: whether it has a default process group.
bool has_process_group(PyObject* modules) {
  static PyObject* const module = PyUnicode_InternFromString("torch.distributed.distributed_c10d");
  static PyObject* const name = PyUnicode_InternFromString("GroupMember");
  static PyObject* const world = PyUnicode_InternFromString("WORLD");
  static PyObject* holder = nullptr;  // the class whose attribute is the group; kept for the life of the process
  if (!holder) {
    PyObject* loaded = PyDict_GetItem(modules, module);
    if (!loaded || !(holder = PyObject_GetAttr(loaded, name))) return PyErr_Clear(), false;
  }
  PyObject* group = PyObject_GetAttr(holder, world);
  if (!group) return PyErr_Clear(), true;  // unknown
  Py_DECREF(group);
  return group != Py_None;
}

// Whether a parameter is one of FSDP1's flat ones, or a view of one: each rank has another part of them. Looks at none
// where FSDP1 is not loaded (torch.compile loads it) or has no process group, and unless `all` only at those of one
// dimension, as flat ones are.
bool any_flattened(PyObject* list, bool all) {
  static PyObject* const module = PyUnicode_InternFromString("torch.distributed.fsdp._flat_param");
  static PyObject* const mark = PyUnicode_InternFromString("_fsdp_flattened");
  PyObject* modules = PyImport_GetModuleDict();
  if (!modules || PyDict_Contains(modules, module) != 1 || !has_process_group(modules)) return false;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); i++) {
    PyObject* item = PyList_GET_ITEM(list, i);
    if ((all || THPVariable_Unpack(item).dim() == 1) && PyObject_HasAttr(item, mark)) return true;
  }
  return false;
}

}  // namespace

Packed pack_items(PyObject* list, bool gradients_of, std::vector<Group>& groups) {
  bool subclass = false, views = false;
  const auto* tensors = tensors_of(list, &subclass);
  // Before any address is taken, since a subclass may run Python here.
  if (!tensors || (gradients_of && any_flattened(list, subclass))) return Packed::Odd;
  if (pack(*tensors, gradients_of, groups, &views) == Packed::Odd) return Packed::Odd;
  if (!gradients_of || !views) return Packed::Plain;
  for (auto& group : groups) group.own();  // a subclass may run Python here, too
  return any_flattened(list, true) ? Packed::Odd : Packed::Plain;
}

namespace {

// One of the __slots__ of DTensor, read from where it lies in the object: getattr() would take longer than all else.
class Slot {
 public:
  explicit Slot(const char* name) : name_(PyUnicode_InternFromString(name)) {}

  // The value, borrowed; null if there is none.
  PyObject* of(PyObject* object) {
    if (Py_TYPE(object) != type_) find(Py_TYPE(object));
    return offset_ ? *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset_) : attribute(object);
  }

 private:
  void find(PyTypeObject* type) {
    type_ = type;
    offset_ = 0;
    PyObject* descriptor = PyObject_GetAttr(reinterpret_cast<PyObject*>(type), name_);
    if (!descriptor) return PyErr_Clear();
    if (Py_TYPE(descriptor) == &PyMemberDescr_Type)
      offset_ = reinterpret_cast<PyMemberDescrObject*>(descriptor)->d_member->offset;
    Py_DECREF(descriptor);
  }

  PyObject* attribute(PyObject* object) {  // of a wrapper that keeps it elsewhere, alive as long as that does
    PyObject* value = PyObject_GetAttr(object, name_);
    if (!value) return PyErr_Clear(), nullptr;
    Py_DECREF(value);
    return value;
  }

  PyObject* const name_;
  PyTypeObject* type_ = nullptr;  // of the object before
  Py_ssize_t offset_ = 0;         // in objects of that type; 0: the slot is not in them
};

constexpr size_t BLOCK = 16;  // tensors whose cache misses overlap, as in pack.cpp

bool is_wrapper(const at::Tensor& tensor) { return tensor.key_set().has(c10::DispatchKey::Python); }

void prefetch(const at::Tensor& tensor) {
  const auto* impl = reinterpret_cast<const char*>(tensor.unsafeGetTensorImpl());
  for (size_t line : {0, 64, 128}) __builtin_prefetch(impl + line);
}

// The objects as a list, or None if `expected` is a list of the same ones.
py::object list_unless(const std::vector<PyObject*>& objects, const py::object& expected) {
  if (PyList_CheckExact(expected.ptr()) && size_t(PyList_GET_SIZE(expected.ptr())) == objects.size()) {
    size_t i = 0;
    while (i < objects.size() && PyList_GET_ITEM(expected.ptr(), i) == objects[i]) i++;
    if (i == objects.size()) return py::none();
  }
  py::list list(objects.size());
  for (size_t i = 0; i < objects.size(); i++) PyList_SET_ITEM(list.ptr(), i, (Py_INCREF(objects[i]), objects[i]));
  return list;
}

}  // namespace

py::object unwrap(const py::list& list, bool gradients_of, const py::object& expected_specs,
                  const py::object& expected_gradient_specs) {
  static Slot spec_slot("_spec"), part_slot("_local_tensor");
  const size_t size = list.size();
  std::vector<PyObject*> specs(size, Py_None), gradient_specs;
  gradient_specs.reserve(size);
  py::list gradients, parts;
  std::vector<size_t> index;
  PyObject* block[BLOCK];
  for (size_t start = 0; start < size; start += BLOCK) {
    const size_t count = std::min(BLOCK, size - start);
    PyObject** items = &PyList_GET_ITEM(list.ptr(), start);
    for (size_t i = 0; i < count; i++) __builtin_prefetch(items[i]);
    for (size_t i = 0; i < count; i++) {
      if (!THPVariable_Check(items[i])) return py::none();
      prefetch(THPVariable_Unpack(items[i]));
    }
    if (gradients_of)
      for (size_t i = 0; i < count; i++)
        __builtin_prefetch(THPVariable_Unpack(items[i]).unsafeGetTensorImpl()->autograd_meta());
    for (size_t i = 0; i < count; i++) {
      const auto& tensor = THPVariable_Unpack(items[i]);
      if (is_wrapper(tensor))
        if (PyObject* spec = spec_slot.of(items[i])) specs[start + i] = spec;
      if (gradients_of && tensor.grad().defined()) prefetch(tensor.grad());
    }
    for (size_t i = 0; i < count; i++) {
      const auto& tensor = THPVariable_Unpack(items[i]);
      block[i] = nullptr;
      if (!gradients_of) block[i] = (Py_INCREF(items[i]), items[i]);
      else if (tensor.grad().defined()) block[i] = THPVariable_Wrap(tensor.grad());
    }
    for (size_t i = 0; i < count; i++) {
      if (!block[i]) continue;
      const auto gradient = py::reinterpret_steal<py::object>(block[i]);
      PyObject *spec = Py_None, *part = block[i];
      if (is_wrapper(THPVariable_Unpack(block[i]))) {
        if (PyObject* found = spec_slot.of(block[i])) {
          spec = found;
          part = part_slot.of(block[i]);
        }
      }
      gradients.append(gradient);
      gradient_specs.push_back(spec);
      parts.append(py::reinterpret_borrow<py::object>(part));
      index.push_back(start + i);
    }
  }
  py::object positions = py::none();
  if (index.size() < size) positions = py::cast(index);
  return py::make_tuple(list_unless(specs, expected_specs), gradients,
                        list_unless(gradient_specs, expected_gradient_specs), parts, positions);
}

void bump_versions(const py::list& list) {
  for (size_t i = 0; i < list.size(); i++) {
    const auto& tensor = THPVariable_Unpack(PyList_GET_ITEM(list.ptr(), i));
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  }
}

bool same_items(const py::list& a, const py::list& b) {
  const size_t size = a.size();
  if (size != b.size()) return false;
  for (size_t i = 0; i < size; i++)
    if (PyList_GET_ITEM(a.ptr(), i) != PyList_GET_ITEM(b.ptr(), i)) return false;
  return true;
}

}  // namespace fastclip
