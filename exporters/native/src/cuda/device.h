// What a kernel sees of CUDA: a stream that launches, copies, and turns errors into statuses.
//
// A kernel is a struct of its arguments with `phases` parts; a barrier of the block stands between two of them. The
// same struct runs on the device and, with IRC_EMULATED, thread by thread on the host, where tests hold it against the
// reference (tests/exporters/test_cuda_emulated.py).
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "../kernel.h"
#include "../numbers.h"
#ifdef IRC_EMULATED
#include "emulated.h"
#else
#include <cuda_runtime.h>
#endif

namespace irc {

constexpr int kThreads = 256;  // of a block

#ifdef IRC_EMULATED
constexpr const char* kProvider = "CPUExecutionProvider";

template <int Phase, class Kernel>
void run_phases(const Kernel& kernel, int64_t block, typename Kernel::Shared& shared) {
  for (int thread = 0; thread < kThreads; ++thread) kernel.template run<Phase>(block, thread, shared);
  if constexpr (Phase + 1 < Kernel::phases) run_phases<Phase + 1>(kernel, block, shared);
}

template <class Kernel>
void enter(const Kernel& kernel, int64_t blocks, cudaStream_t) {
  for (int64_t block = 0; block < blocks; ++block) {
    typename Kernel::Shared shared;
    std::memset(static_cast<void*>(&shared), 0xff, sizeof shared);  // whatever reads it unwritten goes wrong
    run_phases<0>(kernel, block, shared);
  }
}
#else
constexpr const char* kProvider = "CUDAExecutionProvider";

template <int Phase, class Kernel>
__device__ void run_phases(const Kernel& kernel, typename Kernel::Shared& shared) {
  kernel.template run<Phase>(int64_t(blockIdx.x), int(threadIdx.x), shared);
  if constexpr (Phase + 1 < Kernel::phases) {
    __syncthreads();
    run_phases<Phase + 1>(kernel, shared);
  }
}

template <class Kernel>
__global__ void __launch_bounds__(kThreads) entry(const Kernel kernel) {
  __shared__ typename Kernel::Shared shared;
  run_phases<0>(kernel, shared);
}

template <class Kernel>
void enter(const Kernel& kernel, int64_t blocks, cudaStream_t stream) {
  entry<<<unsigned(blocks), kThreads, 0, stream>>>(kernel);
}
#endif

// `Count` numbers that are read and written at once.
template <class T, int Count>
struct alignas(Count * sizeof(T)) Pack {
  T value[Count];
};

struct Nothing {};  // the shared memory of kernels without any

// Blocks that hold `count` things, `each` in a block.
inline int64_t blocks_for(int64_t count, int64_t each) { return (count + each - 1) / each; }

// The stream of a call. Nothing waits for the device but `fetch`.
class Stream {
 public:
  explicit Stream(const Call& call) : call_(call), stream_(static_cast<cudaStream_t>(call.stream())) {}

  template <class Kernel>
  void launch(int64_t blocks, const Kernel& kernel) const {
    if (blocks == 0) return;  // an empty grid is an error in CUDA
    if (blocks > 0x7fffffff) call_.fail("there is more to do than one launch can");
    enter(kernel, blocks, stream_);
    check(cudaGetLastError(), "starting a kernel");
  }

  void copy(void* to, const void* from, int64_t bytes) const {
    if (bytes) check(cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDeviceToDevice, stream_), "copying");
  }

  void clear(void* to, int64_t bytes) const {
    if (bytes) check(cudaMemsetAsync(to, 0, size_t(bytes), stream_), "clearing memory");
  }

  // Copies to the host and waits for it.
  void fetch(void* to, const void* from, int64_t bytes) const {
    check(cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDeviceToHost, stream_), "copying to the host");
    check(cudaStreamSynchronize(stream_), "waiting for the stream");
  }

  void check(cudaError_t error, const char* doing) const;

  cudaStream_t get() const { return stream_; }

 private:
  const Call& call_;
  cudaStream_t stream_;
};

// Takes memory in the order of a stream from a pool of the library's own, which keeps what is given back: CUDA's default
// pool returns it to the system whenever a stream is waited for.
cudaError_t take_memory(void** memory, size_t bytes, cudaStream_t stream);

// Memory of the device for one call, taken and given back in the order of the stream.
template <class T>
class Scratch {
 public:
  Scratch(const Stream& stream, int64_t count) : stream_(stream) {
    stream.check(take_memory(&data_, size_t(count) * sizeof(T), stream.get()), "asking for memory");
  }
  ~Scratch() { cudaFreeAsync(data_, stream_.get()); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() const { return static_cast<T*>(data_); }

 private:
  const Stream& stream_;
  void* data_ = nullptr;
};

}  // namespace irc
