// Runs every kernel of cuda.cu on buffers of exactly the tensors' size, for the sanitizers to watch: no thread may touch
// what another one writes without a barrier between (-fsanitize=thread), nor anything outside (-fsanitize=address).
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

extern "C" {
void fastclip_emulate(int units, unsigned order);
int64_t fastclip_cuda_pack(const int64_t*, const int64_t*, int64_t, int, uint64_t*, uint32_t*);
const char* fastclip_cuda_workspace_bytes(int, int64_t*);
const char* fastclip_cuda_measure(const uint64_t*, const uint32_t*, uint32_t, uint32_t, int, double, double, const double*,
                                  void*, double*, int, void*);
const char* fastclip_cuda_apply(const uint64_t*, const uint32_t*, uint32_t, uint32_t, int, const double*, int, int, void*);
const char* fastclip_cuda_clamp(const uint64_t*, const uint32_t*, uint32_t, uint32_t, int, double, double, bool*, int,
                                void*);
}

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
  std::vector<uint64_t> place(count);
  std::vector<uint32_t> first(count + 1);
  const int64_t tiles = fastclip_cuda_pack(addresses.data(), SIZES.data(), count, itemsize, place.data(), first.data());
  int64_t bytes = 0;
  check(fastclip_cuda_workspace_bytes(0, &bytes));
  check(tiles > 0);
  std::vector<char> workspace(bytes);
  std::vector<double> result(2 * count + 4), coef(count, 0.5);
  bool changed = false;
  for (int repeat = 0; repeat < 2; repeat++)
    check(fastclip_cuda_measure(place.data(), first.data(), count, tiles, dtype, p, 0.5, nullptr, workspace.data(),
                                result.data(), 0, nullptr));
  const double norm = std::isinf(p) ? 1 : std::pow(8, 1 / p);  // 8 tensors are not empty
  check(std::abs(result[2 * count + 2] - norm) < 1e-9);
  check(fastclip_cuda_apply(place.data(), first.data(), count, tiles, dtype, coef.data(), 1, 0, nullptr));
  check(fastclip_cuda_clamp(place.data(), first.data(), count, tiles, dtype, -0.25, 0.25, &changed, 0, nullptr));
  check(changed);
  check(fastclip_cuda_measure(place.data(), first.data(), count, tiles, dtype, INFINITY, 0.5, nullptr, workspace.data(),
                              result.data(), 0, nullptr));
  check(result[2 * count + 2] == 0.25);
  coef[0] = 0.0;
  check(fastclip_cuda_apply(place.data(), first.data(), count, tiles, dtype, coef.data(), 0, 0, nullptr));
  for (char* buffer : buffers) std::free(buffer);
}

}  // namespace

int main() {
  unsigned order = 0;
  for (int dtype = 0; dtype < 4; dtype++)
    for (double p : {2.0, 1.0, 3.0, double(INFINITY)}) {
      fastclip_emulate(1 + order % 2, order);
      run(dtype, p, order % 4);
      order++;
    }
  std::puts("clean");
}
