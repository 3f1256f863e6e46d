// Registers the kernels of domain `irc` on CUDA, one for each type, and explains CUDA errors.

#include <mutex>
#include <string>

#include "../operators.h"
#include "device.h"

#ifndef IRC_ARCHITECTURES
#define IRC_ARCHITECTURES ""
#endif

namespace irc {
namespace {

std::string toolkit() { return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION / 10 % 100); }

std::string explain(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
      return "the library has code for " IRC_ARCHITECTURES " and not for this GPU; build it again with CMAKE_CUDA_ARCHITECTURES";
    case cudaErrorInsufficientDriver:
      return "the NVIDIA driver is too old for CUDA " + toolkit() + ", which the library was built with; update it";
    case cudaErrorNoDevice:
      return "there is no NVIDIA GPU";
    case cudaErrorMemoryAllocation:
      return "the GPU's memory is used up";
    case cudaErrorStreamCaptureUnsupported:
      return "this operator waits for the device, which a CUDA graph cannot hold; run without enable_cuda_graph";
    default:
      return cudaGetErrorString(error);
  }
}

template <class T, int Type>
OrtStatus* add_type(const OrtApi* api, OrtCustomOpDomain* domain) {
  static const Operator operators[] = {
      make("Compact", "TI", "T", Type, plain<compact<T>>, false, false, kProvider),
      make("Scatter", "TIT", "T", Type, plain<scatter<T>>, true, false, kProvider),
      make("ScatterAdd", "TIT", "T", Type, plain<scatter_add<T>>, true, false, kProvider),
      make("RoutedMatMul", "TIT", "T", Type, plain<routed_matmul<T>>, false, false, kProvider),
      make("RoutedGate", "TITT", "T", Type, plain<routed_gate<T>>, false, false, kProvider),
      make("Router", "TTTTT", "F", Type, plain<router<T>>, false, false, kProvider),
      make("ForecastAdd", "TITTTT", "T", Type, plain<forecast_add<T>>, true, false, kProvider),
      make("RaggedPlaces", "IT", "II", Type, plain<ragged_places<T>>, false, false, kProvider),
      make("RoutedAttention", "TITTTTT", "TTT", Type, routed_attention<T>, false, true, kProvider),
  };
  for (const Operator& op : operators)
    if (OrtStatus* status = CustomOpDomainAdd::call(api, domain, &op)) return status;
  return nullptr;
}

OrtStatus* add_operators(const OrtApi* api, OrtCustomOpDomain* domain) {
  static const Operator choices[] = {
      make("SelectRows", "B", "II", kBool, select_rows, false, false, kProvider),
      make("DecideRows", "F", "II", kFloat, decide_rows, false, false, kProvider),
  };
  for (const Operator& op : choices)
    if (OrtStatus* status = CustomOpDomainAdd::call(api, domain, &op)) return status;
  if (OrtStatus* status = add_type<float, kFloat>(api, domain)) return status;
  if (OrtStatus* status = add_type<Half, kHalf>(api, domain)) return status;
  return add_type<BFloat, kBFloat>(api, domain);
}

}  // namespace

namespace {

// How much freed memory a pool keeps: about what one call needs for a long prompt of a large model. The rest returns to
// the system at the next wait for the stream, where ONNX Runtime's own memory can use it.
constexpr uint64_t kKept = uint64_t(256) << 20;

// A device's pool, created at its first use; null for devices beyond the number that is supported.
cudaError_t pool_of(int device, cudaMemPool_t* found) {
  constexpr int kMostDevices = 64;
  static std::mutex mutex;
  static cudaMemPool_t pools[kMostDevices] = {};
  *found = nullptr;
  if (device >= kMostDevices) return cudaSuccess;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!pools[device]) {
    cudaMemPoolProps properties{};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    properties.location.id = device;
    cudaMemPool_t made = nullptr;
    if (const cudaError_t error = cudaMemPoolCreate(&made, &properties)) return error;
    uint64_t kept = kKept;
    if (const cudaError_t error = cudaMemPoolSetAttribute(made, cudaMemPoolAttrReleaseThreshold, &kept)) return error;
    pools[device] = made;
  }
  *found = pools[device];
  return cudaSuccess;
}

}  // namespace

cudaError_t take_memory(void** memory, size_t bytes, cudaStream_t stream) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  cudaMemPool_t pool = nullptr;
  if (const cudaError_t error = pool_of(device, &pool)) return error;
  if (!pool) return cudaMallocAsync(memory, bytes, stream);
  const cudaError_t error = cudaMallocFromPoolAsync(memory, bytes, pool, stream);
  if (error != cudaErrorMemoryAllocation) return error;
  // Kept pieces may suffice once they are merged. While a CUDA graph is recorded, waiting is not allowed.
  cudaStreamCaptureStatus recording = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &recording) || recording != cudaStreamCaptureStatusNone) return error;
  cudaGetLastError();
  if (const cudaError_t late = cudaStreamSynchronize(stream)) return late;
  if (const cudaError_t late = cudaMemPoolTrimTo(pool, 0)) return late;
  return cudaMallocFromPoolAsync(memory, bytes, pool, stream);
}

void Stream::check(cudaError_t error, const char* doing) const {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // otherwise the next launch would report this error
  throw Failure{kRuntimeException, std::string(call_.name()) + ": " + explain(error) + " (CUDA error " +
                                       std::to_string(int(error)) + " when " + doing + ")"};
}

}  // namespace irc

extern "C" {

// Called by ONNX Runtime (RegisterCustomOpsLibrary).
__attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  return irc::register_domain(options, base, irc::add_operators);
}

// A description of the library as JSON, which irc reads before it registers the library. Does not look for a GPU.
__attribute__((visibility("default"))) const char* irc_native_describe() {
  static const std::string text =
      "{\"version\": \"" IRC_VERSION "\", \"domain_version\": 1, \"cache_with_room\": true, \"providers\": {\"cuda\": [\"fp32\", \"fp16\", \"bf16\"]}, "
      "\"instruction_set\": \"" IRC_ARCHITECTURES "\", \"cuda\": \"" + irc::toolkit() + "\"}";
  return text.c_str();
}

}  // extern "C"
