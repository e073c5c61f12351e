// Every function of csrc/cpu/launch.h against plain arithmetic in wider numbers, without torch and Python, so that it runs
// wherever a compiler or an emulator is: test_wheel.py says how. One line for each dtype; fails if any check does.
//
// u is the unit roundoff of the arithmetic (float, or double for F64). A bound is a number of roundings, each at most u
// times the largest magnitude that was added, and the rounding to the stored dtype.
#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <iterator>
#include <memory>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "../../csrc/cpu/launch.h"

using namespace fastclip;
using namespace fastclip::cpu;

namespace {

// Where the CPU has no numbers wider than double, what is expected of a float64 has roundings of its own.
constexpr bool WIDER = LDBL_MANT_DIG == 64;
using Wide = std::conditional_t<WIDER, long double, double>;
constexpr double HALF_UNIT = WIDER ? 0x1p-53 : 0x1p-52;

int checks = 0, failures = 0;
std::string where;

void expect(bool good, const char* what, double got, double want, double bound = 0) {
  checks++;
  if (good) return;
  if (failures++ < 20)
    std::printf("  %s: %s: got %.17g, want %.17g, bound %.3g\n", where.c_str(), what, got, want, bound);
}

void expect_near(const char* what, Wide got, Wide want, Wide bound) {
  const bool same = got == want || (std::isnan(got) && std::isnan(want));
  expect(same || std::fabs(got - want) <= bound, what, double(got), double(want), double(bound));
}

struct Random {
  uint64_t state = 1;
  uint32_t bits() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state >> 32);
  }
  double uniform() { return bits() / 4294967296.0; }
  double symmetric() { return 2 * uniform() - 1; }
};

// ---- dtypes: significant bits, the exponent of the least bit of all, the largest number ----

struct Format {
  const char* name;
  Dtype dtype;
  int itemsize, precision, least;
  double u;  // of the arithmetic
};
const Format FORMATS[] = {{"float32", Dtype::F32, 4, 24, -149, 0x1p-24},
                          {"float64", Dtype::F64, 8, 53, -1074, HALF_UNIT},
                          {"bfloat16", Dtype::BF16, 2, 8, -133, 0x1p-24},
                          {"float16", Dtype::F16, 2, 11, -24, 0x1p-24}};

double decode_word(const Format& f, uint16_t bits) {
  const int fraction_bits = f.precision - 1, exponents = 1 << (15 - fraction_bits);
  const int exponent = (bits & 0x7fff) >> fraction_bits, fraction = bits & ((1 << fraction_bits) - 1);
  double x;
  if (exponent == exponents - 1) x = fraction ? NAN : HUGE_VAL;
  else if (exponent == 0) x = std::ldexp(double(fraction), f.least);
  else x = std::ldexp(double(fraction + (1 << fraction_bits)), f.least + exponent - 1);
  return bits >> 15 ? -x : x;
}

template <class T>
T read(const void* at) {
  T x;
  std::memcpy(&x, at, sizeof(T));
  return x;
}

double decode(const Format& f, const void* at) {
  return f.dtype == Dtype::F64 ? read<double>(at)
      : f.dtype == Dtype::F32  ? read<float>(at)
                               : decode_word(f, read<uint16_t>(at));
}

// To the nearest number of the format, ties to even.
double rounded(const Format& f, double x) {
  if (f.dtype == Dtype::F64 || x == 0 || !std::isfinite(x)) return x;
  if (f.dtype == Dtype::F32) return float(x);
  int exponent;
  std::frexp(x, &exponent);
  const int unit = std::max(exponent - f.precision, f.least);
  const double y = std::ldexp(std::nearbyint(std::ldexp(x, -unit)), unit);
  const double limit = f.dtype == Dtype::F16 ? 65536.0 : HUGE_VAL;
  const bool over = std::fabs(y) >= limit || (f.dtype == Dtype::BF16 && std::fabs(y) >= 0x1p128);
  return over ? std::copysign(HUGE_VAL, y) : y;
}

void encode(const Format& f, double x, void* at) {
  x = rounded(f, x);
  if (f.dtype == Dtype::F64) {
    std::memcpy(at, &x, 8);
  } else if (f.dtype == Dtype::F32) {
    const float y = float(x);
    std::memcpy(at, &y, 4);
  } else {
    const int fraction_bits = f.precision - 1;
    const int last = ((1 << (15 - fraction_bits)) - 1) << fraction_bits;
    int bits;
    if (std::isnan(x)) bits = last | 1 << (fraction_bits - 1);
    else if (std::isinf(x)) bits = last;
    else {
      int exponent;
      const double magnitude = std::fabs(x);
      std::frexp(magnitude, &exponent);
      const int unit = std::max(exponent - f.precision, f.least);
      bits = x == 0 ? 0 : int(std::ldexp(magnitude, -unit)) + ((unit - f.least) << fraction_bits);
    }
    const uint16_t word = uint16_t(bits | (std::signbit(x) ? 0x8000 : 0));
    std::memcpy(at, &word, 2);
  }
}

Wide storage_error(const Format& f, Wide x) {
  return std::fabs(x) * std::ldexp(Wide(1), -f.precision) + std::ldexp(Wide(1), f.least - 1);
}

// ---- tensors ----

constexpr int MARGIN = 24;  // elements before and after each tensor, which nobody may write

// Several tensors of one dtype, at addresses that are multiples of the element only.
struct Tensors {
  Format f;
  std::vector<int64_t> sizes;
  std::vector<std::vector<char>> memory;

  Tensors(const Format& format, const std::vector<int64_t>& sizes_) : f(format), sizes(sizes_) {
    for (int64_t n : sizes) memory.emplace_back((n + 2 * MARGIN) * f.itemsize, char(0x5a));
  }
  char* data(size_t t) { return memory[t].data() + (MARGIN - t % 3) * f.itemsize; }
  double at(size_t t, int64_t i) { return decode(f, data(t) + i * f.itemsize); }
  void set(size_t t, int64_t i, double x) { encode(f, x, data(t) + i * f.itemsize); }
  void fill(const std::function<double(size_t t, int64_t i)>& value) {
    for (size_t t = 0; t < sizes.size(); t++)
      for (int64_t i = 0; i < sizes[t]; i++) set(t, i, value(t, i));
  }
  void expect_margins() {
    for (size_t t = 0; t < sizes.size(); t++) {
      const char *begin = data(t), *end = begin + sizes[t] * f.itemsize;
      for (const char& c : memory[t])
        if ((&c < begin || &c >= end) && c != 0x5a) return expect(false, "memory beside a tensor", c, 0x5a);
    }
  }
};

struct Owner { std::atomic<int> written{0}; };

struct Packed {
  std::vector<Segment> segments;
  std::vector<Owner> owners;
  Table table;

  explicit Packed(Tensors& tensors) : owners(tensors.sizes.size()) {
    int64_t chunks = 0, work = 0;
    for (size_t t = 0; t < tensors.sizes.size(); t++) {
      const int64_t n = tensors.sizes[t];
      segments.push_back({tensors.data(t), n, chunks, work, &owners[t]});
      chunks += (n + CHUNK - 1) / CHUNK;
      work += n + 512;
    }
    table = {segments.data(), int64_t(segments.size()),
             chunks,          work,
             tensors.f.dtype, [](void* owner) { static_cast<Owner*>(owner)->written++; }};
  }
};

int32_t parallel_for(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; i++) threads.emplace_back(body, i, i + 1, context);
  for (auto& thread : threads) thread.join();
  return 0;
}

const Threads THREADS[] = {{1, nullptr}, {5, parallel_for}};

std::vector<int64_t> sizes_of_all_kinds() {
  std::vector<int64_t> sizes = {0, CHUNK, 2 * CHUNK + 77, 0, 1000};
  for (int64_t n = 1; n < 160; n += n < 36 ? 1 : 7) sizes.push_back(n);
  return sizes;
}

// The element of n to look at after i: all around the borders of chunks, and some in between.
int64_t next(int64_t i, int64_t n) {
  const int64_t within = i % CHUNK;
  return within < 300 || within > CHUNK - 300 || i > n - 300 ? i + 1 : i + 29;
}

// ---- the functions ----

struct Values {
  const char* name;
  double scale;                 // of the numbers
  std::vector<double> special;  // put among them
};

std::vector<Values> values_for(const Format& f) {
  std::vector<Values> all = {{"ordinary", 1, {}},
                             {"zeros", 0, {}},
                             {"with inf", 1, {HUGE_VAL}},
                             {"with -inf", 1, {-HUGE_VAL}},
                             {"with NaN", 1, {NAN, HUGE_VAL}}};
  const double least = std::ldexp(1.0, f.dtype == Dtype::F64 ? -500 : f.least);
  all.push_back({"subnormal", least * 100, {least, -least}});
  all.push_back({"small", f.dtype == Dtype::F16 ? 1e-6 : 1e-25, {}});
  all.push_back({"large", f.dtype == Dtype::F16 ? 6e4 : f.dtype == Dtype::F64 ? 1e90 : 3e38, {}});
  return all;
}

void fill(Tensors& tensors, const Values& values, uint64_t seed) {
  Random random{seed};
  tensors.fill([&](size_t, int64_t) { return values.scale * random.symmetric(); });
  for (size_t k = 0; k < values.special.size(); k++)
    for (size_t t = k; t < tensors.sizes.size(); t += 3)
      if (tensors.sizes[t]) tensors.set(t, (tensors.sizes[t] * 7 + int64_t(k)) % tensors.sizes[t], values.special[k]);
}

void check_measure(const Format& f) {
  const double powers[] = {2, 1, HUGE_VAL, 0, 3, 2.5};
  for (const Values& values : values_for(f)) {
    Tensors tensors(f, sizes_of_all_kinds());
    fill(tensors, values, 3);
    const Packed packed(tensors);
    const size_t count = tensors.sizes.size();
    for (double p : powers) {
      const bool cubes_overflow = f.dtype == Dtype::F64 && p >= 2 && std::isfinite(p) && values.scale > 1e80;
      if (cubes_overflow && p > 2) continue;
      where = std::string(f.name) + " measure " + values.name + " p=" + std::to_string(p);
      std::vector<Wide> power(count, 0), largest(count, 0);
      for (size_t t = 0; t < count; t++)
        for (int64_t i = 0; i < tensors.sizes[t]; i++) {
          const Wide x = std::fabs(Wide(tensors.at(t, i)));
          if (!(x <= largest[t]) && !std::isnan(largest[t])) largest[t] = x;
          if (std::isinf(p) || x == 0) continue;
          power[t] += p == 0 ? 1 : p == 1 ? x : p == 2 ? x * x : p == 3 ? x * x * x : x * x * std::sqrt(x);
        }
      std::vector<NormPartial> first;
      for (const Threads& threads : THREADS)
        for (bool absmax : {true, false}) {
          std::vector<NormPartial> got(count + 1);
          fastclip_cpu_measure(&packed.table, &threads, p, absmax, got.data(), &got[count]);
          if (absmax && first.empty()) first = got;
          NormPartial again;
          fastclip_cpu_measure(&packed.table, &threads, p, absmax, nullptr, &again);
          expect(std::memcmp(&again.power, &got[count].power, 8) == 0, "without per_segment", again.power,
                 got[count].power);
          for (size_t t = 0; t <= count; t++)
            expect(std::memcmp(&got[t].power, &first[t].power, 8) == 0, "other threads", got[t].power, first[t].power);
          if (!absmax) continue;
          Wide total = 0, most = 0;
          for (size_t t = 0; t <= count; t++) {
            const Wide want = t < count ? power[t] : total;
            const Wide want_largest = t < count ? largest[t] : most;
            // float32 sums: a product, RUN additions, three that join the eight sums; the rest is in float64
            const bool narrow = f.u > 0x1p-50 && (p == 1 || p == 2);
            const Wide roundings = narrow ? 24 * 0x1p-24 : 0;
            const Wide elements = t < count ? Wide(tensors.sizes[t]) : 2e5;
            const Wide bound = want * (roundings + (elements + 16) * HALF_UNIT) + elements * 0x1p-1074;
            if (!std::isinf(p)) expect_near("power", got[t].power, want, p == 0 ? 0 : bound);
            expect_near("absmax", got[t].absmax, want_largest, 0);
            if (t < count) {
              total += power[t];
              if (!(largest[t] <= most) && !std::isnan(most)) most = largest[t];
            }
          }
        }
    }
  }
}

// Several tables as one, described by addresses: measured, decided and applied in one call, and in two.
void check_clip(const Format& f) {
  for (const Values& values : values_for(f))
    for (const Threads& threads : THREADS)
      for (double p : {2.0, 1.0, double(HUGE_VAL)})
        for (bool refuse : {false, true}) {
          where = std::string(f.name) + " clip " + values.name + " p=" + std::to_string(p);
          const auto sizes = sizes_of_all_kinds();
          Tensors parts[2] = {Tensors(f, sizes), Tensors(f, {5, 0, CHUNK + 3})};
          Table tables[2];
          std::vector<Segment> segments[2];
          std::vector<char> written[2];
          NormPartial all;
          std::vector<NormPartial> each;
          for (int k = 0; k < 2; k++) {
            fill(parts[k], values, 13 + k);
            const size_t count = parts[k].sizes.size();
            std::vector<int64_t> addresses;
            for (size_t t = 0; t < count; t++) addresses.push_back(reinterpret_cast<int64_t>(parts[k].data(t)));
            segments[k].resize(count);
            written[k].resize(count);
            fastclip_cpu_table(addresses.data(), parts[k].sizes.data(), int64_t(count), int32_t(f.dtype),
                               written[k].data(), segments[k].data(), &tables[k]);
            std::vector<NormPartial> own(count);
            GlobalNorm so_far;
            fastclip_cpu_global_norm(&tables[k], &threads, p, 0.5, k ? &all : nullptr, own.data(), &so_far);
            all = {so_far.power, so_far.absmax};
            each.insert(each.end(), own.begin(), own.end());
            const Wide norm = p == 2 ? std::sqrt(Wide(all.power)) : p == 1 ? Wide(all.power) : Wide(all.absmax);
            expect_near("norm", so_far.norm, norm, norm * 0x1p-51);
            const Wide coef = 0.5 / (norm + 1e-6);
            if (std::isinf(norm)) expect(so_far.coef == 0 && std::signbit(so_far.coef), "coef", so_far.coef, -0.0);
            else expect_near("coef", so_far.coef, coef > 1 ? 1 : coef, 0x1p-50);
          }
          Tensors before[2] = {parts[0], parts[1]};
          const ClipOptions options{p, 0.5, true, refuse};
          std::vector<NormPartial> per_segment(each.size());
          GlobalNorm got;
          const bool refused = fastclip_cpu_clip(tables, 2, &threads, &options, per_segment.data(), &got);
          const bool finite = std::isfinite(got.norm);
          expect(refused == (refuse && !finite), "refused", refused, refuse && !finite);
          expect_near("power", got.power, all.power, std::fabs(all.power) * 0x1p-50);
          expect_near("absmax", got.absmax, all.absmax, 0);
          for (size_t i = 0; i < each.size(); i++) {
            expect_near("power of one", per_segment[i].power, each[i].power, 0);
            expect_near("absmax of one", per_segment[i].absmax, each[i].absmax, 0);
          }
          const bool untouched = refused || got.coef == 1;
          const double c = f.dtype == Dtype::F64 ? got.coef : double(float(got.coef));
          for (int k = 0; k < 2; k++)
            for (size_t t = 0; t < parts[k].sizes.size(); t++) {
              const int64_t n = parts[k].sizes[t];
              expect(written[k][t] == (n > 0 && !untouched && c != 1), "written", written[k][t], !untouched);
              for (int64_t i = 0; i < n; i = next(i, n)) {
                const double x = before[k].at(t, i);
                const double product = f.dtype == Dtype::F64 ? x * c : double(float(x) * float(c));
                expect_near("element", parts[k].at(t, i), untouched ? x : rounded(f, product), 0);
              }
            }
        }
}

void expect_written(const Packed& packed, const std::vector<bool>& want) {
  for (size_t t = 0; t < want.size(); t++)
    expect(packed.owners[t].written == int(want[t]), "times reported as written", packed.owners[t].written, want[t]);
}

void check_apply(const Format& f) {
  const double coefs[] = {0.25, -1.0 / 3, 1.0, 0.0, -0.0, 1e-3, 1e-50, NAN};
  for (const Values& values : values_for(f))
    for (const Threads& threads : THREADS)
      for (int64_t stride : {0, 1})
        for (size_t k = 0; k < (stride ? 1 : std::size(coefs)); k++) {
          where = std::string(f.name) + " apply " + values.name + " " + std::to_string(k);
          Tensors tensors(f, sizes_of_all_kinds());
          fill(tensors, values, 5);
          Tensors before = tensors;
          const size_t count = tensors.sizes.size();
          std::vector<double> coef(count, coefs[k]);
          if (stride)
            for (size_t t = 0; t < count; t++) coef[t] = coefs[t % std::size(coefs)];
          const Packed packed(tensors);
          fastclip_cpu_apply(&packed.table, &threads, coef.data(), stride);
          std::vector<bool> written(count);
          for (size_t t = 0; t < count; t++) {
            const double c = f.dtype == Dtype::F64 ? coef[t] : double(float(coef[t]));
            written[t] = tensors.sizes[t] > 0 && c != 1;
            for (int64_t i = 0; i < tensors.sizes[t]; i = next(i, tensors.sizes[t])) {
              const double x = before.at(t, i), got = tensors.at(t, i);
              const double product = f.dtype == Dtype::F64 ? x * c : double(float(x) * float(c));
              const bool zero = c == 0 && !std::signbit(c);
              expect_near("element", got, c == 1 ? x : zero ? 0 : rounded(f, product), 0);
            }
          }
          expect_written(packed, written);
          tensors.expect_margins();
        }
}

// Each of the 65536 numbers times many coefficients: how they are widened, and how products are rounded.
void check_all_words(const Format& f) {
  where = std::string(f.name) + " all words";
  Tensors tensors(f, {65536});
  Random random{7};
  for (int round = 0; round < 24; round++) {
    double coef = round == 0 ? 2 : round == 1 ? 0.5 : std::ldexp(random.symmetric(), int(random.bits() % 61) - 30);
    if (round % 7 == 6) coef = 1 + std::ldexp(double(random.bits() % 64), -6);  // products that are ties
    for (int i = 0; i < 65536; i++) {
      const uint16_t word = uint16_t(i);
      std::memcpy(tensors.data(0) + 2 * i, &word, 2);
    }
    const Packed packed(tensors);
    fastclip_cpu_apply(&packed.table, &THREADS[0], &coef, 0);
    for (int i = 0; i < 65536; i++) {
      const uint16_t word = uint16_t(i);
      const double x = decode_word(f, word), want = rounded(f, double(float(x) * float(coef))), got = tensors.at(0, i);
      const bool same = std::isnan(want) ? std::isnan(got) : got == want && std::signbit(got) == std::signbit(want);
      expect(same, "product", got, want);
    }
  }
}

void check_clamp(const Format& f) {
  for (const Values& values : values_for(f))
    for (const Threads& threads : THREADS)
      for (double limit : {0.75, 1e30, 0.0, HUGE_VAL}) {
        where = std::string(f.name) + " clamp " + values.name + " " + std::to_string(limit);
        Tensors tensors(f, sizes_of_all_kinds());
        fill(tensors, values, 9);
        Tensors before = tensors;
        const size_t count = tensors.sizes.size();
        const Packed packed(tensors);
        const double low = -limit / 2, high = limit;
        const bool any = fastclip_cpu_clamp(&packed.table, &threads, low, high);
        std::vector<bool> written(count);
        for (size_t t = 0; t < count; t++)
          for (int64_t i = 0; i < tensors.sizes[t]; i++) {
            const double x = before.at(t, i);
            written[t] = written[t] || x < low || x > high;
            const double end = x < low ? low : high;
            expect_near("element", tensors.at(t, i), x < low || x > high ? rounded(f, end) : x, 0);
          }
        expect_written(packed, written);
        bool want = false;
        for (bool w : written) want = want || w;
        expect(any == want, "returned", any, want);
        tensors.expect_margins();
      }
}

// ---- steps ----

// Arrays of a step (gradient, parameter, states) before and after, and what is to be checked about all of them.
struct Step {
  const Format& f;
  std::vector<Tensors> arrays, before;
  std::vector<float> steps;
  std::vector<StepSegment> segments;
  std::vector<double> coef;
  std::unique_ptr<bool[]> frozen;
  StepDecision decision;

  Step(const Format& format, int states, const StepDecision& how, double gradient) : f(format), decision(how) {
    const auto sizes = sizes_of_all_kinds();
    const size_t count = sizes.size();
    Random random{11};
    for (int k = 0; k < 2 + states; k++) {
      arrays.emplace_back(f, sizes);
      arrays[k].fill([&](size_t t, int64_t i) {
        if (k == 0) return i % 97 == 5 && t % 2 ? (i % 2 ? NAN : 0.0) : gradient * random.symmetric();
        return k < 3 ? random.symmetric() : random.uniform();  // a running square is not negative
      });
    }
    before = arrays;
    steps.resize(count);
    coef.resize(count);
    frozen.reset(new bool[count]);
    for (size_t t = 0; t < count; t++) {
      steps[t] = float(t % 5);
      coef[t] = t % 6 == 4 ? 0 : 0.5 + 0.25 * double(t % 3);
      frozen[t] = t % 9 == 8;
      StepSegment segment{arrays[1].data(t), {}, &steps[t]};
      for (int k = 0; k < states; k++) segment.state[k] = arrays[2 + k].data(t);
      segments.push_back(segment);
    }
    decision.coef = coef.data();
    decision.coef_stride = 1;
    decision.frozen = frozen.get();
    decision.frozen_stride = 1;
  }

  Wide rounding(Wide x) const {
    const Wide error = storage_error(f, x);
    return decision.stochastic ? 2 * error : error;
  }

  // The number that an element's gradient counts as.
  Wide gradient(size_t t, int64_t i) {
    if (coef[t] == 0) return 0;
    const Wide g = Wide(before[0].at(t, i)) * Wide(coef[t]);
    return decision.maximize ? -g : g;
  }

  // check(t, i) for what is stepped; the rest must be as it was.
  void expect_all(const std::function<void(size_t t, int64_t i)>& check, bool counts) {
    for (size_t t = 0; t < steps.size(); t++) {
      expect(steps[t] == float(t % 5) + (counts && !frozen[t] ? 1 : 0), "step count", steps[t], double(t % 5));
      for (int64_t i = 0; i < arrays[0].sizes[t]; i = next(i, arrays[0].sizes[t])) {
        expect_near("gradient", arrays[0].at(t, i), decision.zero_grad ? 0 : before[0].at(t, i), 0);
        if (!frozen[t]) check(t, i);
        else
          for (size_t k = 1; k < arrays.size(); k++) expect_near("frozen", arrays[k].at(t, i), before[k].at(t, i), 0);
      }
    }
    for (auto& array : arrays) array.expect_margins();
  }
};

std::vector<StepDecision> decisions(const Format& f) {
  StepDecision plain{nullptr, 1, nullptr, 1, 12345, false, false, false};
  std::vector<StepDecision> all = {plain, plain};
  all[1].maximize = all[1].zero_grad = true;
  if (f.dtype == Dtype::BF16) {
    all.push_back(plain);
    all[2].stochastic = true;
  }
  return all;
}

void check_adamw(const Format& f) {
  const double gradients[] = {1, f.dtype == Dtype::F16 ? 1e-4 : 1e-20};
  for (const StepDecision& decision : decisions(f))
    for (const Threads& threads : THREADS)
      for (bool amsgrad : {false, true})
        for (double gradient : gradients)
          for (double beta1 : {0.9, 0.25}) {
            where = std::string(f.name) + " adamw" + (amsgrad ? " amsgrad" : "") + " beta1=" + std::to_string(beta1);
            Step step(f, amsgrad ? 3 : 2, decision, gradient);
            const Packed packed(step.arrays[0]);
            const AdamWOptions o{1e-2, beta1, 0.99, 1e-6, 0.1};
            fastclip_cpu_adamw(&packed.table, &threads, step.segments.data(), &step.decision, &o);
            const Wide b1 = o.beta1, b2 = o.beta2;
            Wide bias1[5], bias2[5];
            for (int taken = 0; taken < 5; taken++) {
              bias1[taken] = 1 - std::pow(b1, Wide(taken + 1));
              bias2[taken] = 1 - std::pow(b2, Wide(taken + 1));
            }
            const Wide u = f.u, tiny = f.dtype == Dtype::F64 ? 0x1p-1070 : 0x1p-145;
            step.expect_all(
                [&](size_t t, int64_t i) {
                  const Wide g = step.gradient(t, i), p = step.before[1].at(t, i), m = step.before[2].at(t, i);
                  const Wide v = step.before[3].at(t, i);
                  const Wide m_new = b1 * m + (1 - b1) * g, m_size = std::fabs(m) + std::fabs(g);
                  const Wide v_new = b2 * v + (1 - b2) * g * g;
                  const Wide most = amsgrad ? Wide(step.before[4].at(t, i)) : 0;
                  const Wide square = most > v_new ? most : v_new;
                  const Wide size = o.lr / bias1[t % 5];
                  const Wide below = std::sqrt(square / bias2[t % 5]) + o.eps;
                  const Wide p_new = p * (1 - Wide(o.lr) * o.weight_decay) - size * m_new / below;
                  expect_near("exp_avg", step.arrays[2].at(t, i), m_new, step.rounding(m_new) + 6 * u * m_size + tiny);
                  expect_near("exp_avg_sq", step.arrays[3].at(t, i), v_new,
                              step.rounding(v_new) + 6 * u * v_new + tiny);
                  if (amsgrad)
                    expect_near("max_exp_avg_sq", step.arrays[4].at(t, i), std::isnan(v_new) ? v_new : square,
                                step.rounding(square) + 6 * u * square + tiny);
                  expect_near("param", step.arrays[1].at(t, i), p_new,
                              step.rounding(p_new) + u * (4 * std::fabs(p) + 30 * size * m_size / below) + tiny);
                },
                true);
          }
}

void check_sgd(const Format& f) {
  for (const StepDecision& decision : decisions(f))
    for (const Threads& threads : THREADS)
      for (int kind = 0; kind < 3; kind++) {
        const bool momentum = kind > 0, nesterov = kind == 2;
        where = std::string(f.name) + " sgd " + std::to_string(kind);
        Step step(f, momentum ? 1 : 0, decision, 1);
        const Packed packed(step.arrays[0]);
        const SgdOptions o{0.05, momentum ? 0.9 : 0, 0.75, 0.02, nesterov};
        fastclip_cpu_sgd(&packed.table, &threads, step.segments.data(), &step.decision, &o);
        const Wide u = f.u, tiny = f.dtype == Dtype::F64 ? 0x1p-1070 : 0x1p-145;
        step.expect_all(
            [&](size_t t, int64_t i) {
              const Wide p = step.before[1].at(t, i), decay = o.weight_decay * p;
              Wide g = step.gradient(t, i) + decay, size = std::fabs(step.gradient(t, i)) + std::fabs(decay);
              if (momentum) {
                const Wide before = step.before[2].at(t, i);
                const Wide buffer = o.momentum * before + o.one_minus_dampening * g;
                const Wide buffer_size = std::fabs(before) + size;
                expect_near("momentum_buffer", step.arrays[2].at(t, i), buffer,
                            step.rounding(buffer) + 8 * u * buffer_size + tiny);
                g = nesterov ? g + o.momentum * buffer : buffer;
                size += buffer_size;
              }
              const Wide p_new = p - o.lr * g;
              expect_near("param", step.arrays[1].at(t, i), p_new,
                          step.rounding(p_new) + 16 * u * (std::fabs(p) + o.lr * size) + tiny);
            },
            false);
      }
}

}  // namespace

int main() {
  int failed = 0;
  for (const Format& f : FORMATS) {
    checks = failures = 0;
    check_measure(f);
    check_apply(f);
    if (f.itemsize == 2) check_all_words(f);
    check_clip(f);
    check_clamp(f);
    check_adamw(f);
    check_sgd(f);
    std::printf("%s on %s: %d checks, %d failed\n", f.name, fastclip_cpu_isa(), checks, failures);
    failed += failures;
  }
  return failed ? 1 : 0;
}
