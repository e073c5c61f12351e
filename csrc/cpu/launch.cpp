// CPU launchers: a table's chunks, divided among threads by work, each chunk by the kernels for this machine.
//
// Of the C++ library only templates are used, nothing that has to be linked: the library of a wheel has none of it.
#include "launch.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <iterator>

#include "isa.h"
#include "kernels_table.h"

namespace fastclip::cpu {
namespace {

constexpr int64_t PREFETCH_BYTES = 2048;
constexpr int64_t SERIAL_WORK = 1 << 16;  // of a table; waking threads for less costs more time than they save

struct Isa {
  const char* name;
  const CpuKernels* kernels;
};

Isa choose() {
#if defined(__x86_64__)
  const char* asked = std::getenv("FASTCLIP_CPU_ISA");  // fastclip/native/libraries.py has refused unknown names
  const bool any = !asked || !*asked || std::strcmp(asked, "avx512") == 0;
  const Features here = features_here();
  if (here.avx512 && any) return {"avx512", &avx512::kernels};
  if (here.avx2 && (any || std::strcmp(asked, "avx2") == 0)) return {"avx2", &avx2::kernels};
#elif defined(__aarch64__)
  return {"neon", &portable::kernels};
#endif
  return {"portable", &portable::kernels};
}

const Isa CHOSEN = choose();

const DtypeKernels& kernels_of(Dtype dtype) { return CHOSEN.kernels->of[int(dtype)]; }

size_t itemsize_of(Dtype dtype) { return dtype == Dtype::F64 ? 8 : dtype == Dtype::F32 ? 4 : 2; }

// Memory for `count` values, each written before it is read, for as long as this lives. The stack has room for a few.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    if (count * sizeof(T) > sizeof(few_)) values_ = static_cast<T*>(std::malloc(count * sizeof(T)));
    if (!values_) std::abort();  // out of memory, which a C interface cannot throw
  }
  ~Scratch() {
    if (values_ != reinterpret_cast<T*>(few_)) std::free(values_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return values_; }

 private:
  alignas(T) char few_[4096];
  T* values_ = reinterpret_cast<T*>(few_);
};

int64_t chunks_of(const Segment& segment) { return (segment.numel + CHUNK - 1) / CHUNK; }

struct Position {  // a chunk: of which segment, and which of the segment's chunks
  int64_t segment, chunk;
};

// Where the part of the table that begins after `work` elements starts.
Position position_of(const Table& table, int64_t work) {
  if (work >= table.work) return {table.count, 0};
  const Segment* after = std::upper_bound(table.segments, table.segments + table.count, work,
                                          [](int64_t w, const Segment& s) { return w < s.work; });
  const Segment* segment = std::prev(after);
  const int64_t chunk = (work - segment->work + CHUNK - 1) / CHUNK;
  if (chunk >= chunks_of(*segment)) return {after - table.segments, 0};
  return {segment - table.segments, chunk};
}

int64_t end_chunk(const Table& table, int64_t i) {
  return i + 1 < table.count ? table.segments[i + 1].first_chunk : table.chunks;
}

// The hardware prefetches along a stream of addresses but cannot predict where the next tensor lies.
void prefetch(const Segment& s, size_t itemsize) {
  const auto* data = static_cast<const char*>(s.data);
  const int64_t bytes = std::min<int64_t>(s.numel * itemsize, PREFETCH_BYTES);
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(data + b);
}

// body(segment index, segment, chunk of the segment, its first byte, its elements) for every chunk of the table.
template <class Body>
void for_each_chunk(const Table& table, const Threads& threads, Body body) {
  const size_t itemsize = itemsize_of(table.dtype);
  auto run = [&](Position from, Position to) {
    for (int64_t i = from.segment; i < table.count && i <= to.segment; i++) {
      const auto& s = table.segments[i];
      if (i + 1 < table.count) prefetch(table.segments[i + 1], itemsize);
      const int64_t end = i == to.segment ? to.chunk : chunks_of(s);
      for (int64_t c = i == from.segment ? from.chunk : 0; c < end; c++)
        body(i, s, c, static_cast<char*>(s.data) + c * CHUNK * itemsize, std::min(CHUNK, s.numel - c * CHUNK));
    }
  };
  const int64_t parts = table.work < SERIAL_WORK ? 1 : threads.count;
  if (parts <= 1) return run({0, 0}, {table.count, 0});
  auto run_parts = [&](int64_t begin, int64_t end) {
    run(position_of(table, table.work * begin / parts), position_of(table, table.work * end / parts));
  };
  threads.parallel_for(
      0, parts, 1,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<decltype(run_parts)*>(context))(begin, end); },
      &run_parts);
}

// The coefficient of each segment, rounded to the type of the multiplication: one that rounds to 0 writes zeros.
auto coefficients(Dtype dtype, const double* coef, int64_t stride) {
  const bool wide = dtype == Dtype::F64;
  return [=](int64_t i) { return wide ? coef[i * stride] : double(float(coef[i * stride])); };
}

// Read instead of a gradient whose coefficient is +0, so that its NaN and inf have no effect.
alignas(64) const char ZEROS[CHUNK * sizeof(double)] = {};

bool is_frozen(const StepDecision& decision, int64_t i) {
  return decision.frozen && decision.frozen[i * decision.frozen_stride];
}

// run(arrays of a chunk, its segment) for every chunk of the table.
template <class Coef, class Run>
void for_each_step(const Table& table, const Threads& threads, const StepSegment* segments,
                   const StepDecision& decision, Coef coef_of, Run run) {
  const size_t itemsize = itemsize_of(table.dtype);
  for_each_chunk(table, threads, [&](int64_t i, const Segment&, int64_t chunk, void* data, int64_t n) {
    const auto& s = segments[i];
    auto zero_grad = [&] {
      if (decision.zero_grad) std::memset(data, 0, n * itemsize);
    };
    if (is_frozen(decision, i)) return zero_grad();
    auto part = [&](void* array) { return array ? static_cast<char*>(array) + chunk * CHUNK * itemsize : nullptr; };
    const void* grad = touch(coef_of(i)) == Touch::Zero ? ZEROS : data;
    StepArrays arrays{part(s.param),
                      {part(s.state[0]), part(s.state[1]), part(s.state[2])},
                      grad,
                      n,
                      chunk * CHUNK,
                      decision.stochastic,
                      0};
    if (decision.stochastic)
      arrays.key = random_bits(uint32_t(i), decision.seed) * 8;  // + the index of an array, below 8
    run(arrays, i);
    zero_grad();
  });
}

}  // namespace

extern "C" {

const char* fastclip_cpu_isa() { return CHOSEN.name; }

void fastclip_cpu_measure(const Table* table, const Threads* threads, double p, bool absmax, NormPartial* per_segment,
                          NormPartial* total) {
  const auto& k = kernels_of(table->dtype);
  DtypeKernels::Measure kernel = k.power;
  switch (norm_kind(p)) {
    case Norm::L2: kernel = absmax ? k.l2 : k.l2_sum; break;
    case Norm::L1: kernel = k.l1; break;
    case Norm::Max: kernel = k.max; break;
    case Norm::Power: break;
  }
  const Scratch<NormPartial> partials(table->chunks);
  NormPartial* partial = partials.get();
  for_each_chunk(*table, *threads, [&](int64_t, const Segment& s, int64_t chunk, void* data, int64_t n) {
    partial[s.first_chunk + chunk] = kernel(data, n, p);
  });
  if (per_segment) {
    for (int64_t i = 0; i < table->count; i++) {
      NormPartial segment;
      for (int64_t c = table->segments[i].first_chunk; c < end_chunk(*table, i); c++) segment.combine(partial[c]);
      per_segment[i] = segment;
    }
  }
  NormPartial all;
  double sums[4] = {};  // four additions in flight
  for (int64_t c = 0; c < table->chunks; c++) sums[c % 4] += partial[c].power;
  all.power = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  if (kernel != k.l2_sum)
    for (int64_t c = 0; c < table->chunks; c++) all.absmax = larger_magnitude(all.absmax, partial[c].absmax);
  *total = all;
}

void fastclip_cpu_global_norm(const Table* table, const Threads* threads, double p, double max_norm,
                              const NormPartial* before, NormPartial* per_segment, GlobalNorm* result) {
  NormPartial total;
  fastclip_cpu_measure(table, threads, p, /*absmax=*/true, per_segment, &total);
  if (p == 0) {
    total.power = 0;
    for (int64_t i = 0; i < table->count; i++) total.power += per_segment[i].power != 0;
  }
  if (before) total.combine(*before);
  const double norm = finish_norm(norm_kind(p), p, total.power, total.absmax);
  *result = {total.power, total.absmax, norm, clip_coefficient(norm, max_norm)};
}

bool fastclip_cpu_clip(const Table* tables, int64_t count, const Threads* threads, const ClipOptions* options,
                       NormPartial* per_segment, GlobalNorm* result) {
  const double p = options->p;
  NormPartial all;
  for (int64_t i = 0; i < count; i++) {
    NormPartial total;
    fastclip_cpu_measure(&tables[i], threads, p, /*absmax=*/per_segment != nullptr, per_segment, &total);
    all.combine(total);
    if (per_segment) per_segment += tables[i].count;
  }
  const double norm = finish_norm(norm_kind(p), p, all.power, all.absmax);
  *result = {all.power, all.absmax, norm, clip_coefficient(norm, options->max_norm)};
  if (options->refuse_nonfinite && !std::isfinite(norm)) return true;
  if (options->write)
    for (int64_t i = 0; i < count; i++) fastclip_cpu_apply(&tables[i], threads, &result->coef, 0);
  return false;
}

void fastclip_cpu_table(const int64_t* addresses, const int64_t* numels, int64_t count, int32_t dtype, char* written,
                        Segment* segments, Table* table) {
  *table = {segments, count, 0, 0, Dtype(dtype), [](void* owner) { *static_cast<char*>(owner) = 1; }};
  for (int64_t i = 0; i < count; i++)
    segments[i] =
        next_segment(table->chunks, table->work, reinterpret_cast<void*>(addresses[i]), numels[i], written + i);
}

void fastclip_cpu_apply(const Table* table, const Threads* threads, const double* coef, int64_t stride) {
  auto coef_of = coefficients(table->dtype, coef, stride);
  if (stride == 0 && touch(coef_of(0)) == Touch::Keep) return;
  const auto& k = kernels_of(table->dtype);
  const size_t itemsize = itemsize_of(table->dtype);
  for_each_chunk(*table, *threads, [&](int64_t i, const Segment& s, int64_t chunk, void* data, int64_t n) {
    const double c = coef_of(i);
    switch (touch(c)) {
      case Touch::Keep: return;
      case Touch::Zero: std::memset(data, 0, n * itemsize); break;
      case Touch::Scale: k.scale(data, n, c);
    }
    if (chunk == 0) {
      if (i + 1 < table->count) __builtin_prefetch(table->segments[i + 1].owner);
      table->written(s.owner);
    }
  });
}

bool fastclip_cpu_clamp(const Table* table, const Threads* threads, double low, double high) {
  const auto& k = kernels_of(table->dtype);
  const Scratch<bool> flags(table->chunks);  // one a chunk: no two threads share one
  bool* written = flags.get();
  for_each_chunk(*table, *threads, [&](int64_t, const Segment& s, int64_t chunk, void* data, int64_t n) {
    written[s.first_chunk + chunk] = k.clamp(data, n, low, high);
  });
  bool any = false;
  for (int64_t i = 0; i < table->count; i++) {
    bool* const end = written + end_chunk(*table, i);
    if (std::find(written + table->segments[i].first_chunk, end, true) == end) continue;
    table->written(table->segments[i].owner);
    any = true;
  }
  return any;
}

void fastclip_cpu_adamw(const Table* table, const Threads* threads, const StepSegment* segments,
                        const StepDecision* decision, const AdamWOptions* options) {
  const auto& o = *options;
  const Scratch<AdamW<double>> scratch(table->count);
  AdamW<double>* constants = scratch.get();
  const auto coef_of = coefficients(table->dtype, decision->coef, decision->coef_stride);
  const double lerp = table->dtype == Dtype::F64 ? lerp_factor<double>(o.beta1) : lerp_factor<float>(o.beta1);
  double last_step = -1, bias1 = 1, root_bias2 = 1;
  for (int64_t i = 0; i < table->count; i++) {
    if (is_frozen(*decision, i)) continue;
    const double step = *segments[i].step += 1;
    if (step != last_step) {  // usually all are equal
      bias1 = 1 - std::pow(o.beta1, step);
      root_bias2 = std::sqrt(1 - std::pow(o.beta2, step));
      last_step = step;
    }
    constants[i] = {decision->maximize ? -coef_of(i) : coef_of(i),
                    1 - o.lr * o.weight_decay,
                    lerp,
                    o.beta2,
                    1 - o.beta2,
                    o.lr / bias1,
                    1 / root_bias2,
                    o.eps};
  }
  const auto& k = kernels_of(table->dtype);
  for_each_step(*table, *threads, segments, *decision, coef_of,
                [&](const StepArrays& arrays, int64_t i) { k.adamw(arrays, constants[i]); });
}

void fastclip_cpu_sgd(const Table* table, const Threads* threads, const StepSegment* segments,
                      const StepDecision* decision, const SgdOptions* options) {
  const auto& o = *options;
  const auto& k = kernels_of(table->dtype);
  const auto coef_of = coefficients(table->dtype, decision->coef, decision->coef_stride);
  for_each_step(*table, *threads, segments, *decision, coef_of, [&](const StepArrays& arrays, int64_t i) {
    const double coef = decision->maximize ? -coef_of(i) : coef_of(i);
    k.sgd(arrays, {coef, o.weight_decay, o.momentum, o.one_minus_dampening, o.lr}, o.nesterov);
  });
}

}  // extern "C"

}  // namespace fastclip::cpu
