// RoutedAttention: queries of executed tokens alone, against all keys; keys and values of all tokens enter the cache.
//
// Softmax is taken block by block of keys with a running maximum and sum (Milakov and Gimelshein, arXiv 1805.02867;
// Dao et al., arXiv 2205.14135), so that scores stay in the processor's cache. Blocks that no query may see are
// skipped: under a causal mask, about half of them.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention_inputs.h"
#include "math.h"

namespace irc {
namespace {

constexpr int64_t kPart = 96;    // queries per task
constexpr int64_t kBlock = 128;  // keys at a time
constexpr int64_t kFewQueries = 4;  // of a sequence; with at most this many, keys are read directly instead of being packed

template <class T>
struct Problem {
  Input<T> q, mask;
  Rows rows;
  T *keys, *values, *y;
  int64_t heads, kv_heads, size, tokens, total;  // total: past and new
  int64_t places;                                // of the cache, total or more
  float scale;
  const int64_t* seen;  // per row: one past the last key that it may see

  const T* query(int64_t row, int64_t head) const { return q.data + (row * heads + head) * size; }
  const T* mask_row(int64_t row) const { return mask.data + (rows.sequence(row) * tokens + rows.token(row)) * total; }
  int64_t cache(int64_t row, int64_t head) const {
    return (rows.sequence(row) * kv_heads + head / (heads / kv_heads)) * places * size;
  }
};

// Floats that `attend` needs for `part` queries.
int64_t memory_of(int64_t part, int64_t size) {
  return kPanelDepth * kMostColumns + part * (kBlock + 2 * size + 2) + kBlock;
}

// Attends from rows first ... last - 1, all of one sequence, in one head.
template <class T>
void attend(const Problem<T>& p, int64_t first, int64_t last, int64_t head, float* panel) {
  const int64_t count = last - first, size = p.size;
  float *scores = panel + kPanelDepth * kMostColumns, *queries = scores + count * kBlock, *sums = queries + count * size;
  float *largest = sums + count * size, *totals = largest + count, *added = totals + count;
  const float *query_rows[kPart], *score_rows[kPart];
  int64_t end = 0;
  for (int64_t i = 0; i < count; ++i) {
    query_rows[i] = as_floats(p.query(first + i, head), size, queries + i * size);
    score_rows[i] = scores + i * kBlock;
    largest[i] = -3e38f;
    totals[i] = 0;
    end = std::max(end, p.seen[first + i]);
  }
  std::fill_n(sums, count * size, 0.0f);
  const T *keys = p.keys + p.cache(first, head), *values = p.values + p.cache(first, head);
  int64_t low = 0;  // earlier rows see nothing from here on
  for (int64_t from = 0; from < end; from += kBlock) {
    const int64_t block = std::min(kBlock, end - from);
    while (p.seen[first + low] <= from) ++low;
    if (count > kFewQueries)
      math<T>().multiply(query_rows + low, count - low, size, keys + from * size, size, true, block, scores + low * kBlock, kBlock, false, panel);
    else
      for (int64_t i = low; i < count; ++i) math<T>().dots(query_rows[i], size, keys + from * size, block, scores + i * kBlock);
    for (int64_t i = low; i < count; ++i) {
      const float* mask = as_floats(p.mask_row(first + i) + from, block, added);
      float most = largest[i];
      const float total = instruction_set().softmax_part(scores + i * kBlock, mask, p.scale, block, &most);
      if (most > largest[i]) {  // earlier parts were taken relative to a smaller maximum
        const float shrink = std::exp(largest[i] - most);
        for (int64_t j = 0; j < size; ++j) sums[i * size + j] *= shrink;
        totals[i] *= shrink;
        largest[i] = most;
      }
      totals[i] += total;
    }
    if (count > kFewQueries)
      math<T>().multiply(score_rows + low, count - low, block, values + from * size, size, false, size, sums + low * size, size, true, panel);
    else
      for (int64_t i = low; i < count; ++i)
        math<T>().add_row(score_rows[i], block, values + from * size, size, size, sums + i * size);
  }
  for (int64_t i = 0; i < count; ++i) {
    const float inverse = 1.0f / totals[i];
    for (int64_t j = 0; j < size; ++j) sums[i * size + j] *= inverse;
    math<T>().narrow(sums + i * size, size, p.y + ((first + i) * p.heads + head) * size);
  }
}

// present = past, then the new tokens; of one sequence and one head. They may be the same memory.
template <class T>
void append(const T* past, int64_t past_tokens, const T* fresh, int64_t tokens, int64_t stride, int64_t size, T* present) {
  if (past_tokens && present != past) std::memcpy(present, past, size_t(past_tokens * size) * sizeof(T));
  for (int64_t t = 0; t < tokens; ++t)
    std::memcpy(present + (past_tokens + t) * size, fresh + t * stride, size_t(size) * sizeof(T));
}

}  // namespace

template <class T>
void routed_attention(const Call& call, const Attributes& attributes) {
  const auto k = call.input<T>(2, 3);
  Problem<T> p;
  p.rows = rows_of(call, 1, k.shape[0], k.shape[1]);
  const AttentionInputs<T> in(call, attributes, p.rows.count);
  p.q = in.q, p.mask = in.mask, p.y = in.y, p.keys = in.keys, p.values = in.values, p.scale = attributes.scale;
  p.heads = in.heads, p.kv_heads = in.kv_heads, p.size = in.size, p.tokens = in.tokens, p.total = in.total, p.places = in.places;
  const int64_t batch = in.batch, kv_heads = in.kv_heads, size = in.size, tokens = in.tokens, total = in.total, past = in.past;
  const int64_t places = in.places, room = in.room, stride = kv_heads * size;

  // Parts of the queries; none spans two sequences.
  std::vector<int64_t> starts;
  for (int64_t row = 0; row < p.rows.count; ++row)
    if (starts.empty() || row - starts.back() == kPart || p.rows.sequence(row) != p.rows.sequence(row - 1)) starts.push_back(row);
  const int64_t parts = int64_t(starts.size());
  starts.push_back(p.rows.count);
  int64_t longest = 0;
  for (int64_t part = 0; part < parts; ++part) longest = std::max(longest, starts[part + 1] - starts[part]);

  std::vector<int64_t> seen(size_t(p.rows.count), total);
  p.seen = seen.data();
  call.parallel(p.rows.count > kFewQueries ? parts : 0, [&](int64_t part) {
    for (int64_t row = starts[part]; row < starts[part + 1]; ++row) {
      const T* mask = p.mask_row(row);
      int64_t end = total;
      while (end > 0 && load(mask[end - 1]) < kUnseen) --end;
      seen[row] = end ? end : total;  // a row that sees no key attends to all equally: finite, and never used
    }
  });
  const auto append_head = [&](int64_t index) {
    const int64_t sequence = index / kv_heads, head = index % kv_heads, fresh = sequence * tokens * stride + head * size;
    append(in.past_k.data + index * room * size, past, in.k.data + fresh, tokens, stride, size, p.keys + index * places * size);
    append(in.past_v.data + index * room * size, past, in.v.data + fresh, tokens, stride, size, p.values + index * places * size);
  };
  const int64_t floats = memory_of(longest, size);
  if (longest <= kFewQueries) {
    // A decoding step: appends to a head's cache and attends to it while it is in the processor's cache.
    const int64_t group = p.heads / kv_heads;
    float* memory = scratch(batch * kv_heads * floats);
    call.parallel(batch * kv_heads, [&](int64_t index) {
      append_head(index);
      for (int64_t part = 0; part < parts; ++part)
        if (p.rows.sequence(starts[part]) == index / kv_heads)
          for (int64_t head = index % kv_heads * group; head < (index % kv_heads + 1) * group; ++head)
            attend(p, starts[part], starts[part + 1], head, memory + index * floats);
    });
    return;
  }
  call.parallel(batch * kv_heads, append_head);
  // A task is a part of the queries and some of the heads: enough tasks for all threads, each with its own memory.
  const int64_t shares = std::min(p.heads, std::max<int64_t>(1, (4 * thread_count() + parts - 1) / parts));
  float* memory = scratch(parts * shares * floats);
  call.parallel(parts * shares, [&](int64_t task) {
    const int64_t part = task / shares, share = task % shares;
    for (int64_t head = share * p.heads / shares; head < (share + 1) * p.heads / shares; ++head)
      attend(p, starts[part], starts[part + 1], head, memory + task * floats);
  });
}

template void routed_attention<float>(const Call&, const Attributes&);
template void routed_attention<Half>(const Call&, const Attributes&);
template void routed_attention<BFloat>(const Call&, const Attributes&);

}  // namespace irc
