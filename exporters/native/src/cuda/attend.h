// Attention from a tile of queries to its keys, one thread block per tile: scores, softmax and sums by blocks of keys,
// with a running maximum and sum as on the CPU (attention.cpp).
//
// A tile is a run of consecutive rows of one sequence, each with all query heads of one key head, so that a block of keys
// is read once for all of them. Values are copied to shared memory while scores are computed, and the next keys while the
// values are summed. Keys that no row of the tile may see are not read. If a tile's keys are split over several blocks,
// each writes sums that are not divided yet, and MergeSplits merges them.
#pragma once

#include <cmath>

#include "warp.h"

namespace irc {

// A compacted row: its place, -1 for padding, and its keys, first ... last - 1.
struct Row {
  int sequence, token, first, last;
};

struct Tile {
  int row, count;  // its first row, and the number of rows
};

// For a row, a head and a split: the largest score in powers of two, and the sum of weights relative to it.
struct Part {
  float largest, total;
};

constexpr float kLeast = -3e38f;

template <class T>
struct Problem {
  const T *q, *mask, *keys, *values;
  const Row* rows;
  T* y;
  int64_t heads, kv_heads, size, tokens, total;  // total: past and new
  int64_t places;                                // of the cache, total or more
  float scale;
  bool aligned;  // 16 bytes at a time

  // Tiles: `tiles` holds their rows; without it each row is a tile. Their query heads come in `shares`.
  const Tile* tiles;
  int64_t tile_count;
  int tile_heads, shares;
  // Splits of the keys; if there are several, they write their parts here, [split, row, head] and [.., size].
  int splits, split_keys;
  int64_t row_count;
  Part* parts;
  float* sums;
};

template <class T, int kSize, int kSlots, int kKeys>
struct Attend {
  static constexpr int phases = 10, loop_begin = 2, loop_end = 7;
  static constexpr bool kLarge = kSize > 128 || sizeof(T) > 2;
  static constexpr int resident = (kSlots > kSide ? 1 : 2) + !kLarge;  // blocks that have enough registers at once
  static constexpr int kPack = int(16 / sizeof(T)), kPacks = kSize / kPack;
  static constexpr int kStride = kSize + kPack, kOutStride = kSize + 4;  // different banks for different rows
  static constexpr int kScoreStride = kKeys + 4, kWeightStride = kScoreStride * int(sizeof(float) / sizeof(T));
  static constexpr int kHelpers = kWarps / (kSlots / kSide);  // warps that share the columns of 16 slots
  static constexpr int kScores = (kKeys / kSide + kHelpers - 1) / kHelpers, kOuts = (kSize / kSide + kHelpers - 1) / kHelpers;
  static constexpr int kLanes = kThreads / kSlots, kOwn = kKeys / kLanes;  // threads of a slot, and their keys

  struct Inputs {
    T queries[kSlots * kStride], keys[kKeys * kStride], values[kKeys * kStride];
  };
  struct alignas(128) Shared {
    union {
      Inputs in;
      float out[kSlots * kOutStride];
    };
    union {
      alignas(32) float scores[kSlots * kScoreStride];
      T weights[kSlots * kWeightStride];
    };
    float shrink[kSlots * kSide];  // a slot's in all columns of its row
    float of_thread[kThreads], of_slot[kSlots];
    Row rows[kSlots];
  };
  static_assert(sizeof(Shared) <= 99 * 1024, "no GPU from sm_80 on has less for a block");
  struct State {
    Tile tile;
    int head, kv_head, sequence;  // its first query head
    int from, to;                 // the remaining keys
    int row;                      // of the thread's slot, within the tile; -1 for none
    T added[kOwn];
    float scores[kOwn], largest, total;
    Sums<T> sums[kOuts];
  };

  Problem<T> p;

  IRC_DEVICE bool again(const State& state) const { return state.from < state.to; }

  IRC_DEVICE int width() const { return int(p.size + kSide - 1) / kSide * kSide; }

  // Reads rows of `size` numbers, zeros behind them up to `width`, and rows of zeros where `row_at` gives none.
  template <int kRows, class RowAt>
  IRC_DEVICE void read(int thread, T* to, const RowAt& row_at) const {
    if (p.aligned) {
      IRC_UNROLL
      for (int i = 0; i < kRows * kPacks; i += kThreads) {
        const int row = (i + thread) / kPacks, first = (i + thread) % kPacks * kPack;
        if (row >= kRows || first >= width()) continue;
        const T* from = row_at(row);
        copy_later(to + row * kStride + first, from ? from + first : p.q, from && first < p.size);
      }
    } else {
      for (int i = thread; i < kRows * kSize; i += kThreads) {
        const int row = i / kSize, at = i % kSize;
        const T* from = row_at(row);
        if (at < width()) to[row * kStride + at] = from && at < p.size ? from[at] : T{};
      }
    }
  }

  IRC_DEVICE void read_keys(const T* cache, const State& state, int from, int thread, T* to) const {
    const T* keys = cache + ((int64_t(state.sequence) * p.kv_heads + state.kv_head) * p.places + from) * p.size;
    read<kKeys>(thread, to, [&](int key) { return from + key < state.to ? keys + key * p.size : nullptr; });
  }

  template <int Phase>
  IRC_DEVICE void run(int64_t block, int thread, Shared& shared, State& state) const {
    const int slot = thread / kLanes, lane = thread % kLanes;
    const int strip = thread / kWarp / kHelpers, helper = thread / kWarp % kHelpers;
    if constexpr (Phase == 0) {
      int64_t index = block / p.splits;
      const int share = int(index % p.shares);
      index /= p.shares;
      state.kv_head = int(index % p.kv_heads);
      state.head = int(state.kv_head * (p.heads / p.kv_heads)) + share * p.tile_heads;
      index = p.tile_count - 1 - index / p.kv_heads;  // under a causal mask the last ones have the most work
      state.tile = p.tiles ? p.tiles[index] : Tile{int(index), 1};
      if (thread < state.tile.count) shared.rows[thread] = p.rows[state.tile.row + thread];
    } else if constexpr (Phase == 1) {
      const int split = int(block % p.splits) * p.split_keys;
      state.sequence = -1, state.from = int(p.total), state.to = 0;
      for (int i = 0; i < state.tile.count; ++i) {
        const Row row = shared.rows[i];
        if (row.sequence < 0) continue;
        state.sequence = row.sequence;
        if (row.first < state.from) state.from = row.first;
        if (row.last > state.to) state.to = row.last;
      }
      if (state.from < split) state.from = split;
      if (state.to > split + p.split_keys) state.to = split + p.split_keys;
      const int row = slot / p.tile_heads, heads = heads_of(state);
      const bool real = row < state.tile.count && slot % p.tile_heads < heads;
      state.row = real && shared.rows[row].sequence >= 0 && shared.rows[row].sequence == state.sequence ? row : -1;
      state.largest = kLeast, state.total = 0;
      if (in_warp(thread)) {
        IRC_UNROLL
        for (int i = 0; i < kOuts; ++i) clear(state.sums[i]);
      }
      if (!again(state)) return;  // without reading anything
      read<kSlots>(thread, shared.in.queries, [&](int own) -> const T* {
        const int of_tile = own / p.tile_heads, head = own % p.tile_heads;
        if (of_tile >= state.tile.count || head >= heads) return nullptr;
        return p.q + ((state.tile.row + of_tile) * p.heads + state.head + head) * p.size;
      });
      read_keys(p.keys, state, state.from, thread, shared.in.keys);
      close_copies();
    } else if constexpr (Phase == 2) {
      read_keys(p.values, state, state.from, thread, shared.in.values);
      close_copies();
      const Row row = state.row < 0 ? Row{} : shared.rows[state.row];
      const T* mask = p.mask + (row.sequence * p.tokens + row.token) * p.total + state.from;
      IRC_UNROLL
      for (int i = 0; i < kOwn; ++i) {
        const int key = lane + i * kLanes;
        if (state.row >= 0 && key < state.to - state.from) state.added[i] = mask[key];
        else store(2 * kUnseen, &state.added[i]);
      }
      wait_for_copies<1>();
    } else if constexpr (Phase == 3) {
      if (!in_warp(thread) || !busy(state, strip)) return;
      Sums<T> scores[kScores];
      IRC_UNROLL
      for (int i = 0; i < kScores; ++i) clear(scores[i]);
      const int used = columns(kKeys, helper);
      const T* queries = shared.in.queries + strip * kSide * kStride;
      const T* keys = shared.in.keys + helper * kSide * kStride;
      for (int k = 0; k < width(); k += kSide)
        add_products<true>(scores, used, queries + k, kStride, keys + k, kStride, kHelpers * kSide * kStride);
      IRC_UNROLL
      for (int i = 0; i < kScores; ++i)
        if (i < used)
          scores[i].write(shared.scores + strip * kSide * kScoreStride + (helper + i * kHelpers) * kSide, kScoreStride);
    } else if constexpr (Phase == 4) {
      if (state.from + kKeys < state.to) read_keys(p.keys, state, state.from + kKeys, thread, shared.in.keys);
      close_copies();
      constexpr float kPowers = 1.4426950408889634f;  // e to the x is 2 to the x times this
      float most = kLeast;
      IRC_UNROLL
      for (int i = 0; i < kOwn; ++i) {
        const float added = load(state.added[i]), score = shared.scores[slot * kScoreStride + lane + i * kLanes];
        state.scores[i] = added < kUnseen ? kHidden : kPowers * (score * p.scale + added);
        if (state.scores[i] > most) most = state.scores[i];
      }
      shared.of_thread[thread] = most;
    } else if constexpr (Phase == 5) {
      float most = state.largest;
      IRC_UNROLL
      for (int i = 0; i < kLanes; ++i)
        if (shared.of_thread[slot * kLanes + i] > most) most = shared.of_thread[slot * kLanes + i];
      const float shrink = exp2f(state.largest - most);  // earlier sums are relative to a smaller maximum
      T* weights = shared.weights + slot * kWeightStride;
      state.total *= shrink;
      IRC_UNROLL
      for (int i = 0; i < kOwn; ++i) {
        const float weight = exp2f(state.scores[i] - most);
        state.total += weight;
        store(weight, &weights[lane + i * kLanes]);
      }
      state.largest = most;
      for (int i = lane; i < kSide; i += kLanes) shared.shrink[slot * kSide + i] = shrink;
      wait_for_copies<1>();
    } else if constexpr (Phase == 6) {
      state.from += kKeys;
      if (!in_warp(thread) || !busy(state, strip)) return;
      Sums<T> shrink;
      shrink.read(shared.shrink + strip * kSide * kSide, kSide);
      IRC_UNROLL
      for (int i = 0; i < kOuts; ++i)
        IRC_UNROLL
        for (int e = 0; e < Sums<T>::count; ++e) state.sums[i][e] *= shrink[e];
      const T* weights = shared.weights + strip * kSide * kWeightStride;
      const T* values = shared.in.values + helper * kSide;
      IRC_UNROLL
      for (int k = 0; k < kKeys; k += kSide)
        add_products<false>(state.sums, columns(width(), helper), weights + k, kWeightStride, values + k * kStride, kStride,
                            kHelpers * kSide);
    } else if constexpr (Phase == 7) {
      shared.of_thread[thread] = state.total;
      if (!in_warp(thread) || !busy(state, strip)) return;
      IRC_UNROLL
      for (int i = 0; i < kOuts; ++i)
        if (i < columns(width(), helper))
          state.sums[i].write(shared.out + strip * kSide * kOutStride + (helper + i * kHelpers) * kSide, kOutStride);
    } else if constexpr (Phase == 8) {
      if (lane) return;
      float total = 0;
      for (int i = 0; i < kLanes; ++i) total += shared.of_thread[thread + i];
      shared.of_slot[slot] = total;
      if (p.splits > 1 && state.row >= 0)
        p.parts[part_of(block, state, slot)] = {state.largest, total};
    } else {
      for (int i = thread; i < state.tile.count * p.tile_heads * kSize; i += kThreads) {
        const int own = i / kSize, place = i % kSize;
        if (place >= p.size || own % p.tile_heads >= heads_of(state)) continue;
        if (shared.rows[own / p.tile_heads].sequence < 0) continue;
        const float total = shared.of_slot[own], sum = shared.out[own * kOutStride + place];
        const int64_t part = part_of(block, state, own);
        if (p.splits > 1) {
          if (total != 0) p.sums[part * p.size + place] = sum;
        } else {
          store(total == 0 ? 0.0f : sum / total, &p.y[part * p.size + place]);
        }
      }
    }
  }

 private:
  static constexpr float kHidden = -INFINITY;

  // Whether any of 16 slots is in use.
  IRC_DEVICE bool busy(const State& state, int strip) const { return strip * kSide < state.tile.count * p.tile_heads; }

  static IRC_DEVICE void clear(Sums<T>& sums) {
    IRC_UNROLL
    for (int e = 0; e < Sums<T>::count; ++e) sums[e] = 0;
  }

  // A helper's columns of 16 among `count`.
  static IRC_DEVICE int columns(int count, int helper) { return (count / kSide - helper + kHelpers - 1) / kHelpers; }

  // Query heads of the tile: the last share may have fewer.
  IRC_DEVICE int heads_of(const State& state) const {
    const int end = int((state.kv_head + 1) * (p.heads / p.kv_heads));
    return end - state.head < p.tile_heads ? end - state.head : p.tile_heads;
  }

  IRC_DEVICE int64_t part_of(int64_t block, const State& state, int slot) const {
    const int64_t row = state.tile.row + slot / p.tile_heads;
    const int64_t split = block % p.splits;
    return (split * p.row_count + row) * p.heads + state.head + slot % p.tile_heads;
  }
};

}  // namespace irc
