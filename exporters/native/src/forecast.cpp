// Router and ForecastAdd: two small products each, in one node instead of five or six per decoding step.
//
// All sums are float32. With few rows, threads share the depth, so that each reads its weights in sequence; with many
// rows, they share the rows, and ONNX Runtime's own products are about as fast.

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "forecast_inputs.h"
#include "math.h"

namespace irc {
namespace {

constexpr int64_t kFewRows = 4;           // with at most this many, threads share the depth, not the rows
constexpr int64_t kFewNumbers = 1 << 14;  // of weights: fewer are not worth another thread
constexpr int64_t kMostParts = 16;
constexpr int64_t kBlockNumbers = 1 << 12, kLeastBlock = 16;  // of weights, and of rows: what stays in the processor's cache while all rows are multiplied
constexpr int64_t kLeastPart = 36, kMostPart = 192, kWholeTiles = 12;  // rows per task, and what they are a multiple of
constexpr int64_t kStrip = 256;           // columns of a forecast per step
constexpr int64_t kPanel = kPanelDepth * kMostColumns;

// Floats needed for a row that is not float32 already.
template <class T>
int64_t copy_of(int64_t depth) { return std::is_same<T, float>::value ? 0 : depth; }

// In how many parts of its depth w [depth, columns] is read: independent of the number of threads, for equal sums.
inline int64_t parts_of(int64_t depth, int64_t columns) {
  int64_t parts = 1;
  while (2 * parts <= kMostParts && 2 * parts * kFewNumbers <= depth * columns) parts *= 2;
  return parts;
}

// Floats that `few_products` needs for `count` rows.
inline int64_t sums_of(int64_t count, int64_t depth, int64_t columns) { return parts_of(depth, columns) * count * columns; }

// Returns rows @ w [depth, columns] of few rows, [count, columns], at the front of `sums`. One thread reads each part of w once,
// in the order of memory: reading is what limits such a product.
template <class T>
float* few_products(const Call& call, const float* const* rows, int64_t count, int64_t depth, const T* w, int64_t columns, float* sums) {
  const int64_t parts = parts_of(depth, columns), share = (depth + parts - 1) / parts, all = count * columns;
  const int64_t block = std::max(kLeastBlock, kBlockNumbers / std::max<int64_t>(1, columns));
  call.parallel(parts, [&](int64_t part) {
    float* to = sums + part * all;
    std::fill_n(to, all, 0.0f);
    const int64_t end = std::min(depth, (part + 1) * share);
    for (int64_t first = part * share; first < end; first += block)
      for (int64_t i = 0; i < count; ++i)
        math<T>().add_row(rows[i] + first, std::min(block, end - first), w + first * columns, columns, columns, to + i * columns);
  });
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t j = 0; j < all; ++j) sums[j] += sums[part * all + j];
  return sums;
}

// Calls work(first, count, rows, panel, made) for parts of the rows, in parallel; `made` has `each` floats for a row.
template <class T, class RowOf, class Work>
void for_parts(const Call& call, int64_t count, int64_t depth, int64_t each, const RowOf& row_of, const Work& work) {
  // The same number of parts for each thread, of nearly equal size, in whole tiles of a product.
  const int64_t share = (count + thread_count() - 1) / thread_count(), turns = (share + kMostPart - 1) / kMostPart;
  const int64_t even = std::max(kLeastPart, (share + turns - 1) / turns);
  const int64_t part = std::min(count, (even + kWholeTiles - 1) / kWholeTiles * kWholeTiles);
  const int64_t parts = (count + part - 1) / part, copied = copy_of<T>(depth), floats = kPanel + part * (copied + each);
  float* memory = scratch(parts * floats);
  call.parallel(parts, [&](int64_t index) {
    const int64_t first = index * part, here = std::min(part, count - first);
    float *panel = memory + index * floats, *copies = panel + kPanel;
    const float* rows[kMostPart] = {};
    for (int64_t i = 0; i < here; ++i) rows[i] = as_floats(row_of(first + i), depth, copies + i * copied);
    work(first, here, rows, panel, copies + part * copied);
  });
}

}  // namespace

template <class T>
void router(const Call& call) {
  const RouterInputs<T> in(call);
  const int64_t depth = in.depth, hidden = in.hidden, all = in.count;
  const auto row_of = [&](int64_t row) { return in.x.data + row * depth; };
  const auto score = [&](int64_t first, int64_t count, const float* made) {
    for (int64_t i = 0; i < count; ++i) {
      float sum = load(in.b2.data[0]);
      for (int64_t j = 0; j < hidden; ++j) {
        const float value = made[i * hidden + j] + load(in.b1.data[j]);
        sum += (value < 0 ? 0.0f : value) * load(in.w2.data[j]);  // NaN stays NaN
      }
      in.y[first + i] = sum;
    }
  };
  if (all <= kFewRows) {
    const int64_t sums = sums_of(all, depth, hidden);
    float *memory = scratch(sums + all * copy_of<T>(depth)), *copies = memory + sums;
    const float* rows[kFewRows] = {};
    for (int64_t i = 0; i < all; ++i) rows[i] = as_floats(row_of(i), depth, copies + i * copy_of<T>(depth));
    score(0, all, few_products(call, rows, all, depth, in.w1.data, hidden, memory));
    return;
  }
  for_parts<T>(call, all, depth, hidden, row_of,
               [&](int64_t first, int64_t count, const float* const* rows, float* panel, float* made) {
    math<T>().multiply(rows, count, depth, in.w1.data, hidden, false, hidden, made, hidden, false, panel);
    score(first, count, made);
  });
}

template <class T>
void forecast_add(const Call& call) {
  const ForecastInputs<T> in(call);
  const int64_t tokens = in.tokens, depth = in.depth, rank = in.rank, columns = in.columns;
  const Rows rows = rows_of(call, 1, in.batch, tokens);
  if (in.z != in.base.data) std::memcpy(in.z, in.base.data, size_t(in.base.shape.count()) * sizeof(T));
  const auto token_of = [&](int64_t row) { return rows.sequence(row) * tokens + rows.token(row); };
  const auto row_of = [&](int64_t row) { return in.x.data + token_of(row) * depth; };
  // Adds columns first ... first + width - 1 of a row's forecast.
  const auto add = [&](int64_t row, int64_t first, int64_t width, const float* forecast) {
    T* to = in.z + token_of(row) * columns + first;
    for (int64_t j = 0; j < width; ++j) store(load(to[j]) + (forecast[j] + load(in.bias.data[first + j])), to + j);
  };
  if (rows.count <= kFewRows) {
    const int64_t count = rows.count, copied = copy_of<T>(depth);
    if (!count) return;
    const int64_t down = sums_of(count, depth, rank), up = sums_of(count, rank, columns);
    float *memory = scratch(down + up + count * copied), *copies = memory + down + up;
    const float *given[kFewRows] = {}, *middle[kFewRows] = {};
    for (int64_t i = 0; i < count; ++i) given[i] = as_floats(row_of(i), depth, copies + i * copied);
    const float* narrow = few_products(call, given, count, depth, in.down.data, rank, memory);
    for (int64_t i = 0; i < count; ++i) middle[i] = narrow + i * rank;
    const float* forecast = few_products(call, middle, count, rank, in.up.data, columns, memory + down);
    for (int64_t i = 0; i < count; ++i) add(i, 0, columns, forecast + i * columns);
    return;
  }
  for_parts<T>(call, rows.count, depth, rank + kStrip, row_of,
               [&](int64_t first, int64_t count, const float* const* given, float* panel, float* narrow) {
    float* forecast = narrow + count * rank;
    const float* middle[kMostPart] = {};
    for (int64_t i = 0; i < count; ++i) middle[i] = narrow + i * rank;
    math<T>().multiply(given, count, depth, in.down.data, rank, false, rank, narrow, rank, false, panel);
    for (int64_t strip = 0; strip < columns; strip += kStrip) {
      const int64_t width = std::min(kStrip, columns - strip);
      math<T>().multiply(middle, count, rank, in.up.data + strip, columns, false, width, forecast, kStrip, false, panel);
      for (int64_t i = 0; i < count; ++i) add(first + i, strip, width, forecast + i * kStrip);
    }
  });
}

template void router<float>(const Call&);
template void router<Half>(const Call&);
template void router<BFloat>(const Call&);
template void forecast_add<float>(const Call&);
template void forecast_add<Half>(const Call&);
template void forecast_add<BFloat>(const Call&);

}  // namespace irc
