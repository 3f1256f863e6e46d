// Rows on the device: reads them from a call, gathers their tokens and adds to them.
#pragma once

#include "device.h"

namespace irc {

inline bool aligned(const void* memory) { return reinterpret_cast<uintptr_t>(memory) % 16 == 0; }

// Input 1, rows [1, n, 2]: pairs (sequence, token), which the host does not read.
Input<int64_t> pairs(const Call& call);

// The first of `count` rows, in order, whose sequence is `sequence` or a later one; rows (-1, -1) come last.
IRC_BOTH inline int64_t first_of(const int64_t* rows, int64_t count, int64_t sequence) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (rows[2 * middle] >= 0 && rows[2 * middle] < sequence) low = middle + 1;
    else high = middle;
  }
  return low;
}

// y [n, width] = the rows of x, whose shape is [batch, tokens, width]; zeros for a row outside of it.
template <class T>
void gather_rows(const Call& call, const Input<int64_t>& rows, const Shape& shape, const T* x, T* y);

// Adds y [n, width] + bias [width] to the rows of z, whose shape is [batch, tokens, width].
template <class T>
void add_rows(const Call& call, const Input<int64_t>& rows, const Shape& shape, const T* y, const T* bias, T* z);

}  // namespace irc
