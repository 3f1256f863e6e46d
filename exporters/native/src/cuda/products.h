// Products of few rows, some of which may be padding: their operands, and the launch that makes their parts.
#pragma once

#include "blas.h"
#include "move.h"

namespace irc {

constexpr int64_t kFewRows = 8;
constexpr int kDepth = 512;                // rows of w in a part
constexpr int64_t kUnknown = 0x7fffffff;  // size of a tensor that rows point into, if it is not known

IRC_BOTH inline int64_t parts_of(int64_t depth) { return depth > kDepth ? (depth + kDepth - 1) / kDepth : 1; }

// Rows on the device; without `pairs`, all `count` tokens.
struct Tokens {
  const int64_t* pairs;
  int64_t count, batch, tokens;

  // Which of batch * tokens a row is, -1 for padding. Without branches, so that loads for several rows overlap.
  IRC_BOTH int64_t of(int64_t row) const {
    if (!pairs) return row < count ? row : -1;
    const int64_t place = row < count ? row : 0, sequence = pairs[2 * place], token = pairs[2 * place + 1];
    const bool inside = (row < count) & (sequence >= 0) & (sequence < batch) & (token >= 0) & (token < tokens);
    return inside ? sequence * tokens + token : -1;
  }
  template <int Rows>
  IRC_BOTH bool any() const {
    bool found = false;
    for (int row = 0; row < Rows; ++row) found |= of(row) >= 0;
    return found;
  }
};

// The left operand: x, of the rows [count, depth] or of all tokens [tokens, depth], or the sum of the parts
// [number, count, depth] of an earlier product.
template <class T>
struct Source {
  const T* x;
  bool of_all_tokens;
  const float* parts;
  int64_t number;

  // Number k of `Rows` rows, zeros for padding. `token` is that of each row.
  template <int Rows>
  IRC_BOTH Pack<float, Rows> column(const Tokens& tokens, const int64_t (&token)[Rows], int64_t k, int64_t depth) const {
    Pack<float, Rows> found{};
    for (int64_t part = 0; part < (parts ? number : 1); ++part)
      for (int row = 0; row < Rows; ++row) {
        const int64_t own = row < tokens.count ? row : 0, place = of_all_tokens ? (token[row] < 0 ? 0 : token[row]) : own;
        const float value = parts ? parts[(part * tokens.count + own) * depth + k] : load(x[place * depth + k]);
        found.value[row] += token[row] < 0 ? 0.0f : value;
      }
    return found;
  }
};

// The destination of a sum: y [count, columns], or, with the bias added, the row's token of y.
template <class T>
struct Target {
  T* y;
  const T* bias;

  IRC_BOTH void put(int64_t row, int64_t token, int64_t column, int64_t columns, float sum) const {
    if (!bias) {
      store(token < 0 ? 0.0f : sum, y + row * columns + column);
    } else if (token >= 0) {
      T* to = y + token * columns + column;
      store(load(*to) + (sum + load(bias[column])), to);
    }
  }
};

// One launch for at most kFewRows rows. The parts of a product are float32 [parts_of(depth), count, columns]; without
// `parts` there must be only one, which goes to the target. The parts of `other`, a matrix of w's shape, follow those of w.
template <class T>
void multiply_few(const Stream& stream, const Tokens& tokens, const Source<T>& source, const T* w, int64_t depth,
                  int64_t columns, float* parts, const Target<T>& target, const T* other = nullptr);

}  // namespace irc
