// RoutedGate: silu(x @ gate) * (x @ up), both products in one launch if there are few rows.

#include <cmath>

#include "products.h"

namespace irc {
namespace {

IRC_BOTH inline float silu(float value) { return value / (1 + expf(-value)); }

// Combines the parts of both products, [2, number, count, columns].
template <class T>
struct GateParts {
  static constexpr int phases = 1;
  using Shared = Nothing;
  Tokens tokens;
  const float* parts;
  int64_t number, columns;
  T* y;

  template <int>
  IRC_BOTH void run(int64_t block, int thread, Shared&) const {
    const int64_t place = block * kThreads + thread, all = tokens.count * columns;
    if (place >= all) return;
    float gate = 0, up = 0;
    if (tokens.of(place / columns) >= 0)
      for (int64_t part = 0; part < number; ++part) {
        gate += parts[part * all + place];
        up += parts[(number + part) * all + place];
      }
    store(silu(gate) * up, y + place);
  }
};

// y = silu(y) * up.
template <class T, int Count>
struct Gate {
  static constexpr int phases = 1;
  using Shared = Nothing;
  int64_t packs;
  Pack<T, Count>* y;
  const Pack<T, Count>* up;

  template <int>
  IRC_BOTH void run(int64_t block, int thread, Shared&) const {
    const int64_t place = block * kThreads + thread;
    if (place >= packs) return;
    Pack<T, Count> numbers = y[place];
    const Pack<T, Count> factors = up[place];
    for (int i = 0; i < Count; ++i) store(silu(load(numbers.value[i])) * load(factors.value[i]), &numbers.value[i]);
    y[place] = numbers;
  }
};

template <class T, int Count>
void apply(const Stream& stream, int64_t count, T* y, const T* up) {
  using Numbers = Pack<T, Count>;
  stream.launch(blocks_for(count / Count, kThreads),
                Gate<T, Count>{count / Count, reinterpret_cast<Numbers*>(y), reinterpret_cast<const Numbers*>(up)});
}

}  // namespace

template <class T>
void routed_gate(const Call& call) {
  const auto x = call.input<T>(0, 3), gate = call.input<T>(2, 2), up = call.input<T>(3, 2);
  const auto rows = pairs(call);
  const int64_t count = rows.shape[1], depth = gate.shape[0], columns = gate.shape[1];
  if (x.shape[0] != 1 || x.shape[1] != count || x.shape[2] != depth)
    call.fail("x is " + x.shape.text() + ", expected [1, " + std::to_string(count) + ", " + std::to_string(depth) + "]");
  if (up.shape[0] != depth || up.shape[1] != columns)
    call.fail("gate is " + gate.shape.text() + ", up " + up.shape.text() + ", expected the same");
  T* y = call.output<T>(0, {1, count, columns});
  if (!count || !columns) return;
  const Stream stream(call);
  if (count <= kFewRows) {
    const Tokens tokens{rows.data, count, kUnknown, kUnknown};
    const int64_t number = parts_of(depth);
    const Scratch<float> parts(stream, 2 * number * count * columns);
    multiply_few<T>(stream, tokens, {x.data, false, nullptr, 0}, gate.data, depth, columns, parts.data(), {}, up.data);
    stream.launch(blocks_for(count * columns, kThreads), GateParts<T>{tokens, parts.data(), number, columns, y});
    return;
  }
  constexpr int kPack = int(16 / sizeof(T));
  const Scratch<T> product(stream, count * columns);
  multiply<T>(call, x.data, gate.data, y, count, depth, columns);
  multiply<T>(call, x.data, up.data, product.data(), count, depth, columns);
  if (columns % kPack == 0 && aligned(y) && aligned(product.data())) apply<T, kPack>(stream, count * columns, y, product.data());
  else apply<T, 1>(stream, count * columns, y, product.data());
}

template void routed_gate<float>(const Call&);
template void routed_gate<Half>(const Call&);
template void routed_gate<BFloat>(const Call&);

}  // namespace irc
