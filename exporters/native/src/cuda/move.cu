// Compact, Scatter, ScatterAdd: rows are gathered, replaced and added to, sixteen bytes a thread where they are aligned.
//
// Rows are not looked at by the host, which would wait for the device: one that lies outside of its tensor is left out,
// and gathered as zeros. Whoever makes them with SelectRows has none.

#include "device.h"

namespace irc {
namespace {

// `Count` numbers that are read and written at once.
template <class T, int Count>
struct alignas(Count * sizeof(T)) Pack {
  T value[Count];
};

enum class Way { kGather, kReplace, kAdd };

// Block: a part of a row. `whole` is [batch, tokens, packs], `part` [count, packs].
template <class T, int Count, Way way>
struct MoveRows {
  static constexpr int phases = 1;
  using Shared = Nothing;
  using Numbers = Pack<T, Count>;
  const int64_t* rows;
  int64_t batch, tokens, packs, parts;  // parts of a row
  const Numbers* from;
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
        const Numbers added = from[part];
        for (int i = 0; i < Count; ++i) store(load(sum.value[i]) + load(added.value[i]), &sum.value[i]);
        to[whole] = sum;
      }
    }
  }
};

template <Way way, class T, int Count>
void launch(const Stream& stream, const Input<int64_t>& rows, int64_t batch, int64_t tokens, int64_t width, const T* from, T* to) {
  const int64_t packs = width / Count, parts = blocks_for(packs, kThreads);
  using Numbers = Pack<T, Count>;
  stream.launch(rows.shape[1] * parts,
                MoveRows<T, Count, way>{rows.data, batch, tokens, packs, parts, reinterpret_cast<const Numbers*>(from),
                                        reinterpret_cast<Numbers*>(to)});
}

template <Way way, class T>
void move(const Call& call, const Input<int64_t>& rows, int64_t batch, int64_t tokens, int64_t width, const T* from, T* to) {
  constexpr int kPack = int(16 / sizeof(T));
  const Stream stream(call);
  const bool aligned = (reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) % 16 == 0;
  if (aligned && width % kPack == 0) launch<way, T, kPack>(stream, rows, batch, tokens, width, from, to);
  else launch<way, T, 1>(stream, rows, batch, tokens, width, from, to);
}

Input<int64_t> pairs(const Call& call) {
  const auto rows = call.input<int64_t>(1, 3);
  if (rows.shape[0] != 1 || rows.shape[2] != 2) call.fail("rows are " + rows.shape.text() + ", expected [1, n, 2]");
  return rows;
}

// What Scatter and ScatterAdd share: y's rows go to their places in a copy of base, which may be base itself.
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

template <class T>
void compact(const Call& call) {
  const auto x = call.input<T>(0, 3);
  const auto rows = pairs(call);
  T* y = call.output<T>(0, {1, rows.shape[1], x.shape[2]});
  move<Way::kGather>(call, rows, x.shape[0], x.shape[1], x.shape[2], x.data, y);
}

template <class T>
void scatter(const Call& call) { put_rows<Way::kReplace, T>(call); }

template <class T>
void scatter_add(const Call& call) { put_rows<Way::kAdd, T>(call); }

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
