// CUDA's runtime as far as csrc/cuda/ uses it, on the CPU: `g++ -x c++ -I tests/emulation csrc/cuda/*.cu` gives the same
// library, whose kernels then run on host memory. Blocks run in turn, in a shuffled order; the threads of a block are real
// threads that meet at real barriers, so a missing one shows, here or under -fsanitize=thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#define CUDART_VERSION 12030

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time

using std::max;
using std::min;

// ---- vocabulary ----

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 { uint32_t x, y, z, w; };
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline float __uint_as_float(uint32_t x) { return bits_as<float>(x); }
inline uint32_t __float_as_uint(float x) { return bits_as<uint32_t>(x); }
inline float __int_as_float(int32_t x) { return bits_as<float>(x); }
inline int32_t __float_as_int(float x) { return bits_as<int32_t>(x); }
inline int64_t __double_as_longlong(double x) { return bits_as<int64_t>(x); }
inline double __longlong_as_double(int64_t x) { return bits_as<double>(x); }

inline void* __cvta_global_to_generic(size_t address) { return reinterpret_cast<void*>(address); }

template <class T>
T __ldcg(const T* pointer) {
  return *pointer;
}

// ---- threads ----

namespace emulation {

constexpr unsigned WARP = 32;

inline int units = 2;       // multiprocessors
inline bool idle = false;   // launches copy their parameters, as CUDA's do, and run nothing: what is left is host time
inline unsigned order = 0;  // seed of the order of the blocks
inline bool capturing = false;
inline int launches = 0, overlapping = 0;  // how many there were, and how many of them might begin early
inline std::mutex one_launch;
inline std::barrier<>* block_barrier;
inline std::vector<std::barrier<>*> warp_barriers;
inline std::vector<uint64_t> exchanged;
inline std::atomic<int> votes[2];

inline unsigned lane() { return threadIdx.x % WARP; }
inline void warp_sync() { warp_barriers[threadIdx.x / WARP]->arrive_and_wait(); }

}  // namespace emulation

inline void __syncthreads() { emulation::block_barrier->arrive_and_wait(); }

inline int __syncthreads_or(int predicate) {
  __syncthreads();
  if (threadIdx.x == 0) emulation::votes[0] = 0;
  __syncthreads();
  if (predicate) emulation::votes[0] = 1;
  __syncthreads();
  return emulation::votes[0];
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int step) {
  if (mask != 0xffffffffu) std::abort();
  uint64_t raw = 0;
  std::memcpy(&raw, &value, sizeof(value));
  emulation::exchanged[threadIdx.x] = raw;
  emulation::warp_sync();
  raw = emulation::exchanged[threadIdx.x ^ step];
  emulation::warp_sync();
  std::memcpy(&value, &raw, sizeof(value));
  return value;
}

inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

template <class T>
T atomicAdd(T* pointer, T value) {
  return __atomic_fetch_add(pointer, value, __ATOMIC_SEQ_CST);
}

// ---- host ----

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidDevice };
inline const char* cudaGetErrorString(cudaError_t) { return "invalid device ordinal"; }

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = emulation::units;
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
struct cudaFuncAttributes { int ptxVersion = 90; };
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  *attributes = {};
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulation::capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeIgnore, cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id = cudaLaunchAttributeIgnore;
  struct { int programmaticStreamSerializationAllowed; } val = {0};
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

template <class... Parameters>
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), void** pointers) {
  using namespace emulation;
  const std::lock_guard<std::mutex> alone(one_launch);
  for (unsigned i = 0; i < config->numAttrs; i++)
    overlapping += config->attrs[i].val.programmaticStreamSerializationAllowed;
  launches++;
  if (idle) {
    static std::vector<unsigned char> buffer(1 << 16);
    unsigned char* end = buffer.data();
    ((std::memcpy(end, *pointers++, sizeof(Parameters)), end += sizeof(Parameters)), ...);
    asm volatile("" ::"r"(buffer.data()) : "memory");
    return cudaSuccess;
  }
  auto call = [&]<size_t... I>(std::index_sequence<I...>) { kernel(*static_cast<Parameters*>(pointers[I])...); };
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  std::vector<unsigned> blocks(gridDim.x);
  std::iota(blocks.begin(), blocks.end(), 0u);
  std::shuffle(blocks.begin(), blocks.end(), std::mt19937(order));
  std::barrier<> all(blockDim.x);
  std::vector<std::barrier<>*> warps;
  for (unsigned w = 0; w < blockDim.x / WARP; w++) warps.push_back(new std::barrier<>(WARP));
  block_barrier = &all;
  warp_barriers = warps;
  exchanged.assign(blockDim.x, 0);
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < blockDim.x; t++)
    threads.emplace_back([&, t] {
      threadIdx = dim3(t);
      for (unsigned block : blocks) {
        blockIdx = dim3(block);
        call(std::index_sequence_for<Parameters...>());
        __syncthreads();  // the next block has the same shared memory
      }
    });
  for (auto& thread : threads) thread.join();
  for (auto* warp : warps) delete warp;
  return cudaSuccess;
}

// How many multiprocessors there are, and the order in which blocks run; without any (0), launches do not run.
extern "C" inline void __attribute__((used)) fastclip_emulate(int units, unsigned order) {
  emulation::idle = units == 0;
  emulation::units = units ? units : 132;
  emulation::order = order;
}

// How many kernels were launched, and how many of them so that they may begin before the kernel before has ended.
extern "C" inline void __attribute__((used)) fastclip_emulated_launches(int* launches, int* overlapping) {
  *launches = emulation::launches;
  *overlapping = emulation::overlapping;
}
