// Checked inputs of Router and ForecastAdd, and their outputs: the same on the CPU and on CUDA.
#pragma once

#include <string>

#include "kernel.h"

namespace irc {

template <class T>
struct RouterInputs {
  Input<T> x, w1, b1, w2, b2;
  int64_t depth, hidden, count;  // count: tokens of all sequences
  float* y;

  explicit RouterInputs(const Call& call)
      : x(call.input<T>(0, 3)), w1(call.input<T>(1, 2)), b1(call.input<T>(2, 1)), w2(call.input<T>(3, 2)),
        b2(call.input<T>(4, 1)), depth(x.shape[2]), hidden(w1.shape[1]), count(x.shape[0] * x.shape[1]) {
    if (w1.shape[0] != depth || b1.shape[0] != hidden || w2.shape[0] != hidden || w2.shape[1] != 1 || b2.shape[0] != 1)
      call.fail("w1 is " + w1.shape.text() + ", b1 " + b1.shape.text() + ", w2 " + w2.shape.text() + ", b2 " + b2.shape.text() +
                ", expected [" + std::to_string(depth) + ", hidden], [hidden], [hidden, 1], [1]");
    y = call.output<float>(0, {x.shape[0], x.shape[1]});
  }
};

// z may be base itself; otherwise the caller copies base into it.
template <class T>
struct ForecastInputs {
  Input<T> x, base, down, up, bias;
  int64_t batch, tokens, depth, rank, columns;
  T* z;

  explicit ForecastInputs(const Call& call)
      : x(call.input<T>(0, 3)), base(call.input<T>(2, 3)), down(call.input<T>(3, 2)), up(call.input<T>(4, 2)),
        bias(call.input<T>(5, 1)), batch(x.shape[0]), tokens(x.shape[1]), depth(x.shape[2]), rank(down.shape[1]),
        columns(base.shape[2]) {
    if (base.shape[0] != batch || base.shape[1] != tokens)
      call.fail("x is " + x.shape.text() + ", and base " + base.shape.text() + " has other tokens");
    if (down.shape[0] != depth || up.shape[0] != rank || up.shape[1] != columns || bias.shape[0] != columns)
      call.fail("down is " + down.shape.text() + ", up " + up.shape.text() + ", bias " + bias.shape.text() + ", expected [" +
                std::to_string(depth) + ", rank], [rank, " + std::to_string(columns) + "], [" + std::to_string(columns) + "]");
    z = call.output<T>(0, {batch, tokens, columns});
  }
};

}  // namespace irc
