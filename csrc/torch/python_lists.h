// Lists of Python objects: the tensors in them, and what of them is not for the kernels.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <vector>

#include "pack.h"

namespace fastclip {

// The tensors of a Python list, or null if any item is no tensor. Good until the next call on this thread.
// `subclass`: whether any is of another type than Tensor and Parameter; null then for a wrapper subclass too. (A DTensor
// counts whether or not it has a gradient: ranks that have one wait for those that have none.)
const std::vector<c10::TensorImpl*>* tensors_of(PyObject* list, bool* subclass = nullptr);

// Whether a mode is active that intercepts operations (fake tensors, make_fx, FlopCounterMode): it would not see these.
bool watched();

// The groups of a list of parameters' gradients, or of tensors. Packed::Odd if the list needs the general packer.
Packed pack_items(PyObject* list, bool gradients_of, std::vector<Group>& groups);

// From tensors, or the gradients of parameters, to this rank's parts of those that are DTensors: (the _spec of each item,
// gradients, the _spec of each, parts, and the index of each gradient among the items or None if all have one). A _spec is
// None for what is no DTensor; in place of a list of specs None, if they are the expected ones. None if an item is no tensor.
py::object unwrap(const py::list& list, bool gradients_of, const py::object& expected_specs,
                  const py::object& expected_gradient_specs);

// Tell autograd that tensors were written.
void bump_versions(const py::list& list);

// Whether two lists hold the same objects in the same order.
bool same_items(const py::list& a, const py::list& b);

}  // namespace fastclip
