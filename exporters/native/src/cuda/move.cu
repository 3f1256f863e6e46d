// Compact, Scatter, ScatterAdd: gather rows, replace them, add to them; sixteen bytes per thread if they are aligned.
//
// The host does not read rows, because it would wait for the device: a row outside of its tensor is skipped, and gathered
// as zeros. SelectRows makes no such rows but padding.

#include "move.h"

namespace irc {
namespace {

enum class Way { kGather, kReplace, kAdd };

// One block per part of a row. `whole` is [batch, tokens, packs], `part` [count, packs].
template <class T, int Count, Way way>
struct MoveRows {
  static constexpr int phases = 1;
  using Shared = Nothing;
  using Numbers = Pack<T, Count>;
  const int64_t* rows;
  int64_t batch, tokens, packs, parts;  // parts of a row
  const Numbers *from, *bias;  // null for no bias
  Numbers* to;

  template <int>
  IRC_BOTH void run(int64_t block, int thread, Shared&) const {
    const int64_t row = block / parts, pack = block % parts * kThreads + thread;
    if (pack >= packs) return;
    const int64_t sequence = rows[2 * row], token = rows[2 * row + 1];
    const bool inside = sequence >= 0 && sequence < batch && token >= 0 && token < tokens;
    const int64_t whole = (sequence * tokens + token) * packs + pack, part = row * packs + pack;
    if constexpr (way == Way::kGather) {
      to[part] = inside ? from[whole] : Numbers{};
    } else if (inside) {
      if constexpr (way == Way::kReplace) {
        to[whole] = from[part];
      } else {
        Numbers sum = to[whole];
        const Numbers added = from[part], too = bias ? bias[pack] : Numbers{};
        for (int i = 0; i < Count; ++i) {
          const float number = bias ? load(added.value[i]) + load(too.value[i]) : load(added.value[i]);
          store(load(sum.value[i]) + number, &sum.value[i]);
        }
        to[whole] = sum;
      }
    }
  }
};

template <Way way, class T, int Count>
void launch(const Stream& stream, const Input<int64_t>& rows, int64_t batch, int64_t tokens, int64_t width, const T* from,
            const T* bias, T* to) {
  const int64_t packs = width / Count, parts = blocks_for(packs, kThreads);
  using Numbers = Pack<T, Count>;
  stream.launch(rows.shape[1] * parts,
                MoveRows<T, Count, way>{rows.data, batch, tokens, packs, parts, reinterpret_cast<const Numbers*>(from),
                                        reinterpret_cast<const Numbers*>(bias), reinterpret_cast<Numbers*>(to)});
}

template <Way way, class T>
void move(const Call& call, const Input<int64_t>& rows, int64_t batch, int64_t tokens, int64_t width, const T* from, T* to,
          const T* bias = nullptr) {
  constexpr int kPack = int(16 / sizeof(T));
  const Stream stream(call);
  if (width % kPack == 0 && aligned(from) && aligned(to) && aligned(bias))
    launch<way, T, kPack>(stream, rows, batch, tokens, width, from, bias, to);
  else launch<way, T, 1>(stream, rows, batch, tokens, width, from, bias, to);
}

// Shared by Scatter and ScatterAdd: y's rows go to their places in a copy of base, which may be base itself.
template <Way way, class T>
void put_rows(const Call& call) {
  const auto y = call.input<T>(0, 3), base = call.input<T>(2, 3);
  const auto rows = pairs(call);
  const int64_t batch = base.shape[0], tokens = base.shape[1], width = base.shape[2];
  if (y.shape[0] != 1 || y.shape[1] != rows.shape[1] || y.shape[2] != width)
    call.fail("y is " + y.shape.text() + ", expected [1, " + std::to_string(rows.shape[1]) + ", " + std::to_string(width) + "]");
  T* z = call.output<T>(0, {batch, tokens, width});
  if (z != base.data) Stream(call).copy(z, base.data, base.shape.count() * int64_t(sizeof(T)));
  move<way>(call, rows, batch, tokens, width, y.data, z);
}

}  // namespace

Input<int64_t> pairs(const Call& call) {
  const auto rows = call.input<int64_t>(1, 3);
  if (rows.shape[0] != 1 || rows.shape[2] != 2) call.fail("rows are " + rows.shape.text() + ", expected [1, n, 2]");
  return rows;
}

template <class T>
void gather_rows(const Call& call, const Input<int64_t>& rows, const Shape& shape, const T* x, T* y) {
  move<Way::kGather>(call, rows, shape[0], shape[1], shape[2], x, y);
}

template <class T>
void add_rows(const Call& call, const Input<int64_t>& rows, const Shape& shape, const T* y, const T* bias, T* z) {
  move<Way::kAdd>(call, rows, shape[0], shape[1], shape[2], y, z, bias);
}

template <class T>
void compact(const Call& call) {
  const auto x = call.input<T>(0, 3);
  const auto rows = pairs(call);
  T* y = call.output<T>(0, {1, rows.shape[1], x.shape[2]});
  gather_rows(call, rows, x.shape, x.data, y);
}

template <class T>
void scatter(const Call& call) { put_rows<Way::kReplace, T>(call); }

template <class T>
void scatter_add(const Call& call) { put_rows<Way::kAdd, T>(call); }

template void gather_rows(const Call&, const Input<int64_t>&, const Shape&, const float*, float*);
template void gather_rows(const Call&, const Input<int64_t>&, const Shape&, const Half*, Half*);
template void gather_rows(const Call&, const Input<int64_t>&, const Shape&, const BFloat*, BFloat*);
template void add_rows(const Call&, const Input<int64_t>&, const Shape&, const float*, const float*, float*);
template void add_rows(const Call&, const Input<int64_t>&, const Shape&, const Half*, const Half*, Half*);
template void add_rows(const Call&, const Input<int64_t>&, const Shape&, const BFloat*, const BFloat*, BFloat*);
template void compact<float>(const Call&);
template void compact<Half>(const Call&);
template void compact<BFloat>(const Call&);
template void scatter<float>(const Call&);
template void scatter<Half>(const Call&);
template void scatter<BFloat>(const Call&);
template void scatter_add<float>(const Call&);
template void scatter_add<Half>(const Call&);
template void scatter_add<BFloat>(const Call&);

}  // namespace irc
