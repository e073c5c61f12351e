// The only file that knows Python: lists of parameters in, groups and tensors out.
#include <ATen/EmptyTensor.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <optional>
#include <vector>

#include "cpu.h"

namespace fastclip {
namespace {

constexpr int64_t LONG_WORK = 1 << 22;  // elements; long enough for other threads to want the interpreter meanwhile

// The tensors of a Python list, or null if any item is no tensor. Good until the next call on this thread.
const std::vector<c10::TensorImpl*>* tensors_of(PyObject* list) {
  static thread_local std::vector<c10::TensorImpl*> tensors;
  tensors.clear();
  if (!PyList_CheckExact(list)) return nullptr;
  const Py_ssize_t size = PyList_GET_SIZE(list);
  tensors.reserve(size);
  for (Py_ssize_t i = 0; i < size; i++) {
    PyObject* item = PyList_GET_ITEM(list, i);
    if (!THPVariable_Check(item)) return nullptr;
    tensors.push_back(THPVariable_Unpack(item).unsafeGetTensorImpl());
  }
  return &tensors;
}

// A Python float or int as a double; NaN for anything else.
double number(PyObject* object) {
  if (PyFloat_Check(object)) return PyFloat_AS_DOUBLE(object);
  if (!PyLong_CheckExact(object)) return NAN;
  const double value = PyLong_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) PyErr_Clear();
  return value;
}

at::Tensor scalar(double value, at::ScalarType dtype) {
  at::Tensor t = at::detail::empty_cpu({}, at::TensorOptions().dtype(dtype));
  if (dtype == at::kDouble) *t.mutable_data_ptr<double>() = value;
  else *t.mutable_data_ptr<float>() = float(value);
  return t;
}

py::list wrap(std::vector<Group>&& groups) {
  py::list list;
  for (auto& group : groups) {
    group.own();
    list.append(py::cast(std::move(group)));
  }
  return list;
}

// global_norm(items: list, clip: bool, max_norm: float, norm_type: float, error_if_nonfinite: bool)
//
// The norm of the gradients of parameters, clipped to max_norm; or, unless `clip`, just the norm of tensors.
// pack -> measure -> decide -> apply in one call for the commonest case: plain gradients on the CPU.
// Returns the norm; or the packed groups, untouched, when they are for another path; or None when the list or an
// argument wants the general path (fastclip/functional.py), which handles it or says what is wrong with it.
PyObject* global_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 5) {
    PyErr_SetString(PyExc_TypeError, "global_norm takes 5 arguments");
    return nullptr;
  }
  const bool clip = args[1] == Py_True;
  const double max_norm = clip ? number(args[2]) : 0, p = number(args[3]);
  if (!(max_norm >= 0) || !(p > 0)) Py_RETURN_NONE;
  const int refuses = PyObject_IsTrue(args[4]);
  if (refuses < 0) return nullptr;
  const auto* tensors = tensors_of(args[0]);
  if (!tensors || tensors->empty()) Py_RETURN_NONE;
  std::vector<Group> groups;
  if (pack(*tensors, /*gradients_of=*/clip, groups) == Packed::Odd || groups.empty()) Py_RETURN_NONE;
  int64_t work = 0;
  bool wide = false;
  for (const auto& group : groups) {
    if (!group.device.is_cpu()) return wrap(std::move(groups)).release().ptr();
    work += group.work;
    wide |= group.dtype == at::kDouble;
  }

  std::optional<py::gil_scoped_release> released;
  if (work > LONG_WORK) {
    for (auto& group : groups) group.own();
    released.emplace();
  }
  Moments moments;
  for (const auto& group : groups) moments.combine(cpu::measure(group, p, /*absmax=*/false, nullptr));
  const double norm = finish_norm(norm_kind(p), p, moments.power, moments.absmax);
  const bool refuse = refuses && !std::isfinite(norm);
  if (clip && !refuse) {
    const double coef = clip_coefficient(norm, max_norm);
    for (const auto& group : groups) cpu::apply_(group, &coef, 0);
  }
  released.reset();
  if (refuse) return wrap(std::move(groups)).release().ptr();
  for (auto& group : groups) recycle(std::move(group));
  return THPVariable_Wrap(scalar(norm, wide ? at::kDouble : at::kFloat));
  END_HANDLE_TH_ERRORS
}

// The groups of a list of tensors, or None if it wants the general packer.
py::object pack_list(const py::list& list, bool gradients_of) {
  const auto* tensors = tensors_of(list.ptr());
  std::vector<Group> groups;
  if (!tensors || pack(*tensors, gradients_of, groups) == Packed::Odd) return py::none();
  return wrap(std::move(groups));
}

py::list tensors(const Group& group) {
  py::list list;
  for (const auto& owner : group.owners)
    list.append(py::reinterpret_steal<py::object>(THPVariable_Wrap(at::Tensor(owner).detach())));
  return list;
}

// int64 [2, T] on the host: addresses, element counts.
at::Tensor addresses_and_sizes(const Group& group) {
  const int64_t n = group.segments.size();
  at::Tensor table = at::detail::empty_cpu({2, n}, at::TensorOptions().dtype(at::kLong));
  auto* out = table.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; i++) {
    out[i] = reinterpret_cast<int64_t>(group.segments[i].data);
    out[n + i] = group.segments[i].numel;
  }
  return table;
}

// (power [T], absmax [T], norm [], its clip coefficient [] or None, total [2]), all float64; the last three of this group
// and of `before`, the total of groups measured before it.
py::tuple measure(const Group& group, double p, std::optional<double> max_norm, const std::optional<at::Tensor>& before) {
  const int64_t n = group.segments.size();
  const auto options = at::TensorOptions().dtype(at::kDouble);
  at::Tensor power = at::detail::empty_cpu({n}, options), absmax = at::detail::empty_cpu({n}, options);
  at::Tensor total = at::detail::empty_cpu({2}, options);
  Moments all;
  {
    py::gil_scoped_release released;
    std::vector<Moments> per_segment(n);
    all = cpu::measure(group, p, /*absmax=*/true, per_segment.data());
    auto *powers = power.mutable_data_ptr<double>(), *maxima = absmax.mutable_data_ptr<double>();
    int64_t nonzero = 0;
    for (int64_t i = 0; i < n; i++) {
      powers[i] = per_segment[i].power;
      maxima[i] = per_segment[i].absmax;
      nonzero += powers[i] != 0;
    }
    if (p == 0) all.power = double(nonzero);
  }
  if (before) all.combine({before->const_data_ptr<double>()[0], before->const_data_ptr<double>()[1]});
  total.mutable_data_ptr<double>()[0] = all.power;
  total.mutable_data_ptr<double>()[1] = all.absmax;
  const double norm = finish_norm(norm_kind(p), p, all.power, all.absmax);
  py::object coef = py::none();
  if (max_norm) coef = py::cast(scalar(clip_coefficient(norm, *max_norm), at::kDouble));
  return py::make_tuple(power, absmax, scalar(norm, at::kDouble), coef, total);
}

// pack, measure, decide and apply for a Clipper whose one rule is the global norm: what `measure` gives, and whether the
// gradients are float64; or the packed groups, untouched, or None, as global_norm does. No gradient is owned meanwhile:
// nothing here runs Python.
py::object clip_all(const py::list& list, double p, double max_norm) {
  const auto* tensors = tensors_of(list.ptr());
  std::vector<Group> groups;
  if (!tensors || pack(*tensors, /*gradients_of=*/true, groups) == Packed::Odd || groups.empty()) return py::none();
  if (groups.size() > 1 || !groups[0].device.is_cpu() || groups[0].work > LONG_WORK) return wrap(std::move(groups));
  Group& group = groups[0];
  const int64_t n = group.segments.size();
  static thread_local std::vector<Moments> per_segment;
  per_segment.resize(n);  // all are written below
  const auto all = cpu::measure(group, p, /*absmax=*/true, per_segment.data());
  const double norm = finish_norm(norm_kind(p), p, all.power, all.absmax), coef = clip_coefficient(norm, max_norm);
  cpu::apply_(group, &coef, 0);
  const auto options = at::TensorOptions().dtype(at::kDouble);
  at::Tensor power = at::detail::empty_cpu({n}, options), absmax = at::detail::empty_cpu({n}, options);
  auto *powers = power.mutable_data_ptr<double>(), *maxima = absmax.mutable_data_ptr<double>();
  for (int64_t i = 0; i < n; i++) {
    powers[i] = per_segment[i].power;
    maxima[i] = per_segment[i].absmax;
  }
  const bool wide = group.dtype == at::kDouble;
  recycle(std::move(group));
  return py::make_tuple(power, absmax, scalar(norm, at::kDouble), scalar(coef, at::kDouble), wide);
}

// coef: float64 on the host, [] or [T]
void apply_(const Group& group, const at::Tensor& coef) {
  TORCH_CHECK(coef.is_cpu() && coef.scalar_type() == at::kDouble && coef.is_contiguous() &&
                  (coef.dim() == 0 || coef.numel() == int64_t(group.segments.size())),
              "coef must be float64, on the CPU, of shape [] or [", group.segments.size(), "], got ",
              coef.scalar_type(), " ", coef.sizes());
  cpu::apply_(group, coef.const_data_ptr<double>(), coef.dim() == 0 ? 0 : 1);
}

// ---- optimizer steps ----

// Whether an array of a parameter has its elements where the gradient has them.
bool matches(const c10::TensorImpl& tensor, const c10::TensorImpl& gradient) {
  if (!plain(tensor) || tensor.dtype() != gradient.dtype() || tensor.device() != gradient.device()) return false;
  if (tensor.sizes() != gradient.sizes()) return false;
  return tensor.strides() == gradient.strides() || (tensor.is_contiguous() && gradient.is_contiguous());
}

void* memory(const c10::TensorImpl& tensor) {
  return static_cast<char*>(tensor.unsafe_storage().mutable_data()) +
      tensor.storage_offset() * c10::elementSize(c10::typeMetaToScalarType(tensor.dtype()));
}

// The group and the states of an optimizer step over parameters, gradients, and each of `states` (a list or None), in
// the same order; `steps` are float32 counters or None. False if any of them is not as the kernels need it.
bool pack_step(const py::list& params, const py::list& grads, const std::vector<py::object>& lists, const py::object& steps,
               Group& group, cpu::States& states, std::vector<c10::TensorImpl*>& written) {
  std::vector<std::vector<c10::TensorImpl*>> columns;
  auto add = [&](const py::object& list) {
    if (list.is_none()) {
      columns.emplace_back();
      return true;
    }
    const auto* tensors = tensors_of(list.ptr());
    if (!tensors || tensors->size() != grads.size()) return false;
    columns.push_back(*tensors);
    return true;
  };
  if (!add(grads) || !add(params) || !add(steps)) return false;
  for (const auto& list : lists)
    if (!add(list)) return false;
  std::vector<Group> groups;
  if (pack(columns[0], /*gradients_of=*/false, groups) == Packed::Odd || groups.size() != 1) return false;
  group = std::move(groups[0]);
  if (!group.device.is_cpu() || group.segments.size() != columns[0].size()) return false;
  for (size_t i = 0; i < group.segments.size(); i++) {
    cpu::States::Segment segment{};
    for (size_t c = 1; c < columns.size(); c++) {
      if (columns[c].empty()) continue;
      auto& tensor = *columns[c][i];
      if (c == 2) {
        if (!plain(tensor) || !tensor.is_cpu() || tensor.numel() != 1 ||
            c10::typeMetaToScalarType(tensor.dtype()) != at::kFloat)
          return false;
        segment.step = static_cast<float*>(memory(tensor));
      } else {
        if (!matches(tensor, *columns[0][i])) return false;
        (c == 1 ? segment.param : segment.state[c - 3]) = memory(tensor);
      }
    }
    states.segments.push_back(segment);
  }
  written = columns[1];
  return true;
}

// coef: float64 on the host, [] or [T]
template <class Options, class Step>
bool take_step(Step step, const py::list& params, const py::list& grads, const std::vector<py::object>& lists,
               const py::object& steps, const at::Tensor& coef, const Options& options, bool maximize,
               bool zero_grad, std::optional<uint32_t> seed) {
  Group group;
  cpu::States states;
  std::vector<c10::TensorImpl*> written;
  if (!pack_step(params, grads, lists, steps, group, states, written)) return false;
  states.maximize = maximize;
  states.zero_grad = zero_grad;
  states.stochastic = seed.has_value();
  states.seed = seed.value_or(0);
  group.own();
  {
    py::gil_scoped_release released;
    step(group, states, options, coef.const_data_ptr<double>(), coef.dim() == 0 ? 0 : 1);
  }
  for (auto* tensor : written)
    if (!tensor->is_inference()) tensor->bump_version();
  for (size_t i = 0; zero_grad && i < group.segments.size(); i++) group.bump_version(i);
  return true;
}

bool adamw_(const py::list& params, const py::list& grads, const std::vector<py::object>& states, const py::object& steps,
            const at::Tensor& coef, double lr, double beta1, double beta2, double eps, double weight_decay, bool maximize,
            bool zero_grad, std::optional<uint32_t> seed) {
  return take_step(cpu::adamw_, params, grads, states, steps, coef,
                   cpu::AdamWOptions{lr, beta1, beta2, eps, weight_decay}, maximize, zero_grad, seed);
}

bool sgd_(const py::list& params, const py::list& grads, const std::vector<py::object>& states, const at::Tensor& coef,
          double lr, double momentum, double rest, double weight_decay, bool nesterov, bool maximize, bool zero_grad,
          std::optional<uint32_t> seed) {
  return take_step(cpu::sgd_, params, grads, states, py::none(), coef,
                   cpu::SgdOptions{lr, momentum, rest, weight_decay, nesterov}, maximize, zero_grad, seed);
}

PyMethodDef fastcall[] = {
    {"global_norm", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(global_norm)), METH_FASTCALL,
     "pack, measure, decide and apply in one call"},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  py::class_<Group>(m, "Group")
      .def("__len__", [](const Group& g) { return g.segments.size(); })
      .def_readonly("device", &Group::device)
      .def_property_readonly("dtype", [](const Group& g) { return py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(torch::getTHPDtype(g.dtype))); })
      .def_readonly("positions", &Group::positions)
      .def_property_readonly("tensors", &tensors)
      .def("addresses_and_sizes", &addresses_and_sizes)
      .def("bump_version", [](const Group& g) { for (size_t i = 0; i < g.segments.size(); i++) g.bump_version(i); });
  using Released = py::call_guard<py::gil_scoped_release>;
  m.def("pack", &pack_list);
  m.def("measure", &measure);
  m.def("clip_all", &clip_all);
  m.def("apply_", &apply_, Released());
  m.def("clamp_", &cpu::clamp_, Released());
  m.def("adamw_", &adamw_);
  m.def("sgd_", &sgd_);
  m.def("isa", &cpu::isa);
  PyModule_AddFunctions(m.ptr(), fastcall);
}

}  // namespace fastclip
