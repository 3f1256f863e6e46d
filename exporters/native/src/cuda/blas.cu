// Calls cublasGemmEx, which is looked up at its first use: this library does not link to cuBLAS, so that it works with
// every version that ONNX Runtime uses.

#include "blas.h"

#ifndef IRC_EMULATED
#include <dlfcn.h>
#include <link.h>

#include <vector>
#endif

namespace irc {
namespace {

// The arguments of cublasGemmEx (cublas_v2.h); enumerations are int.
using Gemm = int (*)(void* handle, int transpose_a, int transpose_b, int m, int n, int k, const void* alpha, const void* a,
                     int type_a, int lead_a, const void* b, int type_b, int lead_b, const void* beta, void* c, int type_c,
                     int lead_c, int compute, int algorithm);
constexpr int kAsItIs = 0, kSumsInFloat = 68, kAnyAlgorithm = -1;  // CUBLAS_OP_N, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT
constexpr int kHandle = 10002;                                     // cublas_handle_t of ONNX Runtime's CudaResource

constexpr int type_of(const float*) { return 0; }    // CUDA_R_32F
constexpr int type_of(const Half*) { return 2; }     // CUDA_R_16F
constexpr int type_of(const BFloat*) { return 14; }  // CUDA_R_16BF

#ifdef IRC_EMULATED
Gemm find_gemm() { return emulated_gemm; }

// Tests check the function's place in ONNX Runtime's table: the CPU provider replies that it has no stream.
void* handle_of(const Call& call) { return std::getenv("IRC_EMULATED_HANDLE") ? call.resource(kHandle) : nullptr; }
#else
// The path of ONNX Runtime's CUDA provider, which it loads under a fixed name; empty if there is none.
std::string provider_path() {
  std::string found;
  const auto look = [](dl_phdr_info* library, size_t, void* to) {
    if (std::strstr(library->dlpi_name, "onnxruntime_providers_cuda")) *static_cast<std::string*>(to) = library->dlpi_name;
    return 0;
  };
  dl_iterate_phdr(look, &found);
  return found;
}

// The handle belongs to ONNX Runtime's cuBLAS, so the function must come from the same library: the one that the provider
// links to; if that is unknown, one that is loaded; else one that is installed.
Gemm find_gemm() {
  struct Place {
    std::string library;
    int flags;
  };
  const std::string own = provider_path();
  std::vector<Place> places = {{own, RTLD_NOLOAD}};
  if (own.empty())
    places = {{"libcublas.so.13", RTLD_NOLOAD}, {"libcublas.so.12", RTLD_NOLOAD}, {"libcublas.so.13", 0}, {"libcublas.so.12", 0}};
  for (const Place& place : places) {
    void* library = place.library.empty() ? nullptr : dlopen(place.library.c_str(), RTLD_NOW | place.flags);
    if (void* found = library ? dlsym(library, "cublasGemmEx") : nullptr) return reinterpret_cast<Gemm>(found);
  }
  return nullptr;
}

void* handle_of(const Call& call) { return call.resource(kHandle); }
#endif

}  // namespace

// cuBLAS is column-major: for it these are y' = w' @ x', each unchanged in memory.
template <class T>
void multiply(const Call& call, const T* x, const T* w, T* y, int64_t rows, int64_t depth, int64_t columns) {
  static const Gemm gemm = find_gemm();
  if (!gemm) call.fail("cuBLAS is not there (libcublas.so.12 or .13); install the one that ONNX Runtime needs");
  constexpr int64_t most = 0x7fffffff;
  if (rows > most || depth > most || columns > most) call.fail("the product is too large for cuBLAS");
  void* handle = handle_of(call);
  const float one = 1, zero = 0;
  const int type = type_of(x), m = int(columns), n = int(rows), k = int(depth);
  const int status = gemm(handle, kAsItIs, kAsItIs, m, n, k, &one, w, type, m, x, type, k, &zero, y, type, m, kSumsInFloat,
                          kAnyAlgorithm);
  if (status) throw Failure{kRuntimeException, std::string(call.name()) + ": cuBLAS failed with status " + std::to_string(status)};
}

template void multiply(const Call&, const float*, const float*, float*, int64_t, int64_t, int64_t);
template void multiply(const Call&, const Half*, const Half*, Half*, int64_t, int64_t, int64_t);
template void multiply(const Call&, const BFloat*, const BFloat*, BFloat*, int64_t, int64_t, int64_t);

}  // namespace irc
