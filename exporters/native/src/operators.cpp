// Called by ONNX Runtime: creates, runs and destroys kernels, and turns what they throw into a status.

#include "operators.h"

#include <new>
#include <string>

namespace irc {
namespace {

struct Kernel {
  const OrtApi* api;
  const Operator* op;
  Attributes attributes;
};

const Operator* of(const OrtCustomOp* op) { return static_cast<const Operator*>(op); }

OrtStatus* create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
  Kernel* made = new (std::nothrow) Kernel{api, of(op), {}};
  if (!made) return CreateStatus::call(api, kRuntimeException, "irc: out of memory");
  *kernel = made;
  Attributes& a = made->attributes;
  // Only SelectRows and DecideRows have it, and it is optional.
  if (OrtStatus* missing = GetAttributeInt64::call(api, info, "padded", &a.padded)) ReleaseStatus::call(api, missing);
  if (!of(op)->attends) return nullptr;
  OrtStatus* status = GetAttributeInt64::call(api, info, "heads", &a.heads);
  if (!status) status = GetAttributeInt64::call(api, info, "kv_heads", &a.kv_heads);
  if (!status) status = GetAttributeFloat::call(api, info, "scale", &a.scale);
  if (!status && (a.kv_heads < 1 || a.heads < 1 || a.heads % a.kv_heads))
    status = CreateStatus::call(api, kInvalidArgument, "RoutedAttention: kv_heads does not divide heads");
  if (status) {
    delete made;
    *kernel = nullptr;
  }
  return status;
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  const Kernel& self = *static_cast<Kernel*>(kernel);
  try {
    self.op->compute(Call(self.api, context, self.op->name), self.attributes);
    return nullptr;
  } catch (const Failure& failure) {
    return CreateStatus::call(self.api, failure.code, failure.message.c_str());
  } catch (const std::bad_alloc&) {
    return CreateStatus::call(self.api, kRuntimeException, (std::string(self.op->name) + ": out of memory").c_str());
  } catch (...) {
    return CreateStatus::call(self.api, kRuntimeException, (std::string(self.op->name) + ": unknown error").c_str());
  }
}

// The output may reuse the memory of input 2, the base, if no other node reads it.
size_t may_take_base(int** inputs, int** outputs) {
  static int base = 2, output = 0;
  *inputs = &base;
  *outputs = &output;
  return 1;
}

// For the whole process, because shape inference receives none.
const OrtApi* known_api = nullptr;

// The output has the shape of the base; ONNX Runtime must know it to reuse the base's memory. If the context has no shape
// for a value, or a negative number for a size, no shape is set, because it would be wrong for an output.
OrtStatus* infer_base(const OrtCustomOp*, OrtShapeInferContext* context) {
  const OrtApi* api = known_api;
  constexpr size_t rank = 3;
  OrtTensorTypeAndShapeInfo* base = nullptr;
  if (OrtStatus* status = GetInferredInput::call(api, context, 2, &base)) return status;
  size_t dimensions = 0;
  if (OrtStatus* status = GetDimensionsCount::call(api, base, &dimensions)) return status;
  if (dimensions != rank) return nullptr;
  int64_t sizes[rank] = {};
  const char* names[rank] = {};
  if (OrtStatus* status = GetDimensions::call(api, base, sizes, rank)) return status;
  if (OrtStatus* status = GetSymbolicDimensions::call(api, base, names, rank)) return status;
  for (size_t i = 0; i < rank; ++i)
    if (sizes[i] < 0 && !(names[i] && *names[i])) return nullptr;
  return SetInferredOutput::call(api, context, 0, base);
}

}  // namespace

Operator make(const char* name, const char* inputs, const char* outputs, int type, Compute run, bool has_base, bool attends, const char* provider) {
  Operator op{};
  op.version = kCustomOpVersion;
  op.name = name, op.compute = run, op.attends = attends, op.provider = provider;
  const auto type_of = [&](char letter) { return letter == 'I' ? kInt64 : letter == 'B' ? kBool : letter == 'F' ? kFloat : type; };
  for (const char* letter = inputs; *letter; ++letter) op.input_types[op.inputs++] = type_of(*letter);
  for (const char* letter = outputs; *letter; ++letter) op.output_types[op.outputs++] = type_of(*letter);
  op.GetName = [](const OrtCustomOp* self) { return of(self)->name; };
  op.GetExecutionProviderType = [](const OrtCustomOp* self) { return of(self)->provider; };
  op.GetInputType = [](const OrtCustomOp* self, size_t index) { return of(self)->input_types[index]; };
  op.GetInputTypeCount = [](const OrtCustomOp* self) { return size_t(of(self)->inputs); };
  op.GetOutputType = [](const OrtCustomOp* self, size_t index) { return of(self)->output_types[index]; };
  op.GetOutputTypeCount = [](const OrtCustomOp* self) { return size_t(of(self)->outputs); };
  op.GetInputCharacteristic = op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return 0; };  // required
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };                                   // the provider's own
  op.GetVariadicInputMinArity = op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicInputHomogeneity = op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.GetStartVersion = op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  if (has_base) {
    op.InferOutputShapeFn = infer_base;
    op.GetMayInplace = may_take_base;
    op.ReleaseMayInplace = [](int*, int*) {};
  }
  return op;
}

OrtStatus* register_domain(OrtSessionOptions* options, const OrtApiBase* base,
                           OrtStatus* (*add)(const OrtApi*, OrtCustomOpDomain*)) {
  const OrtApi* api = base->GetApi(kApiVersion);
  if (!api) {
    const OrtApi* old = base->GetApi(1);
    const std::string message = std::string("the irc operator library needs ONNX Runtime 1.23 or newer, this is ") + base->GetVersionString();
    return old ? CreateStatus::call(old, kInvalidArgument, message.c_str()) : nullptr;
  }
  static OrtCustomOpDomain* domain = nullptr;
  static OrtStatus* failed = [&]() -> OrtStatus* {
    known_api = api;
    if (OrtStatus* status = CreateCustomOpDomain::call(api, "irc", &domain)) return status;
    return add(api, domain);
  }();
  if (failed) return CreateStatus::call(api, kRuntimeException, GetErrorMessage::call(api, failed));
  return AddCustomOpDomain::call(api, options, domain);
}

}  // namespace irc
