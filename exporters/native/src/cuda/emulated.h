// The few CUDA calls that the kernels' host side makes, on host memory, for tests without a GPU. With the environment
// variable IRC_EMULATED_ERROR every wait for the stream ends with that error. With IRC_EMULATED_FULL there is no memory
// until the pool is trimmed (`always`: not even then); with `recording` a CUDA graph is being recorded.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "../numbers.h"

#define CUDART_VERSION 0

using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0, cudaErrorMemoryAllocation = 2, cudaErrorInsufficientDriver = 35, cudaErrorNoDevice = 100,
              cudaErrorNoKernelImageForDevice = 209, cudaErrorStreamCaptureUnsupported = 900;
constexpr int cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3;

inline int cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(int) { return "an emulated error"; }
inline int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, void*) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline int cudaMemsetAsync(void* to, int value, size_t bytes, void*) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
inline int cudaStreamSynchronize(void*) {
  const char* error = std::getenv("IRC_EMULATED_ERROR");
  return error ? std::atoi(error) : cudaSuccess;
}

// Memory pools.
struct cudaMemPoolProps {
  int allocType;
  struct {
    int type, id;
  } location;
};
using cudaMemPool_t = const char*;
using cudaStreamCaptureStatus = int;
constexpr int cudaMemAllocationTypePinned = 1, cudaMemLocationTypeDevice = 1, cudaMemPoolAttrReleaseThreshold = 4;
constexpr int cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1;

inline const char* emulated_full() {
  const char* full = std::getenv("IRC_EMULATED_FULL");
  return full ? full : "";
}
inline bool emulated_trimmed = false;

inline int cudaGetDevice(int* device) { return *device = 0; }
inline int cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) {
  *pool = "a pool";
  return cudaSuccess;
}
inline int cudaMemPoolSetAttribute(cudaMemPool_t, int, void*) { return cudaSuccess; }
inline int cudaMallocAsync(void** memory, size_t bytes, void*) {
  const bool full = *emulated_full() && (!emulated_trimmed || !std::strcmp(emulated_full(), "always"));
  emulated_trimmed = false;
  *memory = full ? nullptr : std::malloc(bytes);
  return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline int cudaMallocFromPoolAsync(void** memory, size_t bytes, cudaMemPool_t, void* stream) {
  return cudaMallocAsync(memory, bytes, stream);
}
inline int cudaMemPoolTrimTo(cudaMemPool_t, size_t) {
  emulated_trimmed = true;
  return cudaSuccess;
}
inline int cudaStreamIsCapturing(void*, cudaStreamCaptureStatus* status) {
  *status = std::strcmp(emulated_full(), "recording") ? cudaStreamCaptureStatusNone : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
inline int cudaFreeAsync(void* memory, void*) {
  std::free(memory);
  return cudaSuccess;
}

namespace irc {

// cublasGemmEx of matrices that are not transposed, all of one type: c = a @ b, each stored by columns.
template <class T>
void multiply_columns(int m, int n, int k, const void* a, int lead_a, const void* b, int lead_b, void* c, int lead_c) {
  for (int row = 0; row < m; ++row)
    for (int column = 0; column < n; ++column) {
      float sum = 0;
      for (int i = 0; i < k; ++i)
        sum += load(static_cast<const T*>(a)[row + int64_t(i) * lead_a]) * load(static_cast<const T*>(b)[i + int64_t(column) * lead_b]);
      store(sum, static_cast<T*>(c) + row + int64_t(column) * lead_c);
    }
}

inline int emulated_gemm(void*, int transpose_a, int transpose_b, int m, int n, int k, const void*, const void* a, int type,
                         int lead_a, const void* b, int, int lead_b, const void*, void* c, int, int lead_c, int, int) {
  constexpr int kInvalidValue = 7;
  if (transpose_a || transpose_b || lead_a < m || lead_b < k || lead_c < m) return kInvalidValue;
  const auto run = type == 0 ? multiply_columns<float> : type == 2 ? multiply_columns<Half> : multiply_columns<BFloat>;
  run(m, n, k, a, lead_a, b, lead_b, c, lead_c);
  return 0;
}

}  // namespace irc
