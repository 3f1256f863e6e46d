// The part of ONNX Runtime's C ABI that custom operators need, declared by hand.
//
// No package registry ships ONNX Runtime's headers. The ABI is append-only: a function keeps its place in the table of
// OrtApi for ever, so the place is enough to call it. Models ran on ONNX Runtime 1.23, 1.24, 1.25 and 1.32;
// tests/exporters/test_native_ops.py runs kernels that make these calls on the installed version. Sources: onnxruntime_c_api.h,
// "OrtApi" and "OrtCustomOp".
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

struct OrtStatus;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;

struct OrtApi {
  void (*slot[275])();
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// Describes one operator for one provider and one type: 26 words, the last four of which came with API 18.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  size_t (*GetMayInplace)(int** inputs, int** outputs);
  void (*ReleaseMayInplace)(int* inputs, int* outputs);
  size_t (*GetAliasMap)(int** inputs, int** outputs);
  void (*ReleaseAliasMap)(int* inputs, int* outputs);
};
static_assert(sizeof(void*) != 8 || sizeof(OrtCustomOp) == 208, "OrtCustomOp is 26 words");

}  // extern "C"

namespace irc {

constexpr uint32_t kApiVersion = 23;       // uses nothing that ONNX Runtime 1.23 lacks
constexpr uint32_t kCustomOpVersion = 18;  // the first with GetMayInplace
constexpr int kInvalidArgument = 2, kRuntimeException = 6;  // OrtErrorCode
constexpr int kFloat = 1, kInt64 = 7, kBool = 9, kHalf = 10, kBFloat = 16;  // ONNXTensorElementDataType

// A function of the API by its place in the table and its type.
template <int Place, class Result, class... Arguments>
struct Function {
  static Result call(const OrtApi* api, Arguments... arguments) {
    return reinterpret_cast<Result (*)(Arguments...)>(api->slot[Place])(arguments...);
  }
};

using CreateStatus = Function<0, OrtStatus*, int, const char*>;
using GetErrorMessage = Function<2, const char*, const OrtStatus*>;
using CreateCustomOpDomain = Function<26, OrtStatus*, const char*, OrtCustomOpDomain**>;
using CustomOpDomainAdd = Function<27, OrtStatus*, OrtCustomOpDomain*, const OrtCustomOp*>;
using AddCustomOpDomain = Function<28, OrtStatus*, OrtSessionOptions*, OrtCustomOpDomain*>;
using GetTensorMutableData = Function<51, OrtStatus*, OrtValue*, void**>;
using GetDimensionsCount = Function<61, OrtStatus*, const OrtTensorTypeAndShapeInfo*, size_t*>;
using GetDimensions = Function<62, OrtStatus*, const OrtTensorTypeAndShapeInfo*, int64_t*, size_t>;
using GetSymbolicDimensions = Function<63, OrtStatus*, const OrtTensorTypeAndShapeInfo*, const char**, size_t>;
using GetTensorTypeAndShape = Function<65, OrtStatus*, const OrtValue*, OrtTensorTypeAndShapeInfo**>;
using GetAttributeFloat = Function<85, OrtStatus*, const OrtKernelInfo*, const char*, float*>;
using GetAttributeInt64 = Function<86, OrtStatus*, const OrtKernelInfo*, const char*, int64_t*>;
using GetInput = Function<90, OrtStatus*, const OrtKernelContext*, size_t, const OrtValue**>;
using GetOutput = Function<91, OrtStatus*, OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**>;
using ReleaseStatus = Function<93, void, OrtStatus*>;
using GetStream = Function<193, OrtStatus*, const OrtKernelContext*, void**>;  // KernelContext_GetGPUComputeStream, API 11
using ReleaseTensorTypeAndShapeInfo = Function<99, void, OrtTensorTypeAndShapeInfo*>;
using GetResource = Function<265, OrtStatus*, const OrtKernelContext*, int, int, void**>;  // KernelContext_GetResource, API 16
using GetInferredInput = Function<268, OrtStatus*, const OrtShapeInferContext*, size_t, OrtTensorTypeAndShapeInfo**>;  // ShapeInferContext_GetInputTypeShape, API 17
using SetInferredOutput = Function<270, OrtStatus*, const OrtShapeInferContext*, size_t, const OrtTensorTypeAndShapeInfo*>;  // ShapeInferContext_SetOutputTypeShape
using ParallelFor = Function<274, OrtStatus*, const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*>;

}  // namespace irc
