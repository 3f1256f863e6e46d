// Turns kernels into operators of ONNX Runtime, and a library's operators into a domain.
#pragma once

#include "kernel.h"

namespace irc {

using Compute = void (*)(const Call&, const Attributes&);

constexpr int kMostInputs = 7, kMostOutputs = 3;

// One operator for one type, which `T` in `inputs` and `outputs` denotes.
struct Operator : OrtCustomOp {
  const char *name, *provider;
  int inputs, input_types[kMostInputs], outputs, output_types[kMostOutputs];
  Compute compute;
  bool attends;
};

template <void (*Function)(const Call&)>
void plain(const Call& call, const Attributes&) { Function(call); }

// `inputs` and `outputs` have a letter for each: T the type, I int64, B bool, F float32.
Operator make(const char* name, const char* inputs, const char* outputs, int type, Compute run, bool has_base, bool attends,
              const char* provider = "CPUExecutionProvider");

// Adds a domain to a session; `add` fills it with the library's operators once per process: sessions keep pointers.
OrtStatus* register_domain(OrtSessionOptions* options, const OrtApiBase* base,
                           OrtStatus* (*add)(const OrtApi*, OrtCustomOpDomain*));

}  // namespace irc
