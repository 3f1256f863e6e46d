// Compiled once for each instruction set: IRC_SET names it, the compiler's flags choose the instructions.
// Vectors are compiler extensions; nothing from the standard library is used that the linker could share between sets.

#include "math.h"

namespace irc {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 12;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 6;
#else
constexpr int kLanes = 4, kRows = 6;
#endif
constexpr int kColumns = 2 * kLanes;  // of a tile
static_assert(kColumns <= kMostColumns, "a panel must fit");

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(float))));

inline Vector all(float value) { return value - Vector{}; }

inline Vector read(const float* from) {
  Vector value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

template <class W>
inline Vector read(const W* from) {
  float values[kLanes];
  for (int i = 0; i < kLanes; ++i) values[i] = load(from[i]);
  return read(values);
}

inline void write(Vector value, float* to) { __builtin_memcpy(to, &value, sizeof value); }

inline float sum(Vector value) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += value[i];
  return total;
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Copies `columns` columns of b into [depth][kColumns], zeros behind the last.
template <class W>
void pack(const W* b, int64_t stride, bool turned, int64_t depth, int64_t columns, float* panel) {
  if (columns < kColumns) __builtin_memset(panel, 0, depth * kColumns * sizeof(float));
  if (turned) {
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t k = 0; k < depth; ++k) panel[k * kColumns + j] = load(b[j * stride + k]);
  } else if (columns == kColumns) {
    for (int64_t k = 0; k < depth; ++k)
      for (int j = 0; j < kColumns; j += kLanes) write(read(b + k * stride + j), panel + k * kColumns + j);
  } else {
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t j = 0; j < columns; ++j) panel[k * kColumns + j] = load(b[k * stride + j]);
  }
}

// A tile of the product, kept in registers: `Rows` rows of a by the first `Vectors` vectors of a panel.
template <int Rows, int Vectors>
void tile(const float* const* a, int64_t from, int64_t depth, const float* panel, int64_t columns, float* c,
          int64_t c_stride, bool add) {
  Vector sums[Rows][Vectors];
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < Vectors; ++v) sums[i][v] = Vector{};
  for (int64_t k = 0; k < depth; ++k) {
    Vector b[Vectors];
    for (int v = 0; v < Vectors; ++v) b[v] = read(panel + k * kColumns + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const Vector x = all(a[i][from + k]);
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) sums[i][v] += x * b[v];
    }
  }
  for (int i = 0; i < Rows; ++i) {
    float* row = c + i * c_stride;
    for (int v = 0; v < Vectors; ++v, row += kLanes) {
      const int64_t left = columns - v * kLanes;
      if (left >= kLanes) {
        write(add ? read(row) + sums[i][v] : sums[i][v], row);
      } else {
        float values[kLanes];
        write(sums[i][v], values);
        for (int64_t j = 0; j < left; ++j) row[j] = add ? row[j] + values[j] : values[j];
      }
    }
  }
}

// All rows of a times one panel.
template <int Vectors>
void tiles(const float* const* a, int64_t rows, int64_t from, int64_t depth, const float* panel, int64_t columns, float* c,
           int64_t c_stride, bool add) {
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) tile<kRows, Vectors>(a + i, from, depth, panel, columns, c + i * c_stride, c_stride, add);
  for (; i + 4 <= rows; i += 4) tile<4, Vectors>(a + i, from, depth, panel, columns, c + i * c_stride, c_stride, add);
  for (; i + 2 <= rows; i += 2) tile<2, Vectors>(a + i, from, depth, panel, columns, c + i * c_stride, c_stride, add);
  for (; i < rows; ++i) tile<1, Vectors>(a + i, from, depth, panel, columns, c + i * c_stride, c_stride, add);
}

template <class W>
void multiply(const float* const* a, int64_t rows, int64_t depth, const W* b, int64_t stride, bool turned,
              int64_t columns, float* c, int64_t c_stride, bool add, float* panel) {
  if (depth == 0 && !add)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) c[i * c_stride + j] = 0.0f;
  for (int64_t from = 0; from < depth; from += kPanelDepth) {
    const int64_t part = least(depth - from, kPanelDepth);
    for (int64_t j = 0; j < columns; j += kColumns) {
      const int64_t width = least(columns - j, kColumns);
      pack(turned ? b + j * stride + from : b + from * stride + j, stride, turned, part, width, panel);
      (width > kLanes ? tiles<2> : tiles<1>)(a, rows, from, part, panel, width, c + j, c_stride, add || from);
    }
  }
}

// `Count` vectors of columns; the last begins at column `last` and may overlap the one before it.
template <int Count, class W>
void add_columns(const float* x, int64_t depth, const W* w, int64_t stride, int64_t last, float* y) {
  Vector total[Count];
  for (int i = 0; i < Count; ++i) total[i] = Vector{};
  for (int64_t k = 0; k < depth; ++k) {
    const Vector value = all(x[k]);
    const W* row = w + k * stride;
#pragma GCC unroll 16
    for (int i = 0; i < Count - 1; ++i) total[i] += value * read(row + i * kLanes);
    total[Count - 1] += value * read(row + last);
  }
  for (int i = 0; i < Count - 1; ++i) write(read(y + i * kLanes) + total[i], y + i * kLanes);
  if (last == (Count - 1) * kLanes) write(read(y + last) + total[Count - 1], y + last);
  else
    for (int64_t j = (Count - 1) * kLanes; j < last + kLanes; ++j) y[j] += total[Count - 1][j - last];
}

// Wide rows, in the order of memory: that gains more than keeping sums in registers.
template <class W>
void add_wide(const float* x, int64_t depth, const W* w, int64_t stride, int64_t columns, float* y) {
  for (int64_t k = 0; k < depth; ++k) {
    const W* row = w + k * stride;
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) write(read(y + j) + all(x[k]) * read(row + j), y + j);
    for (; j < columns; ++j) y[j] += x[k] * load(row[j]);
  }
}

template <class W>
void add_row(const float* x, int64_t depth, const W* w, int64_t stride, int64_t columns, float* y) {
  if (columns < kLanes) {
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t j = 0; j < columns; ++j) y[j] += x[k] * load(w[k * stride + j]);
    return;
  }
  constexpr int64_t kMost = 13;  // as many sums as fit into registers
  if (columns > kMost * kLanes) return add_wide(x, depth, w, stride, columns, y);
  using Step = void (*)(const float*, int64_t, const W*, int64_t, int64_t, float*);
  static constexpr Step steps[] = {nullptr, add_columns<1, W>, add_columns<2, W>, add_columns<3, W>, add_columns<4, W>,
                                   add_columns<5, W>, add_columns<6, W>, add_columns<7, W>, add_columns<8, W>,
                                   add_columns<9, W>, add_columns<10, W>, add_columns<11, W>, add_columns<12, W>,
                                   add_columns<13, W>};
  steps[(columns + kLanes - 1) / kLanes](x, depth, w, stride, columns - kLanes, y);
}

template <class W>
void dots(const float* q, int64_t size, const W* keys, int64_t count, float* scores) {
  for (int64_t t = 0; t < count; ++t) {
    const W* key = keys + t * size;
    Vector total{};
    int64_t k = 0;
    for (; k + kLanes <= size; k += kLanes) total += read(q + k) * read(key + k);
    float rest = sum(total);
    for (; k < size; ++k) rest += q[k] * load(key[k]);
    scores[t] = rest;
  }
}

template <class W>
void widen(const W* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = load(from[i]);
}

template <class W>
void narrow(const float* from, int64_t count, W* to) {
  for (int64_t i = 0; i < count; ++i) store(from[i], to + i);
}

// exp of numbers that are not above zero: 2^whole times a polynomial of the rest (Cephes, expf).
inline Vector exponential(Vector x) {
  const Vector low = all(-87.0f);
  x = x < low ? low : x;  // NaN stays NaN
  const Vector shifted = x * all(1.44269504f) - all(0.5f);
  const Integers whole = __builtin_convertvector(shifted, Integers);  // towards zero, so that the rest is small
  const Vector n = __builtin_convertvector(whole, Vector);
  const Vector r = x - n * all(0.693359375f) + n * all(2.12194440e-4f);
  Vector p = all(1.9875691500e-4f);
  p = p * r + all(1.3981999507e-3f);
  p = p * r + all(8.3334519073e-3f);
  p = p * r + all(4.1665795894e-2f);
  p = p * r + all(1.6666665459e-1f);
  p = p * r + all(5.0000001201e-1f);
  p = p * r * r + r + all(1.0f);
  const Integers power = (whole + 127) << 23;
  Vector scale;
  __builtin_memcpy(&scale, &power, sizeof scale);
  return p * scale;
}

float softmax_part(float* scores, const float* mask, float scale, int64_t count, float* largest) {
  // The tail is a vector too, padded with values that do not contribute.
  Vector most = all(*largest);
  int64_t t = 0;
  for (; t < count; t += kLanes) {
    float values[kLanes];
    if (t + kLanes <= count) {
      write(read(scores + t) * all(scale) + read(mask + t), scores + t);
      const Vector value = read(scores + t);
      most = value > most ? value : most;
    } else {
      for (int i = 0; i < kLanes; ++i) values[i] = *largest;
      for (int64_t i = t; i < count; ++i) values[i - t] = scores[i] = scores[i] * scale + mask[i];
      const Vector value = read(values);
      most = value > most ? value : most;
    }
  }
  for (int i = 0; i < kLanes; ++i) *largest = most[i] > *largest ? most[i] : *largest;
  float total = 0;
  Vector totals{};
  for (t = 0; t + kLanes <= count; t += kLanes) {
    const Vector value = exponential(read(scores + t) - all(*largest));
    write(value, scores + t);
    totals += value;
  }
  for (; t < count; ++t) {
    scores[t] = exponential(all(scores[t] - *largest))[0];
    total += scores[t];
  }
  return total + sum(totals);
}

template <class W>
constexpr Math<W> table() {
  return {multiply<W>, add_row<W>, dots<W>, widen<W>, narrow<W>};
}

}  // namespace

extern const InstructionSet IRC_SET = {IRC_SET_NAME, table<float>(), table<Half>(), table<BFloat>(), softmax_part};

}  // namespace irc
