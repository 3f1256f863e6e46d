// The few CUDA calls that the kernels' host side makes, on host memory, for tests without a GPU. With
// IRC_EMULATED_ERROR set in the environment every wait for the stream ends with that error.
#pragma once

#include <cstdlib>
#include <cstring>

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
inline int cudaFreeAsync(void* memory, void*) {
  std::free(memory);
  return cudaSuccess;
}
