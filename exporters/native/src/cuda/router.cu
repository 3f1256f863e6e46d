// Router: relu(x @ w1 + b1) @ w2 + b2 for every token. The second product has one column: one block per token sums it.

#include "../forecast_inputs.h"
#include "products.h"

namespace irc {
namespace {

constexpr int kGroups = kThreads / 16;

template <class T>
struct Score {
  static constexpr int phases = 3;
  struct Shared {
    float own[kThreads], groups[kGroups];
  };
  const T* product;    // x @ w1, [tokens, hidden]; null if it is in parts [number, tokens, hidden]
  const float* parts;
  int64_t number, tokens, hidden;
  const T *b1, *w2, *b2;
  float* y;

  IRC_BOTH float before(int64_t token, int64_t h) const {
    if (product) return load(product[token * hidden + h]);
    float sum = 0;
    for (int64_t part = 0; part < number; ++part) sum += parts[(part * tokens + token) * hidden + h];
    return sum;
  }

  template <int Phase>
  IRC_BOTH void run(int64_t block, int thread, Shared& shared) const {
    if constexpr (Phase == 0) {
      float sum = 0;
      for (int64_t h = thread; h < hidden; h += kThreads) {
        const float value = before(block, h) + load(b1[h]);
        sum += (value < 0 ? 0 : value) * load(w2[h]);  // NaN stays, and executes
      }
      shared.own[thread] = sum;
    } else if constexpr (Phase == 1) {
      if (thread >= kGroups) return;
      float sum = 0;
      for (int i = 0; i < 16; ++i) sum += shared.own[thread * 16 + i];
      shared.groups[thread] = sum;
    } else if (thread == 0) {
      float sum = load(b2[0]);
      for (int i = 0; i < kGroups; ++i) sum += shared.groups[i];
      y[block] = sum;
    }
  }
};

}  // namespace

template <class T>
void router(const Call& call) {
  const RouterInputs<T> in(call);
  const int64_t depth = in.depth, hidden = in.hidden, count = in.count;
  if (!count) return;
  const Stream stream(call);
  const int64_t number = parts_of(depth);
  if (count <= kFewRows) {
    const Scratch<float> parts(stream, number * count * hidden);
    multiply_few<T>(stream, {nullptr, count, 0, 0}, {in.x.data, false, nullptr, 0}, in.w1.data, depth, hidden, parts.data(), {});
    stream.launch(count, Score<T>{nullptr, parts.data(), number, count, hidden, in.b1.data, in.w2.data, in.b2.data, in.y});
    return;
  }
  const Scratch<T> product(stream, count * hidden);
  multiply<T>(call, in.x.data, in.w1.data, product.data(), count, depth, hidden);
  stream.launch(count, Score<T>{product.data(), nullptr, 0, count, hidden, in.b1.data, in.w2.data, in.b2.data, in.y});
}

template void router<float>(const Call&);
template void router<Half>(const Call&);
template void router<BFloat>(const Call&);

}  // namespace irc
