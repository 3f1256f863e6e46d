// RoutedAttention: queries of executed tokens alone, against all keys; keys and values of all tokens enter the cache.
//
// The host sees only shapes, and nothing waits for the device. The first launch appends to the cache and finds the keys
// that each row may see. With many rows a small launch groups them into tiles. Then the tiles attend (attend.h). If the
// keys of few rows were split over several blocks, a last launch merges the parts.

#include "../attention_inputs.h"
#include "attend.h"
#include "move.h"

namespace irc {
namespace {

constexpr int64_t kFewRows = 32;       // with at most this many, and few tokens per sequence, each row is its own tile
constexpr int64_t kFewTokens = 4;
constexpr int64_t kWantedBlocks = 1024;  // several per multiprocessor of the largest GPUs; most may have no row
constexpr int64_t kLeastSplit = 128;    // keys
constexpr int kAppended = 4;            // packs per thread

// A cache's memory before and after, and what is appended. If `present` is `past`, only the appended part is written.
template <class T>
struct Cache {
  const T *past, *fresh;
  T* present;
};

// Blocks 0 ... appending - 1 append to the cache, each of the others handles a row.
template <class T, int Count>
struct Prepare {
  static constexpr int phases = 3;
  static constexpr int kGroup = 16;
  using Numbers = Pack<T, Count>;
  struct Shared {
    int first[kThreads], last[kThreads];
  };
  Cache<T> caches[2];  // keys, values
  int64_t appending, chunks;  // blocks: all, of one head
  int64_t batch, kv_heads, size, tokens, past, total, room, places;
  bool in_place;
  const int64_t* pairs;
  const T* mask;
  int64_t width;  // of y
  T* y;
  Row* rows;

  template <int Phase>
  IRC_DEVICE void run(int64_t block, int thread, Shared& shared) const {
    if (block < appending) {
      if constexpr (Phase == 0) append(block, thread);
    } else {
      look<Phase>(block - appending, thread, shared);
    }
  }

  IRC_DEVICE void append(int64_t block, int thread) const {
    const int64_t chunk = block % chunks, index = block / chunks % (batch * kv_heads);
    const Cache<T> cache = caches[block / chunks / (batch * kv_heads)];
    const int64_t packs = size / Count, begin = in_place ? past * packs : 0;
    auto* to = reinterpret_cast<Numbers*>(cache.present + index * places * size);
    const auto* old = reinterpret_cast<const Numbers*>(cache.past + index * room * size);
    const int64_t first = index / kv_heads * tokens * kv_heads + index % kv_heads;
    const auto* fresh = reinterpret_cast<const Numbers*>(cache.fresh) + first * packs;
    IRC_UNROLL
    for (int i = 0; i < kAppended; ++i) {
      const int64_t at = begin + (chunk * kAppended + i) * kThreads + thread, added = at - past * packs;
      if (at >= total * packs) return;
      to[at] = added < 0 ? old[at] : fresh[added / packs * kv_heads * packs + added % packs];
    }
  }

  template <int Phase>
  IRC_DEVICE void look(int64_t row, int thread, Shared& shared) const {
    const int64_t sequence = pairs[2 * row], token = pairs[2 * row + 1];
    const bool inside = sequence >= 0 && sequence < batch && token >= 0 && token < tokens;
    int first = int(total), last = 0;
    if constexpr (Phase == 0) {
      if (!inside) {
        for (int64_t i = thread; i < width; i += kThreads) y[row * width + i] = T{};
        return;
      }
      const T* own = mask + (sequence * tokens + token) * total;
      for (int key = thread; key < total; key += kThreads)
        if (!(load(own[key]) < kUnseen)) {
          if (key < first) first = key;
          last = key + 1;
        }
      shared.first[thread] = first, shared.last[thread] = last;
    } else if constexpr (Phase == 1) {
      if (!inside || thread >= kThreads / kGroup) return;
      for (int i = thread * kGroup; i < (thread + 1) * kGroup; ++i) merge(shared, i, &first, &last);
      // No other thread reads its own group's first place.
      shared.first[thread * kGroup] = first, shared.last[thread * kGroup] = last;
    } else if (thread == 0) {
      for (int i = 0; inside && i < kThreads; i += kGroup) merge(shared, i, &first, &last);
      rows[row] = inside ? Row{int(sequence), int(token), first, last} : Row{-1, -1, 0, 0};
    }
  }

  static IRC_DEVICE void merge(const Shared& shared, int i, int* first, int* last) {
    if (shared.first[i] < *first) *first = shared.first[i];
    if (shared.last[i] > *last) *last = shared.last[i];
  }
};

// Groups each sequence's rows into tiles; the rest of the table stays empty. One block.
struct CutTiles {
  static constexpr int phases = 3;
  struct Shared {
    int64_t before[kThreads];
  };
  const int64_t* pairs;
  int64_t count, batch, most;
  int tile_rows;
  Tile* tiles;

  IRC_DEVICE int64_t first_row(int64_t sequence) const { return first_of(pairs, count, sequence); }

  template <int Phase>
  IRC_DEVICE void run(int64_t, int thread, Shared& shared) const {
    const int64_t each = (batch + kThreads - 1) / kThreads, begin = thread * each;
    const int64_t end = begin + each < batch ? begin + each : batch;
    if constexpr (Phase == 0) {
      int64_t found = 0;
      for (int64_t sequence = begin; sequence < end; ++sequence)
        found += (first_row(sequence + 1) - first_row(sequence) + tile_rows - 1) / tile_rows;
      shared.before[thread] = found;
      for (int64_t i = thread; i < most; i += kThreads) tiles[i] = {0, 0};
    } else if constexpr (Phase == 1) {
      if (thread) return;
      int64_t sum = 0;
      for (int i = 0; i < kThreads && i * each < batch; ++i) {
        const int64_t own = shared.before[i];
        shared.before[i] = sum;
        sum += own;
      }
    } else {
      if (begin >= end) return;
      int64_t tile = shared.before[thread];
      for (int64_t sequence = begin; sequence < end; ++sequence) {
        const int64_t last = first_row(sequence + 1);
        for (int64_t row = first_row(sequence); row < last; row += tile_rows, ++tile)
          if (tile < most) tiles[tile] = {int(row), int(last - row < tile_rows ? last - row : tile_rows)};
      }
    }
  }
};

// y from the parts of all splits, in order. One thread per number of y.
template <class T>
struct MergeSplits {
  static constexpr int phases = 1;
  using Shared = Nothing;
  Problem<T> p;

  template <int>
  IRC_DEVICE void run(int64_t block, int thread, Shared&) const {
    const int64_t heads = p.row_count * p.heads, index = block * kThreads + thread, head = index / p.size;
    if (head >= heads || p.rows[head / p.heads].sequence < 0) return;
    float most = kLeast, total = 0, sum = 0;
    for (int64_t i = head; i < p.splits * heads; i += heads)
      if (p.parts[i].largest > most) most = p.parts[i].largest;
    for (int64_t i = head; i < p.splits * heads; i += heads) {
      const Part part = p.parts[i];
      if (part.total == 0) continue;  // sees no key, so it wrote no sums
      const float weight = exp2f(part.largest - most);
      total += weight * part.total;
      sum += weight * p.sums[i * p.size + index % p.size];
    }
    store(total == 0 ? 0.0f : sum / total, &p.y[index]);
  }
};

// How many keys a block holds at a time, and for how many queries: limited by shared memory.
constexpr int kMostKeys = 64, kFewSlots = 16;
template <class T, int kSize>
constexpr int kKeys = std::min(kMostKeys, int(16384 / (kSize * sizeof(T))));

template <class T>
constexpr int slots_of_many(int64_t size) { return size * int64_t(sizeof(T)) > 512 ? 32 : 64; }

template <class T>
void prepare(const Stream& stream, const Problem<T>& p, const AttentionInputs<T>& in, const int64_t* pairs, Row* rows) {
  const bool in_place = in.past_k.data == in.keys && in.past_v.data == in.values;
  const auto run = [&](auto pack) {
    constexpr int kCount = decltype(pack)::value;
    const int64_t packs = (in.total - (in_place ? in.past : 0)) * (in.size / kCount);
    const int64_t chunks = blocks_for(packs, kAppended * kThreads), appending = 2 * in.batch * in.kv_heads * chunks;
    stream.launch(appending + p.row_count,
                  Prepare<T, kCount>{{{in.past_k.data, in.k.data, in.keys}, {in.past_v.data, in.v.data, in.values}},
                                     appending, chunks, in.batch, in.kv_heads, in.size, in.tokens, in.past, in.total, in.room,
                                     in.places, in_place, pairs, in.mask.data, in.heads * in.size, in.y, rows});
  };
  if (p.aligned) run(std::integral_constant<int, int(16 / sizeof(T))>());
  else run(std::integral_constant<int, 1>());
}

template <class T, int kSize>
void attend(const Stream& stream, Problem<T> p, bool few) {
  const int64_t blocks = p.tile_count * p.kv_heads * p.shares * p.splits;
  if (few) stream.launch(blocks, Attend<T, kSize, kFewSlots, kKeys<T, kSize>>{p});
  else stream.launch(blocks, Attend<T, kSize, slots_of_many<T>(kSize), kKeys<T, kSize>>{p});
}

// Carves up the memory that one call needs beside its outputs.
template <class Item>
Item* take(char** memory, int64_t count) {
  Item* taken = reinterpret_cast<Item*>(*memory);
  *memory += (count * int64_t(sizeof(Item)) + 15) / 16 * 16;
  return taken;
}

}  // namespace

template <class T>
void routed_attention(const Call& call, const Attributes& attributes) {
  const auto rows = pairs(call);
  const AttentionInputs<T> in(call, attributes, rows.shape[1]);
  const int64_t count = rows.shape[1], group = in.heads / in.kv_heads;
  if (in.size > 256) call.fail("heads have " + std::to_string(in.size) + " numbers; the CUDA kernel takes up to 256");
  if (std::max(in.total, count) > 0x3fffffff) call.fail("there are more keys or rows than fit 30 bits");

  Problem<T> p{};
  p.q = in.q.data, p.mask = in.mask.data, p.keys = in.keys, p.values = in.values, p.y = in.y, p.scale = attributes.scale;
  p.heads = in.heads, p.kv_heads = in.kv_heads, p.size = in.size, p.tokens = in.tokens, p.total = in.total;
  p.places = in.places, p.row_count = count;
  p.aligned = in.size * int64_t(sizeof(T)) % 16 == 0 && aligned(in.q.data) && aligned(in.k.data) && aligned(in.v.data) &&
              aligned(in.past_k.data) && aligned(in.past_v.data) && aligned(in.keys) && aligned(in.values);

  const bool few = count <= kFewRows || in.tokens <= kFewTokens;
  const int slots = few ? kFewSlots : slots_of_many<T>(in.size);
  p.tile_heads = int(std::min<int64_t>(group, slots)), p.shares = int(blocks_for(group, p.tile_heads));
  const int tile_rows = few ? 1 : slots / p.tile_heads;
  p.tile_count = few ? count : count / tile_rows + std::min(count, in.batch);
  p.splits = 1, p.split_keys = int(in.total);
  if (few && count) {
    const int64_t wanted = kWantedBlocks / (count * in.kv_heads * p.shares), most = in.total / kLeastSplit;
    const int64_t splits = std::max<int64_t>(1, std::min(wanted, most));
    p.split_keys = int(blocks_for(blocks_for(in.total, splits), kMostKeys) * kMostKeys);
    p.splits = int(blocks_for(in.total, p.split_keys));
  }

  const Stream stream(call);
  const int64_t parts = p.splits > 1 ? p.splits * count * in.heads : 0, tiles = few ? 0 : p.tile_count;
  const Scratch<char> memory(stream, 64 + count * int64_t(sizeof(Row)) + tiles * int64_t(sizeof(Tile)) +
                                         parts * int64_t(sizeof(Part) + in.size * sizeof(float)));
  char* free = memory.data();
  Row* found = take<Row>(&free, count);
  Tile* table = take<Tile>(&free, tiles);
  p.rows = found, p.parts = take<Part>(&free, parts), p.sums = take<float>(&free, parts * in.size);
  prepare(stream, p, in, rows.data, found);
  if (!count) return;
  if (!few) {
    p.tiles = table;
    stream.launch(1, CutTiles{rows.data, count, in.batch, tiles, tile_rows, table});
  }
  if (in.size <= 64) attend<T, 64>(stream, p, few);
  else if (in.size <= 128) attend<T, 128>(stream, p, few);
  else attend<T, 256>(stream, p, few);
  if (parts) stream.launch(blocks_for(count * in.heads * in.size, kThreads), MergeSplits<T>{p});
}

template void routed_attention<float>(const Call&, const Attributes&);
template void routed_attention<Half>(const Call&, const Attributes&);
template void routed_attention<BFloat>(const Call&, const Attributes&);

}  // namespace irc
