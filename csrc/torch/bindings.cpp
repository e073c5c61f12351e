// The Python module: lists of parameters in, groups and tensors out; and the CPU kernels called with torch's
// threads.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "../cpu/launch.h"
#include "pack.h"
#include "pack_step.h"
#include "python_lists.h"

namespace fastclip {
namespace {

constexpr int64_t LONG_WORK =
    1 << 22;  // elements; takes long enough for other threads to want the interpreter meanwhile

bool alone = false;  // whether to do without other threads

// OpenMP's threads do not survive fork(): a child process that gives them work waits for ever.
void work_alone() { alone = true; }

cpu::Threads threads() { return {alone ? 1 : at::get_num_threads(), torch_parallel_for}; }

bool clamp_(const Group& group, double low, double high) {
  const auto table = group.table();
  const auto workers = threads();
  return cpu::fastclip_cpu_clamp(&table, &workers, low, high);
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

// Every new Python object may start the garbage collector, which runs Python, which may free a gradient: own all first.
py::list wrap(std::vector<Group>&& groups) {
  for (auto& group : groups) group.own();
  py::list list;
  for (auto& group : groups) list.append(py::cast(std::move(group)));
  return list;
}

// Statistics of each segment as two tensors, float64 [T].
struct PerTensor {
  at::Tensor power, absmax;

  explicit PerTensor(const std::vector<NormPartial>& segments) {
    const auto options = at::TensorOptions().dtype(at::kDouble);
    const int64_t n = segments.size();
    power = at::detail::empty_cpu({n}, options);
    absmax = at::detail::empty_cpu({n}, options);
    auto *powers = power.mutable_data_ptr<double>(), *maxima = absmax.mutable_data_ptr<double>();
    for (int64_t i = 0; i < n; i++) {
      powers[i] = segments[i].power;
      maxima[i] = segments[i].absmax;
    }
  }
};

// clip_norm_fused(items: list, of_parameters: bool, max_norm: float, norm_type: float, error_if_nonfinite: bool,
//                 per_tensor: bool)
//
// The norm of the gradients of parameters, clipped to max_norm; or, unless `of_parameters`, just the norm of tensors.
// pack -> measure -> decide -> apply in one call for the commonest case: plain gradients on the CPU. Returns
// - the norm, float32 (float64 if a gradient is); if `per_tensor`, (power [T], absmax [T], norm, coefficient, whether a
//   gradient is float64) instead, all but the last float64;
// - the packed groups, untouched, when another path must handle them (for `per_tensor`, also those of several dtypes);
// - None when the list or an argument needs the general path, which handles it or explains what is wrong with it.
PyObject* clip_norm_fused(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 6) {
    PyErr_SetString(PyExc_TypeError, "clip_norm_fused takes 6 arguments");
    return nullptr;
  }
  const bool clips = args[1] == Py_True, per_tensor = args[5] == Py_True;
  const int refuses = PyObject_IsTrue(args[4]);
  if (refuses < 0) return nullptr;
  const cpu::ClipOptions options{number(args[3]), clips ? number(args[2]) : 0, clips, refuses == 1};
  if (!(options.max_norm >= 0) || !(options.p > 0)) Py_RETURN_NONE;
  std::vector<Group> groups;
  if (watched() || pack_items(args[0], /*gradients_of=*/clips, groups) == Packed::Odd || groups.empty()) Py_RETURN_NONE;
  int64_t work = 0;
  bool wide = false, elsewhere = per_tensor && groups.size() > 1;
  for (const auto& group : groups) {
    elsewhere |= !group.device.is_cpu();
    work += group.work;
    wide |= group.dtype == at::kDouble;
  }
  if (elsewhere) return wrap(std::move(groups)).release().ptr();

  // Until the interpreter is released nothing runs Python, so the gradients need no owner.
  std::optional<py::gil_scoped_release> released;
  if (work > LONG_WORK) {
    for (auto& group : groups) group.own();
    released.emplace();
  }
  static thread_local std::vector<NormPartial> per_segment;
  per_segment.resize(per_tensor ? groups[0].segments.size() : 0);  // all are written below
  static thread_local std::vector<cpu::Table> tables;
  tables.clear();
  for (const auto& group : groups) tables.push_back(group.table());
  const auto workers = threads();
  cpu::GlobalNorm all;
  const bool refused = cpu::fastclip_cpu_clip(tables.data(), tables.size(), &workers, &options,
                                              per_tensor ? per_segment.data() : nullptr, &all);
  released.reset();
  if (refused) return wrap(std::move(groups)).release().ptr();
  for (auto& group : groups) recycle(std::move(group));
  if (!per_tensor) return THPVariable_Wrap(scalar(all.norm, wide ? at::kDouble : at::kFloat));
  const PerTensor each(per_segment);
  return py::make_tuple(each.power, each.absmax, scalar(all.norm, at::kDouble), scalar(all.coef, at::kDouble), wide)
      .release()
      .ptr();
  END_HANDLE_TH_ERRORS
}

// The statistics of the gradients of parameters: (power [T], absmax [T], norm [], all float64, whether the gradients are
// float64, the fingerprint of their group). No gradient is owned, which takes longer than to read a small one; Python runs
// nothing until they have been read. Where they are in several groups, or on another device, or where reading takes long,
// what pack() returns.
py::object measure_gradients(const py::list& list, double p) {
  std::vector<Group> groups;
  if (watched() || pack_items(list.ptr(), /*gradients_of=*/true, groups) == Packed::Odd) return py::none();
  if (groups.size() != 1 || !groups[0].device.is_cpu() || groups[0].work > LONG_WORK) return wrap(std::move(groups));
  auto& group = groups[0];
  static thread_local std::vector<NormPartial> per_segment;
  per_segment.resize(group.segments.size());  // all are written below
  cpu::GlobalNorm all;
  const auto table = group.table();
  const auto workers = threads();
  cpu::fastclip_cpu_global_norm(&table, &workers, p, INFINITY, nullptr, per_segment.data(), &all);
  const uint64_t fingerprint = group.fingerprint();
  const bool wide = group.dtype == at::kDouble;
  recycle(std::move(group));
  const PerTensor each(per_segment);
  return py::make_tuple(each.power, each.absmax, scalar(all.norm, at::kDouble), wide, fingerprint);
}

// The groups of a list of tensors, or None if it needs the general packer.
py::object pack_list(const py::list& list, bool gradients_of) {
  std::vector<Group> groups;
  if (pack_items(list.ptr(), gradients_of, groups) == Packed::Odd) return py::none();
  return wrap(std::move(groups));
}

// The memory of the gradients: with their shapes, or flat where they have been given other memory since.
py::list tensors(const Group& group) {
  py::list list;
  for (size_t i = 0; i < group.owners.size(); i++) {
    at::Tensor tensor;
    if (group.has_its_memory(i)) {
      tensor = at::Tensor(group.owners[i]).detach();
    } else {
      const auto& [segment, storage] = std::tie(group.segments[i], group.storages[i]);
      const int64_t itemsize = c10::elementSize(group.dtype);
      const int64_t offset = static_cast<char*>(segment.data) - static_cast<char*>(storage.mutable_data());
      TORCH_CHECK(offset >= 0 && offset + segment.numel * itemsize <= int64_t(storage.nbytes()),
                  "the storage of gradient ", i, " was freed or shrunk while it was being clipped");
      tensor = at::empty({0}, at::TensorOptions().dtype(group.dtype).device(group.device));
      tensor.set_(storage, offset / itemsize, {segment.numel}, {1});
    }
    list.append(py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor)));
  }
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

// The group of all rows of tensors of two or more dimensions, and of all other tensors whole; null unless every row is
// one piece of memory. A gradient that was given other memory since the group was made is an error: its rows are unknown.
std::unique_ptr<Group> units(const Group& group) {
  auto made = std::make_unique<Group>();
  made->device = group.device;
  made->dtype = group.dtype;
  const size_t itemsize = c10::elementSize(group.dtype);
  for (size_t i = 0; i < group.owners.size(); i++) {
    TORCH_CHECK(group.has_its_memory(i), "gradient ", i, " of ", group.segments.size(),
                " was given other memory (its .data) while it was being clipped");
    const auto& s = group.segments[i];
    const auto& t = *group.gradient(i);
    const int64_t rows = t.dim() > 1 && s.numel > 0 ? t.size(0) : 1, size = s.numel / rows;
    if (rows > 1 && t.stride(0) != size) return nullptr;
    for (int64_t r = 0; r < rows; r++)
      made->add(static_cast<char*>(s.data) + r * size * itemsize, size, group.gradient(i));
  }
  return made;
}

// (power [T], absmax [T], norm [], its clip coefficient [] or None, total [2]), all float64; the last three of this group
// and of `before`, the total of groups measured before it.
py::tuple measure_group(const Group& group, double p, std::optional<double> max_norm,
                        const std::optional<at::Tensor>& before) {
  std::vector<NormPartial> per_segment(group.segments.size());
  NormPartial earlier;
  if (before) earlier = {before->const_data_ptr<double>()[0], before->const_data_ptr<double>()[1]};
  cpu::GlobalNorm all;
  {
    py::gil_scoped_release released;
    const auto table = group.table();
    const auto workers = threads();
    cpu::fastclip_cpu_global_norm(&table, &workers, p, max_norm.value_or(INFINITY), before ? &earlier : nullptr,
                                  per_segment.data(), &all);
  }
  at::Tensor total = at::detail::empty_cpu({2}, at::TensorOptions().dtype(at::kDouble));
  total.mutable_data_ptr<double>()[0] = all.power;
  total.mutable_data_ptr<double>()[1] = all.absmax;
  py::object coef = py::none();
  if (max_norm) coef = py::cast(scalar(all.coef, at::kDouble));
  const PerTensor each(per_segment);
  return py::make_tuple(each.power, each.absmax, scalar(all.norm, at::kDouble), coef, total);
}

// coef: float64 on the host, [] or [T]
void apply_tensor(const Group& group, const at::Tensor& coef) {
  TORCH_CHECK(coef.is_cpu() && coef.scalar_type() == at::kDouble && coef.is_contiguous() &&
                  (coef.dim() == 0 || coef.numel() == int64_t(group.segments.size())),
              "coef must be float64, on the CPU, of shape [] or [", group.segments.size(), "], got ",
              coef.scalar_type(), " ", coef.sizes());
  const auto table = group.table();
  const auto workers = threads();
  cpu::fastclip_cpu_apply(&table, &workers, coef.const_data_ptr<double>(), coef.dim() == 0 ? 0 : 1);
}

// ---- optimizer steps ----

// A StepGroup, and the Python objects of everything but its gradients, which keep the tensors alive.
struct KeptStepGroup : StepGroup {
  explicit KeptStepGroup(StepGroup&& step) : StepGroup(std::move(step)) {}
  std::vector<py::tuple> tensors;
};

// The group of parameters, gradients and each of `lists` (a list of state tensors), in the same order; `steps` are float32
// counters, or there are none. None if pack() gives none.
std::unique_ptr<KeptStepGroup> pack_step_lists(const py::list& params, const py::list& grads,
                                               const std::vector<py::list>& lists, const py::list& steps) {
  std::vector<std::vector<c10::TensorImpl*>> columns;
  for (const auto* list : {&grads, &params, &steps}) {
    const auto* tensors = tensors_of(list->ptr());
    if (!tensors) return nullptr;
    columns.push_back(*tensors);
  }
  for (const auto& list : lists) {
    const auto* tensors = tensors_of(list.ptr());
    if (!tensors) return nullptr;
    columns.push_back(*tensors);
  }
  auto packed = pack_step(columns);
  if (!packed) return nullptr;
  auto made = std::make_unique<KeptStepGroup>(std::move(*packed));
  for (const auto* list : {&params, &steps}) made->tensors.emplace_back(*list);
  for (const auto& list : lists) made->tensors.emplace_back(list);
  return made;
}

// coef: float64 [] or [T]; frozen: bool [] or [T]; both on the host
template <class Options, class Step>
void take_step(Step step, const StepGroup& group, const at::Tensor& coef, const std::optional<at::Tensor>& frozen,
               const Options& options, bool maximize, bool zero_grad, std::optional<uint32_t> seed) {
  cpu::StepDecision decision{};
  decision.coef = coef.const_data_ptr<double>();
  decision.coef_stride = coef.dim() == 0 ? 0 : 1;
  decision.frozen = frozen ? frozen->const_data_ptr<bool>() : nullptr;
  decision.frozen_stride = frozen && frozen->dim() ? 1 : 0;
  decision.seed = seed.value_or(0);
  decision.stochastic = seed.has_value();
  decision.maximize = maximize;
  decision.zero_grad = zero_grad;
  py::gil_scoped_release released;
  const auto table = group.group.table();
  const auto workers = threads();
  step(&table, &workers, group.segments.data(), &decision, &options);
}

void adamw_(const KeptStepGroup& group, const at::Tensor& coef, const std::optional<at::Tensor>& frozen, double lr,
            double beta1, double beta2, double eps, double weight_decay, bool maximize, bool zero_grad,
            std::optional<uint32_t> seed) {
  const cpu::AdamWOptions options{lr, beta1, beta2, eps, weight_decay};
  take_step(cpu::fastclip_cpu_adamw, group, coef, frozen, options, maximize, zero_grad, seed);
}

void sgd_(const KeptStepGroup& group, const at::Tensor& coef, const std::optional<at::Tensor>& frozen, double lr,
          double momentum, double one_minus_dampening, double weight_decay, bool nesterov, bool maximize,
          bool zero_grad, std::optional<uint32_t> seed) {
  const cpu::SgdOptions options{lr, momentum, one_minus_dampening, weight_decay, nesterov};
  take_step(cpu::fastclip_cpu_sgd, group, coef, frozen, options, maximize, zero_grad, seed);
}

PyMethodDef fastcall[] = {
    {"clip_norm_fused", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(clip_norm_fused)), METH_FASTCALL,
     "pack, measure, decide and apply in one call"},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  py::class_<Group>(m, "Group")
      .def("__len__", [](const Group& g) { return g.segments.size(); })
      .def_readonly("device", &Group::device)
      .def_property_readonly(
          "dtype",
          [](const Group& g) {
            return py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(torch::getTHPDtype(g.dtype)));
          })
      .def_readonly("positions", &Group::positions)
      .def_property_readonly("tensors", &tensors)
      .def("addresses_and_sizes", &addresses_and_sizes)
      .def("units", &units, py::keep_alive<0, 1>())
      .def("fingerprint", &Group::fingerprint)
      .def("bump_version", [](const Group& g) {
        for (size_t i = 0; i < g.segments.size(); i++) g.bump_version(i);
      });
  py::class_<KeptStepGroup>(m, "StepGroup")
      .def("addresses", [](const KeptStepGroup& g) { return step_addresses(g); })
      .def("bump_version", [](const KeptStepGroup& g, bool gradients) { g.bump_version(gradients); });
  using Released = py::call_guard<py::gil_scoped_release>;
  m.def("pack", &pack_list);
  m.def("measure_gradients", &measure_gradients);
  m.def("same_items", &same_items);
  m.def("unwrap", &unwrap);
  m.def("bump_versions", &bump_versions);
  m.def("measure", &measure_group);
  m.def("apply_", &apply_tensor, Released());
  m.def("clamp_", &clamp_, Released());
  m.def("pack_step", &pack_step_lists);
  m.def("adamw_", &adamw_);
  m.def("sgd_", &sgd_);
  m.def("isa", &cpu::fastclip_cpu_isa);
  m.def("work_alone", &work_alone);
  PyModule_AddFunctions(m.ptr(), fastcall);
}

}  // namespace fastclip
