// Products of many rows, by the cuBLAS that ONNX Runtime has loaded.
#pragma once

#include "device.h"

namespace irc {

// y [rows, columns] = x [rows, depth] @ w [depth, columns]; sums are float32.
template <class T>
void multiply(const Call& call, const T* x, const T* w, T* y, int64_t rows, int64_t depth, int64_t columns);

}  // namespace irc
