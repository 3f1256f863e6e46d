// SelectRows, DecideRows, Compact, Scatter, ScatterAdd: pick tokens, replace them, add to them.

#include <algorithm>
#include <cstring>

#include "kernel.h"
#include "math.h"

namespace irc {

// Every entry of input 0 [batch, tokens] says whether its token executes.
template <class T>
static void choose_rows(const Call& call) {
  const auto given = call.input<T>(0, 2);
  const int64_t batch = given.shape[0], tokens = given.shape[1], count = given.shape.count();
  const int64_t executed = std::count_if(given.data, given.data + count, [](T entry) { return executes(entry); });
  int64_t* next[2] = {call.output<int64_t>(1, {1, count - executed, 2}), call.output<int64_t>(0, {1, executed, 2})};
  for (int64_t sequence = 0; sequence < batch; ++sequence)
    for (int64_t token = 0; token < tokens; ++token) {
      int64_t*& to = next[executes(given.data[sequence * tokens + token])];
      *to++ = sequence;
      *to++ = token;
    }
}

// Read as bytes: everything but zero is true, even if another program wrote a 2.
void select_rows(const Call& call, const Attributes&) { choose_rows<uint8_t>(call); }

void decide_rows(const Call& call, const Attributes&) { choose_rows<float>(call); }

// Calls work(first, last) for parts of `rows` rows of `width` numbers, in parallel if there is enough work.
template <class Work>
static void for_parts(const Call& call, int64_t rows, int64_t width, const Work& work) {
  const int64_t least = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, width));
  const int64_t part = std::max(least, (rows + thread_count() - 1) / thread_count());
  const int64_t parts = (rows + part - 1) / part;
  call.parallel(parts, [&](int64_t index) { work(index * part, std::min(rows, (index + 1) * part)); });
}

template <class T>
void compact(const Call& call) {
  const auto x = call.input<T>(0, 3);
  const Rows rows = rows_of(call, 1, x.shape[0], x.shape[1]);
  const int64_t width = x.shape[2], tokens = x.shape[1];
  T* y = call.output<T>(0, {1, rows.count, width});
  for_parts(call, rows.count, width, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)
      std::memcpy(y + row * width, x.data + (rows.sequence(row) * tokens + rows.token(row)) * width, size_t(width) * sizeof(T));
  });
}

// Shared by Scatter and ScatterAdd: y's rows go to their places in a copy of base, which may be base itself.
template <class T, class Put>
static void put_rows(const Call& call, const Put& put) {
  const auto y = call.input<T>(0, 3), base = call.input<T>(2, 3);
  const int64_t tokens = base.shape[1], width = base.shape[2];
  const Rows rows = rows_of(call, 1, base.shape[0], tokens);
  if (y.shape[0] != 1 || y.shape[1] != rows.count || y.shape[2] != width)
    call.fail("y is " + y.shape.text() + ", expected [1, " + std::to_string(rows.count) + ", " + std::to_string(width) + "]");
  T* z = call.output<T>(0, {base.shape[0], tokens, width});
  if (z != base.data) std::memcpy(z, base.data, size_t(base.shape.count()) * sizeof(T));
  for_parts(call, rows.count, width, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)
      put(y.data + row * width, z + (rows.sequence(row) * tokens + rows.token(row)) * width, width);
  });
}

template <class T>
void scatter(const Call& call) {
  put_rows<T>(call, [](const T* from, T* to, int64_t width) { std::memcpy(to, from, size_t(width) * sizeof(T)); });
}

template <class T>
void scatter_add(const Call& call) {
  put_rows<T>(call, [](const T* from, T* to, int64_t width) {
    for (int64_t i = 0; i < width; ++i) store(load(to[i]) + load(from[i]), to + i);
  });
}

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
