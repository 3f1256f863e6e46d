// Router and ForecastAdd: two small products each, which a step of decoding gets in one node in place of five or six.
//
// Sums are of float32 throughout. With few rows a weight is read once and in order; with many, ONNX Runtime's own
// products would be some per cent faster, which is little beside the unit that they stand for.

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "kernel.h"
#include "math.h"

namespace irc {
namespace {

constexpr int64_t kPart = 192;     // rows of a task
constexpr int64_t kFewRows = 4;    // up to here weights are read in place of being packed
constexpr int64_t kPanel = kPanelDepth * kMostColumns;

std::string one_of(int64_t a, int64_t b) { return "[" + std::to_string(a) + ", " + std::to_string(b) + "]"; }

// Floats that a task needs: a panel, its rows where they are no floats, and what it makes of each.
template <class T>
int64_t memory_of(int64_t part, int64_t depth, int64_t made) {
  return kPanel + part * (made + (std::is_same<T, float>::value ? 0 : depth));
}

// y [count, columns] = rows @ w [depth, columns].
template <class T>
void product(const float* const* rows, int64_t count, int64_t depth, const T* w, int64_t columns, float* y, float* panel) {
  if (count > kFewRows) {
    math<T>().multiply(rows, count, depth, w, columns, false, columns, y, columns, false, panel);
    return;
  }
  std::fill_n(y, count * columns, 0.0f);
  for (int64_t i = 0; i < count; ++i) math<T>().add_row(rows[i], depth, w, columns, columns, y + i * columns);
}

// The row as float32: itself, or a copy in `memory`.
inline const float* as_floats(const float* row, int64_t, float*) { return row; }
template <class T>
const float* as_floats(const T* row, int64_t depth, float* memory) {
  math<T>().widen(row, depth, memory);
  return memory;
}

// Calls work(first, count, rows, free) for parts of the rows, in parallel; `free` is the rest of the part's memory.
template <class T, class RowOf, class Work>
void for_parts(const Call& call, int64_t count, int64_t depth, int64_t made, const RowOf& row_of, const Work& work) {
  const int64_t part = std::min(kPart, (count + thread_count() - 1) / thread_count());
  if (!part) return;
  const int64_t parts = (count + part - 1) / part, floats = memory_of<T>(part, depth, made);
  float* memory = scratch(parts * floats);
  call.parallel(parts, [&](int64_t index) {
    const int64_t first = index * part, here = std::min(part, count - first);
    float* own = memory + index * floats;
    const float* rows[kPart] = {};
    for (int64_t i = 0; i < here; ++i) rows[i] = as_floats(row_of(first + i), depth, own + kPanel + i * depth);
    work(first, here, rows, own, own + floats - part * made);
  });
}

}  // namespace

template <class T>
void router(const Call& call) {
  const auto x = call.input<T>(0, 3), w1 = call.input<T>(1, 2), w2 = call.input<T>(3, 2);
  const auto b1 = call.input<T>(2, 1), b2 = call.input<T>(4, 1);
  const int64_t depth = x.shape[2], hidden = w1.shape[1];
  if (w1.shape[0] != depth || b1.shape[0] != hidden || w2.shape[0] != hidden || w2.shape[1] != 1 || b2.shape[0] != 1)
    call.fail("w1 is " + w1.shape.text() + ", b1 " + b1.shape.text() + ", w2 " + w2.shape.text() + ", b2 " + b2.shape.text() +
              " for x " + x.shape.text());
  float* y = call.output<float>(0, {x.shape[0], x.shape[1]});
  const auto row_of = [&](int64_t row) { return x.data + row * depth; };
  for_parts<T>(call, x.shape[0] * x.shape[1], depth, hidden, row_of,
               [&](int64_t first, int64_t count, const float* const* rows, float* panel, float* made) {
    product(rows, count, depth, w1.data, hidden, made, panel);
    for (int64_t i = 0; i < count; ++i) {
      float sum = load(b2.data[0]);
      for (int64_t j = 0; j < hidden; ++j) {
        const float value = made[i * hidden + j] + load(b1.data[j]);
        sum += (value < 0 ? 0.0f : value) * load(w2.data[j]);  // NaN stays what it is
      }
      y[first + i] = sum;
    }
  });
}

template <class T>
void forecast_add(const Call& call) {
  const auto x = call.input<T>(0, 3), base = call.input<T>(2, 3);
  const auto down = call.input<T>(3, 2), up = call.input<T>(4, 2), bias = call.input<T>(5, 1);
  const int64_t batch = x.shape[0], tokens = x.shape[1], depth = x.shape[2], rank = down.shape[1], columns = base.shape[2];
  if (base.shape[0] != batch || base.shape[1] != tokens)
    call.fail("x is " + x.shape.text() + ", and base " + base.shape.text() + " has other tokens");
  if (down.shape[0] != depth || up.shape[0] != rank || up.shape[1] != columns || bias.shape[0] != columns)
    call.fail("down is " + down.shape.text() + ", up " + up.shape.text() + ", bias " + bias.shape.text() + ", expected " +
              one_of(depth, rank) + ", " + one_of(rank, columns) + ", [" + std::to_string(columns) + "]");
  const Rows rows = rows_of(call, 1, batch, tokens);
  T* z = call.output<T>(0, {batch, tokens, columns});
  if (z != base.data) std::memcpy(z, base.data, size_t(base.shape.count()) * sizeof(T));
  const auto token_of = [&](int64_t row) { return rows.sequence(row) * tokens + rows.token(row); };
  for_parts<T>(call, rows.count, depth, rank + columns, [&](int64_t row) { return x.data + token_of(row) * depth; },
               [&](int64_t first, int64_t count, const float* const* given, float* panel, float* made) {
    float* forecast = made + count * rank;
    const float* narrow[kPart] = {};
    for (int64_t i = 0; i < count; ++i) narrow[i] = made + i * rank;
    product(given, count, depth, down.data, rank, made, panel);
    product(narrow, count, rank, up.data, columns, forecast, panel);
    for (int64_t i = 0; i < count; ++i) {
      T* to = z + token_of(first + i) * columns;
      for (int64_t j = 0; j < columns; ++j)
        store(load(to[j]) + (forecast[i * columns + j] + load(bias.data[j])), to + j);
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
