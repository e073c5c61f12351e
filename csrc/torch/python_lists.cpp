// Lists of Python objects: the tensors in them, and what of them is not for the kernels.
#include "python_lists.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>

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
  return gradients_of && views && any_flattened(list, true) ? Packed::Odd : Packed::Plain;
}

namespace {

// `object.name`, or None.
py::object attribute(PyObject* object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object, name);
  if (!value) PyErr_Clear();
  return value ? py::reinterpret_steal<py::object>(value) : py::none();
}

}  // namespace

py::object unwrap(const py::list& list, bool gradients_of) {
  static PyObject* const spec_name = PyUnicode_InternFromString("_spec");
  static PyObject* const local_name = PyUnicode_InternFromString("_local_tensor");
  const size_t size = list.size();
  py::list specs, gradients, gradient_specs, parts, index;
  for (size_t i = 0; i < size; i++) {
    PyObject* item = PyList_GET_ITEM(list.ptr(), i);
    if (!THPVariable_Check(item)) return py::none();
    const auto& tensor = THPVariable_Unpack(item);
    const bool wrapper = tensor.key_set().has(c10::DispatchKey::Python);
    specs.append(wrapper ? attribute(item, spec_name) : py::none());
    py::object gradient;
    if (!gradients_of) gradient = py::reinterpret_borrow<py::object>(item);
    else if (tensor.grad().defined()) gradient = py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor.grad()));
    else continue;
    py::object spec = py::none(), part = gradient;
    if (THPVariable_Unpack(gradient.ptr()).key_set().has(c10::DispatchKey::Python)) {
      spec = attribute(gradient.ptr(), spec_name);
      if (!spec.is_none()) part = attribute(gradient.ptr(), local_name);
    }
    gradients.append(gradient);
    gradient_specs.append(spec);
    parts.append(part);
    index.append(i);
  }
  if (gradients.size() == size) return py::make_tuple(specs, gradients, gradient_specs, parts, py::none());
  return py::make_tuple(specs, gradients, gradient_specs, parts, index);
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
