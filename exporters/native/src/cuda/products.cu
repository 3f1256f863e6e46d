// RoutedMatMul and ForecastAdd: products of rows, some of which may be padding.
//
// With few rows, reading w is the bottleneck. Each block sums a part of the columns and of the depth for all rows at once,
// and returns at once if all rows are padding; a second launch adds the parts, in order. Many rows go to cuBLAS. The
// launches depend on shapes alone, and nothing waits for the device.

#include "../forecast_inputs.h"
#include "products.h"

namespace irc {
namespace {

// At most `Rows` rows. A thread reads `Count` columns at once, and sums every kSlices-th row of the part of w.
template <class T, int Rows, int Count>
struct Product {
  static constexpr int phases = 3;
  static constexpr int kBytes = Count * int(sizeof(T));
  static constexpr int kLanes = kBytes == 16 ? 8 : kBytes == 8 ? 16 : 32, kSlices = kThreads / kLanes, kColumns = kLanes * Count;
  static constexpr int kAhead = kBytes == 16 ? 4 : 8;  // loads of w in flight per thread
  struct Shared {
    Pack<float, Rows> x[kDepth];
    Pack<float, Count> sums[kSlices][Rows][kLanes];
  };
  static_assert(sizeof(Shared) <= 48 * 1024, "the memory of a block");
  Tokens tokens;
  Source<T> source;
  const Pack<T, Count>*w, *other;  // `other`: a matrix of the same shape whose parts follow, or null
  int64_t depth, columns, tiles;
  float* parts;  // [parts, count, columns]; null if there is only one, which goes to the target
  Target<T> target;

  template <int Phase>
  IRC_BOTH void run(int64_t block, int thread, Shared& shared) const {
    const int64_t number = parts_of(depth), tile = block % tiles, part = block / tiles;
    const int64_t start = (part < number ? part : part - number) * kDepth;
    const int here = int(depth - start < kDepth ? depth - start : kDepth);
    const bool any = tokens.any<Rows>();
    if constexpr (Phase == 0) {
      if (any) stage(start, here, thread, shared);
    } else if constexpr (Phase == 1) {
      if (any) sum_slice(part < number ? w : other, tile, start, here, thread, shared);
    } else if (any || !parts) {
      add_slices(tile, part, any, thread, shared);
    }
  }

 private:
  IRC_BOTH void stage(int64_t start, int here, int thread, Shared& shared) const {
    int64_t token[Rows];
    for (int row = 0; row < Rows; ++row) token[row] = tokens.of(row);
    for (int k = thread; k < here; k += kThreads) shared.x[k] = source.column(tokens, token, start + k, depth);
  }

  IRC_BOTH void sum_slice(const Pack<T, Count>* matrix, int64_t tile, int64_t start, int here, int thread,
                          Shared& shared) const {
    const int lane = thread % kLanes, slice = thread / kLanes;
    const int64_t packs = columns / Count, pack = tile * kLanes + lane;
    const Pack<T, Count>* from = matrix + start * packs + pack;
    Pack<float, Count> sums[Rows] = {};
    const auto add = [&](const Pack<T, Count>& numbers, int k) {
      const Pack<float, Rows> x = shared.x[k];
      for (int column = 0; column < Count; ++column) {
        const float number = load(numbers.value[column]);
        for (int row = 0; row < Rows; ++row) sums[row].value[column] += x.value[row] * number;
      }
    };
    int k = slice;
    if (pack >= packs) k = here;
    for (; k + (kAhead - 1) * kSlices < here; k += kAhead * kSlices) {
      Pack<T, Count> numbers[kAhead];
      for (int i = 0; i < kAhead; ++i) numbers[i] = from[(k + i * kSlices) * packs];
      for (int i = 0; i < kAhead; ++i) add(numbers[i], k + i * kSlices);
    }
    for (; k < here; k += kSlices) add(from[k * packs], k);
    for (int row = 0; row < Rows; ++row) shared.sums[slice][row][lane] = sums[row];
  }

  IRC_BOTH void add_slices(int64_t tile, int64_t part, bool any, int thread, const Shared& shared) const {
    for (int place = thread; place < Rows * kColumns; place += kThreads) {
      const int row = place / kColumns, own = place % kColumns;
      const int64_t column = tile * kColumns + own;
      if (row >= tokens.count || column >= columns) continue;
      float sum = 0;
      if (any)
        for (int slice = 0; slice < kSlices; ++slice) sum += shared.sums[slice][row][own / Count].value[own % Count];
      if (parts) parts[(part * tokens.count + row) * columns + column] = sum;
      else target.put(row, tokens.of(row), column, columns, sum);
    }
  }
};

template <class T>
struct AddParts {
  static constexpr int phases = 1;
  using Shared = Nothing;
  Tokens tokens;
  const float* parts;
  int64_t number, columns;
  Target<T> target;

  template <int>
  IRC_BOTH void run(int64_t block, int thread, Shared&) const {
    const int64_t place = block * kThreads + thread, all = tokens.count * columns;
    if (place >= all) return;
    const int64_t row = place / columns, token = tokens.of(row);
    float sum = 0;
    if (token >= 0)
      for (int64_t part = 0; part < number; ++part) sum += parts[part * all + place];
    target.put(row, token, place % columns, columns, sum);
  }
};

template <class T, int Rows, int Count>
void launch(const Stream& stream, const Tokens& tokens, const Source<T>& source, const T* w, int64_t depth, int64_t columns,
            float* parts, const Target<T>& target, const T* other) {
  using Kernel = Product<T, Rows, Count>;
  const int64_t tiles = blocks_for(columns, Kernel::kColumns);
  const auto packs = [](const T* numbers) { return reinterpret_cast<const Pack<T, Count>*>(numbers); };
  stream.launch(tiles * parts_of(depth) * (other ? 2 : 1),
                Kernel{tokens, source, packs(w), packs(other), depth, columns, tiles, parts, target});
}

}  // namespace

template <class T>
void multiply_few(const Stream& stream, const Tokens& tokens, const Source<T>& source, const T* w, int64_t depth,
                  int64_t columns, float* parts, const Target<T>& target, const T* other) {
  constexpr int kWide = int(16 / sizeof(T));
  const auto with = [&](auto run) { run(stream, tokens, source, w, depth, columns, parts, target, other); };
  const bool fits = aligned(w) && aligned(other), wide = fits && columns % kWide == 0, narrow = fits && columns % 4 == 0;
  if (tokens.count <= 1 && wide) with(launch<T, 1, kWide>);
  else if (tokens.count <= 1 && narrow) with(launch<T, 1, 4>);
  else if (tokens.count <= 4 && wide) with(launch<T, 4, kWide>);
  else if (tokens.count <= 4 && narrow) with(launch<T, 4, 4>);
  else if (narrow) with(launch<T, kFewRows, 4>);
  else with(launch<T, kFewRows, 1>);
}

template <class T>
void multiply_few(const Stream& stream, const Tokens& tokens, const Source<T>& source, const T* w, int64_t depth,
                  int64_t columns, const Target<T>& target) {
  const int64_t number = parts_of(depth);
  if (number == 1) return multiply_few<T>(stream, tokens, source, w, depth, columns, nullptr, target, nullptr);
  const Scratch<float> parts(stream, number * tokens.count * columns);
  multiply_few<T>(stream, tokens, source, w, depth, columns, parts.data(), target, nullptr);
  stream.launch(blocks_for(tokens.count * columns, kThreads), AddParts<T>{tokens, parts.data(), number, columns, target});
}

template <class T>
void routed_matmul(const Call& call) {
  const auto x = call.input<T>(0, 3), w = call.input<T>(2, 2);
  const auto rows = pairs(call);
  const int64_t count = rows.shape[1], depth = w.shape[0], columns = w.shape[1];
  if (x.shape[0] != 1 || x.shape[1] != count || x.shape[2] != depth)
    call.fail("x is " + x.shape.text() + ", expected [1, " + std::to_string(count) + ", " + std::to_string(depth) + "]");
  T* y = call.output<T>(0, {1, count, columns});
  if (!count || !columns) return;
  if (count > kFewRows) return multiply(call, x.data, w.data, y, count, depth, columns);
  multiply_few<T>(Stream(call), {rows.data, count, kUnknown, kUnknown}, {x.data, false, nullptr, 0}, w.data, depth, columns,
                  {y, nullptr});
}

template <class T>
void forecast_add(const Call& call) {
  const auto rows = pairs(call);
  const ForecastInputs<T> in(call);
  const int64_t count = rows.shape[1], depth = in.depth, rank = in.rank, columns = in.columns;
  const Stream stream(call);
  if (in.z != in.base.data) stream.copy(in.z, in.base.data, in.base.shape.count() * int64_t(sizeof(T)));
  if (!count) return;
  if (count <= kFewRows) {
    const Tokens tokens{rows.data, count, in.x.shape[0], in.x.shape[1]};
    const int64_t number = parts_of(depth);
    const Scratch<float> hidden(stream, number * count * rank);
    multiply_few<T>(stream, tokens, {in.x.data, true, nullptr, 0}, in.down.data, depth, rank, hidden.data(), {});
    multiply_few<T>(stream, tokens, {nullptr, false, hidden.data(), number}, in.up.data, rank, columns, {in.z, in.bias.data});
    return;
  }
  const Scratch<T> picked(stream, count * depth), hidden(stream, count * rank), forecast(stream, count * columns);
  gather_rows(call, rows, in.x.shape, in.x.data, picked.data());
  multiply<T>(call, picked.data(), in.down.data, hidden.data(), count, depth, rank);
  multiply<T>(call, hidden.data(), in.up.data, forecast.data(), count, rank, columns);
  add_rows<T>(call, rows, in.base.shape, forecast.data(), in.bias.data, in.z);
}

template void multiply_few(const Stream&, const Tokens&, const Source<float>&, const float*, int64_t, int64_t, float*, const Target<float>&, const float*);
template void multiply_few(const Stream&, const Tokens&, const Source<Half>&, const Half*, int64_t, int64_t, float*, const Target<Half>&, const Half*);
template void multiply_few(const Stream&, const Tokens&, const Source<BFloat>&, const BFloat*, int64_t, int64_t, float*, const Target<BFloat>&, const BFloat*);
template void routed_matmul<float>(const Call&);
template void routed_matmul<Half>(const Call&);
template void routed_matmul<BFloat>(const Call&);
template void forecast_add<float>(const Call&);
template void forecast_add<Half>(const Call&);
template void forecast_add<BFloat>(const Call&);

}  // namespace irc
