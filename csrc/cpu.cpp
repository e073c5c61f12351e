// CPU launchers: a group's chunks, shared out to threads by work, each chunk by the kernels of this machine.
#include "cpu.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>

namespace fastclip::cpu {
namespace {

constexpr int64_t SERIAL_WORK = 1 << 16;  // below this many elements waking the threads costs more than it gives

constexpr int64_t PREFETCH_BYTES = 2048;

bool alone = false;  // in a child of fork()

struct Isa {
  const char* name;
  const CpuKernels* kernels;
};

Isa choose() {
  const char* asked = std::getenv("FASTCLIP_CPU_ISA");
  const std::string limit = asked && *asked ? asked : "avx512";  // native.py has refused unknown names
#if defined(__x86_64__)
  // Whatever has AVX2 has F16C, which not every compiler can ask for.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && limit == "avx512") return {"avx512", &avx512::kernels};
  if (avx2 && limit != "portable") return {"avx2", &avx2::kernels};
#endif
  return {"portable", &portable::kernels};
}

const Isa& chosen() {
  static const Isa isa = choose();
  return isa;
}

const DtypeKernels& kernels_of(at::ScalarType dtype) {
  const auto index = dtype == at::kFloat ? Dtype::F32
      : dtype == at::kDouble             ? Dtype::F64
      : dtype == at::kBFloat16           ? Dtype::BF16
                                         : Dtype::F16;
  return chosen().kernels->of[int(index)];
}

struct Place {  // a chunk: of which segment, and which of its chunks
  size_t segment;
  int64_t chunk;
};

// Where the part of the group that begins after `work` elements starts.
Place place_of(const Group& group, int64_t work) {
  if (work >= group.work) return {group.segments.size(), 0};
  auto after = std::upper_bound(group.segments.begin(), group.segments.end(), work,
                                [](int64_t w, const Segment& s) { return w < s.work; });
  auto segment = std::prev(after);
  const int64_t chunks = (segment->numel + CPU_CHUNK - 1) / CPU_CHUNK;
  const int64_t chunk = (work - segment->work + CPU_CHUNK - 1) / CPU_CHUNK;
  if (chunk >= chunks) return {size_t(after - group.segments.begin()), 0};
  return {size_t(segment - group.segments.begin()), chunk};
}

int64_t end_chunk(const Group& group, size_t i) {
  return i + 1 < group.segments.size() ? group.segments[i + 1].first_chunk : group.chunks;
}

// The hardware follows a stream of addresses but cannot guess where the next tensor lies.
void prefetch(const Segment& s, size_t itemsize) {
  const auto* data = static_cast<const char*>(s.data);
  const int64_t bytes = std::min<int64_t>(s.numel * itemsize, PREFETCH_BYTES);
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(data + b);
}

// body(segment index, segment, chunk of the segment, its first byte, its elements) for every chunk of the group.
template <class Body>
void for_each_chunk(const Group& group, Body body) {
  const size_t itemsize = c10::elementSize(group.dtype);
  auto run = [&](Place from, Place to) {
    for (size_t i = from.segment; i < group.segments.size() && i <= to.segment; i++) {
      const auto& s = group.segments[i];
      if (i + 1 < group.segments.size()) prefetch(group.segments[i + 1], itemsize);
      const int64_t chunks = (s.numel + CPU_CHUNK - 1) / CPU_CHUNK;
      const int64_t end = i == to.segment ? to.chunk : chunks;
      for (int64_t c = i == from.segment ? from.chunk : 0; c < end; c++)
        body(i, s, c, static_cast<char*>(s.data) + c * CPU_CHUNK * itemsize,
             std::min(CPU_CHUNK, s.numel - c * CPU_CHUNK));
    }
  };
  const int64_t parts = group.work < SERIAL_WORK || alone ? 1 : at::get_num_threads();
  if (parts == 1) return run({0, 0}, {group.segments.size(), 0});
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    run(place_of(group, group.work * begin / parts), place_of(group, group.work * end / parts));
  });
}

// The coefficient of each segment, rounded to the type that it multiplies in: what rounds to 0 stands for zeros.
auto coefficients(const Group& group, const double* coef, int64_t stride) {
  const bool wide = group.dtype == at::kDouble;
  return [=](size_t i) { return wide ? coef[i * stride] : double(float(coef[i * stride])); };
}

}  // namespace

const char* isa() { return chosen().name; }

void work_alone() { alone = true; }

Moments measure(const Group& group, double p, bool absmax, Moments* per_segment) {
  const auto& k = kernels_of(group.dtype);
  DtypeKernels::Measure kernel = k.power;
  switch (norm_kind(p)) {
    case Norm::L2: kernel = absmax ? k.l2 : k.l2_sum; break;
    case Norm::L1: kernel = k.l1; break;
    case Norm::Max: kernel = k.max; break;
    case Norm::Power: break;
  }
  static thread_local std::vector<Moments> partials;
  partials.resize(group.chunks);
  Moments* partial = partials.data();  // the threads below must write this thread's buffer, not their own
  for_each_chunk(group, [&](size_t, const Segment& s, int64_t chunk, void* data, int64_t n) {
    partial[s.first_chunk + chunk] = kernel(data, n, p);
  });
  if (per_segment) {
    for (size_t i = 0; i < group.segments.size(); i++) {
      Moments segment;
      for (int64_t c = group.segments[i].first_chunk; c < end_chunk(group, i); c++) segment.combine(partial[c]);
      per_segment[i] = segment;
    }
  }
  Moments all;
  double sums[4] = {};  // four additions in flight
  for (int64_t c = 0; c < group.chunks; c++) sums[c % 4] += partial[c].power;
  all.power = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  if (kernel != k.l2_sum)
    for (int64_t c = 0; c < group.chunks; c++) all.absmax = larger_magnitude(all.absmax, partial[c].absmax);
  if (partials.capacity() > (1 << 16)) std::vector<Moments>().swap(partials);
  return all;
}

void apply_(const Group& group, const double* coef, int64_t stride) {
  auto coef_of = coefficients(group, coef, stride);
  if (stride == 0 && touch(coef_of(0)) == Touch::Keep) return;
  const auto& k = kernels_of(group.dtype);
  const size_t itemsize = c10::elementSize(group.dtype);
  for_each_chunk(group, [&](size_t i, const Segment&, int64_t chunk, void* data, int64_t n) {
    const double c = coef_of(i);
    switch (touch(c)) {
      case Touch::Keep: return;
      case Touch::Zero: std::memset(data, 0, n * itemsize); break;
      case Touch::Scale: k.scale(data, n, c);
    }
    if (chunk == 0) {
      if (i + 1 < group.segments.size()) __builtin_prefetch(group.segments[i + 1].gradient);
      group.bump_version(i);
    }
  });
}

bool clamp_(const Group& group, double low, double high) {
  const auto& k = kernels_of(group.dtype);
  std::vector<char> written(group.chunks);  // one flag a chunk: no two threads share one
  for_each_chunk(group, [&](size_t, const Segment& s, int64_t chunk, void* data, int64_t n) {
    written[s.first_chunk + chunk] = k.clamp(data, n, low, high);
  });
  bool any = false;
  for (size_t i = 0; i < group.segments.size(); i++) {
    const auto end = written.begin() + end_chunk(group, i);
    if (std::find(written.begin() + group.segments[i].first_chunk, end, char(1)) == end) continue;
    group.bump_version(i);
    any = true;
  }
  return any;
}

namespace {

// Read in place of a gradient whose coefficient is +0: NaN and inf must not survive it.
alignas(64) const char ZEROS[CPU_CHUNK * sizeof(double)] = {};

// run(arrays of a chunk, its segment) for every chunk of the group.
template <class Coef, class Run>
void for_each_step(const Group& group, const States& states, Coef coef_of, Run run) {
  const size_t itemsize = c10::elementSize(group.dtype);
  for_each_chunk(group, [&](size_t i, const Segment&, int64_t chunk, void* data, int64_t n) {
    const auto& s = states.segments[i];
    auto zero_grad = [&] { if (states.zero_grad) std::memset(data, 0, n * itemsize); };
    if (states.is_idle(i)) return zero_grad();
    auto part = [&](void* array) { return array ? static_cast<char*>(array) + chunk * CPU_CHUNK * itemsize : nullptr; };
    const void* grad = touch(coef_of(i)) == Touch::Zero ? ZEROS : data;
    StepArrays arrays{part(s.param), {part(s.state[0]), part(s.state[1]), part(s.state[2])},
                      grad, n, chunk * CPU_CHUNK, states.stochastic, 0};
    if (states.stochastic) arrays.key = random_bits(uint32_t(i), states.seed) * 8;  // 8 keys apart, one for each array
    run(arrays, i);
    zero_grad();
  });
}

}  // namespace

void adamw_(const Group& group, const States& states, const AdamWOptions& o, const double* coef, int64_t stride) {
  std::vector<AdamW<double>> constants(group.segments.size());
  const auto coef_of = coefficients(group, coef, stride);
  const double lerp = group.dtype == at::kDouble ? lerp_factor<double>(o.beta1) : lerp_factor<float>(o.beta1);
  double last_step = -1, bias1 = 1, root_bias2 = 1;
  for (size_t i = 0; i < constants.size(); i++) {
    if (states.is_idle(i)) continue;
    const double step = *states.segments[i].step += 1;
    if (step != last_step) {  // as a rule all have the same
      bias1 = 1 - std::pow(o.beta1, step);
      root_bias2 = std::sqrt(1 - std::pow(o.beta2, step));
      last_step = step;
    }
    constants[i] = {states.maximize ? -coef_of(i) : coef_of(i), 1 - o.lr * o.weight_decay, lerp, o.beta2,
                    1 - o.beta2, o.lr / bias1, 1 / root_bias2, o.eps};
  }
  const auto& k = kernels_of(group.dtype);
  for_each_step(group, states, coef_of, [&](const StepArrays& arrays, size_t i) { k.adamw(arrays, constants[i]); });
}

void sgd_(const Group& group, const States& states, const SgdOptions& o, const double* coef, int64_t stride) {
  const auto& k = kernels_of(group.dtype);
  const auto coef_of = coefficients(group, coef, stride);
  for_each_step(group, states, coef_of, [&](const StepArrays& arrays, size_t i) {
    k.sgd(arrays, {states.maximize ? -coef_of(i) : coef_of(i), o.weight_decay, o.momentum, o.rest, o.lr}, o.nesterov);
  });
}

}  // namespace fastclip::cpu
