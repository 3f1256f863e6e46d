// The arithmetic of the kernels: one table of functions per type of weights, compiled once per instruction set.
#pragma once

#include <cstdint>

#include "numbers.h"

namespace irc {

constexpr int64_t kMostColumns = 64;  // of a packed panel, for every instruction set

// Functions on weights of type W; everything else is float32. No function allocates or throws.
template <class W>
struct Math {
  // c[i][j] = (add ? c[i][j] : 0) + sum over k of a[i][k] * b[k][j]; b is [depth, columns] with rows `stride` apart,
  // or, turned, [columns, depth]. `panel` holds kPanelDepth * kMostColumns floats.
  void (*multiply)(const float* const* a, int64_t rows, int64_t depth, const W* b, int64_t stride, bool turned,
                   int64_t columns, float* c, int64_t c_stride, bool add, float* panel);
  // y[j] += sum over k of x[k] * w[k][j]: one row, weights read once and in order.
  void (*add_row)(const float* x, int64_t depth, const W* w, int64_t stride, int64_t columns, float* y);
  // scores[t] = sum over k of q[k] * keys[t][k].
  void (*dots)(const float* q, int64_t size, const W* keys, int64_t count, float* scores);
  // to[i] = from[i] as float32.
  void (*widen)(const W* from, int64_t count, float* to);
  // to[i] = from[i], rounded.
  void (*narrow)(const float* from, int64_t count, W* to);
};

constexpr int64_t kPanelDepth = 256;  // rows of a packed panel

// Softmax in parts: scores become exp(scores * scale + mask - largest), and their sum is returned. `largest` is the
// largest score of earlier parts on entry, and of all parts on return.
using SoftmaxPart = float (*)(float* scores, const float* mask, float scale, int64_t count, float* largest);

struct InstructionSet {
  const char* name;
  Math<float> single;
  Math<Half> half;
  Math<BFloat> bfloat;
  SoftmaxPart softmax_part;
};

extern const InstructionSet kBaseline;
#if defined(__x86_64__)
extern const InstructionSet kAvx2, kAvx512;
#endif

// The best table for this processor.
const InstructionSet& instruction_set();

template <class W>
const Math<W>& math();
template <>
inline const Math<float>& math<float>() { return instruction_set().single; }
template <>
inline const Math<Half>& math<Half>() { return instruction_set().half; }
template <>
inline const Math<BFloat>& math<BFloat>() { return instruction_set().bfloat; }

// The row as float32: the row itself, or a copy in `memory`.
inline const float* as_floats(const float* row, int64_t, float*) { return row; }
template <class T>
const float* as_floats(const T* row, int64_t depth, float* memory) {
  math<T>().widen(row, depth, memory);
  return memory;
}

}  // namespace irc
