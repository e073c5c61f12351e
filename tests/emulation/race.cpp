// Runs every kernel of csrc/cuda/ on buffers of exactly the tensors' size, for the sanitizers to watch: no thread may touch
// what another one writes without a barrier between (-fsanitize=thread), nor anything outside (-fsanitize=address).
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../../csrc/cuda/interface.h"

extern "C" void fastclip_emulate(int units, unsigned order);

using namespace fastclip::cuda;

namespace {

// 64 threads: a tile is 4 KiB, 1,024 float32s.
const std::vector<int64_t> SIZES = {1, 0, 5, 9'000, 7, 1024, 1023, 9, 2048, 0};
const int ITEMSIZE[] = {4, 8, 2, 2};

void check(const char* error) {
  if (!error) return;
  std::fprintf(stderr, "%s\n", error);
  std::exit(2);
}
void check(bool right) { check(right ? nullptr : "wrong result"); }

void run(int dtype, double p, int64_t misaligned) {
  const int itemsize = ITEMSIZE[dtype];
  std::vector<char*> buffers;
  std::vector<int64_t> addresses;
  for (int64_t size : SIZES) {  // zeros but for one element of 1 in each: the last
    const int64_t bytes = (size + misaligned) * itemsize;
    auto* buffer = static_cast<char*>(std::calloc(bytes ? bytes : 1, 1));
    if (size) {
      char* last = buffer + bytes - itemsize;
      if (dtype == 0) *reinterpret_cast<float*>(last) = 1;
      else if (dtype == 1) *reinterpret_cast<double*>(last) = 1;
      else *reinterpret_cast<uint16_t*>(last) = dtype == 2 ? 0x3f80 : 0x3c00;
    }
    buffers.push_back(buffer);
    addresses.push_back(reinterpret_cast<int64_t>(buffer) + misaligned * itemsize);
  }
  const uint32_t count = SIZES.size();
  std::vector<uint64_t> packed_address(count);
  std::vector<uint32_t> tile_offsets(count + 1);
  const int64_t tiles =
      fastclip_cuda_pack(addresses.data(), SIZES.data(), count, itemsize, packed_address.data(), tile_offsets.data());
  int64_t bytes = 0;
  check(fastclip_cuda_workspace_bytes(0, &bytes));
  check(tiles > 0);
  std::vector<char> workspace(bytes);
  std::vector<double> result(2 * count + 4), coef(count, 0.5);
  float norm32 = 0;
  const GradTable gradients{packed_address.data(), tile_offsets.data(), count, uint32_t(tiles), dtype, 0, nullptr};
  const MeasureOptions options{p, 0.5, nullptr, nullptr, nullptr, workspace.data(), result.data(), &norm32};
  MeasureOptions absmax_options = options;
  absmax_options.p = INFINITY;
  bool changed = false;
  for (int repeat = 0; repeat < 2; repeat++) check(fastclip_cuda_measure(&gradients, &options));
  const double norm = std::isinf(p) ? 1 : std::pow(8, 1 / p);  // 8 tensors are not empty
  check(std::abs(result[2 * count + 2] - norm) < 1e-9 && norm32 == float(result[2 * count + 2]));
  check(fastclip_cuda_apply(&gradients, coef.data(), 1));
  check(fastclip_cuda_clamp(&gradients, -0.25, 0.25, &changed));
  check(changed);
  check(fastclip_cuda_measure(&gradients, &absmax_options));
  check(result[2 * count + 2] == 0.25);
  // Infinity as the last element of the large one, which several blocks share.
  const int infinity[] = {0, 0, 0x7f80, 0x7c00};
  char* last = reinterpret_cast<char*>(addresses[3]) + (SIZES[3] - 1) * itemsize;
  if (dtype == 0) *reinterpret_cast<float*>(last) = INFINITY;
  else if (dtype == 1) *reinterpret_cast<double*>(last) = INFINITY;
  else *reinterpret_cast<uint16_t*>(last) = infinity[dtype];
  check(fastclip_cuda_measure(&gradients, &options));
  std::vector<int64_t> counts(count);
  std::vector<double> again(2 * count + 4);
  check(fastclip_cuda_repair(&gradients, result.data() + count, counts.data()));
  for (uint32_t i = 0; i < count; i++) check(counts[i] == (i == 3));
  MeasureOptions again_options = absmax_options;
  again_options.earlier_power = result.data();
  again_options.earlier_absmax = result.data() + count;
  again_options.result = again.data();
  check(fastclip_cuda_measure(&gradients, &again_options));
  check(again[2 * count + 2] == 0.25 && again[count + 3] == 0);
  coef[0] = 0.0;
  check(fastclip_cuda_apply(&gradients, coef.data(), 0));
  for (char* buffer : buffers) std::free(buffer);
}

// An optimizer with this many states, all arrays zeros, so that all stay what they are but for the step counts.
void run_step(int dtype, bool adam, int states, int64_t misaligned, bool stochastic) {
  const int itemsize = ITEMSIZE[dtype];
  const size_t count = SIZES.size();
  std::vector<std::unique_ptr<char[]>> buffers;
  std::vector<int64_t> rows(7 * count);
  std::vector<float> steps(count);
  for (size_t i = 0; i < count; i++) {
    for (int row = 0; row < 2 + states; row++) {
      const int64_t offset = misaligned ? (row == 1 ? misaligned + 1 : misaligned) : 0;
      buffers.push_back(std::make_unique<char[]>((SIZES[i] + offset) * itemsize));
      rows[row * count + i] = reinterpret_cast<int64_t>(buffers.back().get()) + offset * itemsize;
    }
    rows[5 * count + i] = reinterpret_cast<int64_t>(&steps[i]);
    rows[6 * count + i] = SIZES[i];
  }
  std::vector<uint32_t> tile_offsets(count + 1);
  const int64_t tiles = fastclip_cuda_pack_step(rows.data(), count, itemsize, states, tile_offsets.data());
  check(tiles > 0);
  const std::unique_ptr<char[]> workspace(new char[fastclip_cuda_step_bytes(count)]);
  const std::vector<double> coef = {1, 1, 0, 0.5, 1, 1, 0, 1, 1, 1};
  const std::unique_ptr<bool[]> frozen(new bool[count]());
  frozen[4] = frozen[8] = true;
  const float lr = 0.5;
  StepTable table{};
  table.rows = rows.data();
  table.tile_offsets = tile_offsets.data();
  table.workspace = workspace.get();
  table.tensors = uint32_t(count);
  table.tiles = uint32_t(tiles);
  table.dtype = dtype;
  table.states = states;
  StepDecision decision{};
  decision.coef = coef.data();
  decision.coef_stride = 1;
  decision.seed = stochastic ? 7 : -1;
  if (adam) {
    decision.frozen = frozen.get();
    decision.frozen_stride = 1;
    decision.lr_pointer = &lr;
    decision.lr_itemsize = sizeof(lr);
  } else {
    decision.lr = lr;
    decision.maximize = true;
  }
  for (int repeat = 0; repeat < 2; repeat++) {
    decision.zero_grad = repeat == 1;
    const AdamWOptions adamw{0.9, 0.99, 1e-8, 0.1};
    const SgdOptions sgd{0.9, 1, 0.1, repeat == 1};
    check(adam ? fastclip_cuda_adamw(&table, &decision, &adamw) : fastclip_cuda_sgd(&table, &decision, &sgd));
  }
  for (size_t i = 0; i < count; i++) check(steps[i] == (adam && !frozen[i] ? 2 : 0));
}

}  // namespace

// The first argument, if there is one: go through the dtypes by so many. Barriers are the same in all of them.
int main(int count, char** arguments) {
  const int by = count > 1 ? std::atoi(arguments[1]) : 1;
  unsigned order = 0;
  for (int dtype = 0; dtype < 4; dtype += by)
    for (double p : {2.0, 1.0, 3.0, double(INFINITY)}) {
      fastclip_emulate(1 + order % 2, order);
      run(dtype, p, order % 4);
      order++;
    }
  for (int dtype = 0; dtype < 4; dtype += by)
    for (int states = 0; states < 4; states++)
      for (int64_t misaligned : {0, 1}) {
        fastclip_emulate(1 + order % 2, order);
        run_step(dtype, states >= 2, states, misaligned, dtype == 2 && misaligned == states % 2);
        order++;
      }
  std::puts("clean");
}
