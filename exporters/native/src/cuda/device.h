// A kernel's view of CUDA: a stream that launches, copies, and turns errors into statuses.
//
// A kernel is a struct of its arguments with `phases` parts, separated by barriers of the block. It may loop: its phases
// loop_begin ... loop_end - 1 repeat while `again(state)`, which must be the same for all threads of a block; `State` is
// what a thread keeps in registers between phases. The same struct runs on the device and, with IRC_EMULATED, thread by
// thread on the host, where tests compare it with the reference (tests/exporters/test_cuda_emulated.py).
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>

#include "../kernel.h"
#include "../numbers.h"
#ifdef IRC_EMULATED
#include "emulated.h"
#else
#include <cuda_runtime.h>
#endif

namespace irc {

constexpr int kThreads = 256;  // of a block

template <class Kernel, class = void>
constexpr bool kLoops = false;
template <class Kernel>
constexpr bool kLoops<Kernel, std::void_t<typename Kernel::State>> = true;
template <class Kernel, class = void>
constexpr int kResident = 1;
template <class Kernel>
constexpr int kResident<Kernel, std::void_t<typename Kernel::State>> = Kernel::resident;

#ifdef IRC_EMULATED
#define IRC_DEVICE
#define IRC_UNROLL
constexpr const char* kProvider = "CPUExecutionProvider";

// Phases Phase ... End - 1. Odd blocks run their threads backwards: within a phase no thread may depend on another.
template <int Phase, int End, class Kernel, class... State>
void run_phases(const Kernel& kernel, int64_t block, typename Kernel::Shared& shared, State*... states) {
  if constexpr (Phase < End) {
    for (int i = 0; i < kThreads; ++i) {
      const int thread = block % 2 ? kThreads - 1 - i : i;
      kernel.template run<Phase>(block, thread, shared, states[thread]...);
    }
    run_phases<Phase + 1, End>(kernel, block, shared, states...);
  }
}

// Reading memory that was not written gives wrong results.
template <class T>
void spoil(T* memory, int count) { std::memset(static_cast<void*>(memory), 0xff, size_t(count) * sizeof(T)); }

template <class Kernel>
cudaError_t enter(const Kernel& kernel, int64_t blocks, cudaStream_t) {
  typename Kernel::Shared shared;
  if constexpr (kLoops<Kernel>) {
    std::vector<typename Kernel::State> states(kThreads);
    for (int64_t block = 0; block < blocks; ++block) {
      spoil(&shared, 1);
      spoil(states.data(), kThreads);
      run_phases<0, Kernel::loop_begin>(kernel, block, shared, states.data());
      while (kernel.again(states[0])) run_phases<Kernel::loop_begin, Kernel::loop_end>(kernel, block, shared, states.data());
      run_phases<Kernel::loop_end, Kernel::phases>(kernel, block, shared, states.data());
    }
  } else {
    for (int64_t block = 0; block < blocks; ++block) {
      spoil(&shared, 1);
      run_phases<0, Kernel::phases>(kernel, block, shared);
    }
  }
  return cudaSuccess;
}
#else
#define IRC_DEVICE __device__ __forceinline__
#define IRC_UNROLL _Pragma("unroll")
constexpr const char* kProvider = "CUDAExecutionProvider";

template <int Phase, int End, class Kernel, class... State>
IRC_DEVICE void run_phases(const Kernel& kernel, typename Kernel::Shared& shared, State&... state) {
  if constexpr (Phase < End) {
    kernel.template run<Phase>(int64_t(blockIdx.x), int(threadIdx.x), shared, state...);
    if constexpr (Phase + 1 < Kernel::phases) __syncthreads();
    run_phases<Phase + 1, End>(kernel, shared, state...);
  }
}

template <class Kernel>
__global__ void __launch_bounds__(kThreads, kResident<Kernel>) entry(const Kernel kernel) {
  extern __shared__ __align__(128) unsigned char memory[];
  auto& shared = *reinterpret_cast<typename Kernel::Shared*>(memory);
  if constexpr (kLoops<Kernel>) {
    typename Kernel::State state;
    run_phases<0, Kernel::loop_begin>(kernel, shared, state);
    while (kernel.again(state)) run_phases<Kernel::loop_begin, Kernel::loop_end>(kernel, shared, state);
    run_phases<Kernel::loop_end, Kernel::phases>(kernel, shared, state);
  } else {
    run_phases<0, Kernel::phases>(kernel, shared);
  }
}

template <class Kernel>
cudaError_t enter(const Kernel& kernel, int64_t blocks, cudaStream_t stream) {
  using Shared = typename Kernel::Shared;
  constexpr size_t bytes = std::is_empty<Shared>::value ? 0 : sizeof(Shared);
  if constexpr (bytes > 48 * 1024) {  // more must be requested
    const auto what = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (const cudaError_t error = cudaFuncSetAttribute(entry<Kernel>, what, int(bytes))) return error;
  }
  entry<<<unsigned(blocks), kThreads, bytes, stream>>>(kernel);
  return cudaGetLastError();
}
#endif

// `Count` numbers that are read and written at once.
template <class T, int Count>
struct alignas(Count * sizeof(T)) Pack {
  T value[Count];
};

struct Nothing {};  // shared memory of kernels that need none

// The number of blocks for `count` items, `each` per block.
inline int64_t blocks_for(int64_t count, int64_t each) { return (count + each - 1) / each; }

// The stream of a call. Only `fetch` waits for the device.
class Stream {
 public:
  explicit Stream(const Call& call) : call_(call), stream_(static_cast<cudaStream_t>(call.stream())) {}

  template <class Kernel>
  void launch(int64_t blocks, const Kernel& kernel) const {
    if (blocks == 0) return;  // an empty grid is an error in CUDA
    if (blocks > 0x7fffffff) call_.fail("there is more to do than one launch can");
    check(enter(kernel, blocks, stream_), "starting a kernel");
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

// Allocates memory in stream order from the library's own pool, which keeps some of the freed memory: CUDA's default pool
// returns all of it to the system at every wait for a stream.
cudaError_t take_memory(void** memory, size_t bytes, cudaStream_t stream);

// Device memory for one call, allocated and freed in stream order.
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
