// SelectRows, DecideRows and RaggedPlaces: which rows there are, and where. The host must know their number, because it is
// a shape: one wait for the device per call. With at most `padded` tokens the first two return as many rows as tokens
// instead, the last ones (-1, -1), and do not wait.

#include <algorithm>

#include "move.h"

namespace irc {
namespace {

constexpr int kOwn = 16;                    // tokens per thread
constexpr int64_t kPart = kOwn * kThreads;  // tokens per block
constexpr int kGroups = kThreads / 16;

struct Sums {
  int own[kThreads], groups[kGroups];
};

// A block's part of the mask or the logit differences.
template <class T>
struct Part {
  const T* given;
  int64_t count;

  IRC_BOTH int64_t first(int64_t block, int thread) const { return block * kPart + int64_t(thread) * kOwn; }
  IRC_BOTH int64_t last(int64_t first) const { return first + kOwn < count ? first + kOwn : count; }
  IRC_BOTH int executed(int64_t first) const {
    int found = 0;
    for (int64_t i = first; i < last(first); ++i) found += executes(given[i]);
    return found;
  }
};

IRC_BOTH inline void add_group(Sums& sums, int group) {
  int sum = 0;
  for (int i = 0; i < 16; ++i) sum += sums.own[group * 16 + i];
  sums.groups[group] = sum;
}

// counts[block] = executed tokens of the block's part.
template <class T>
struct CountExecuted {
  static constexpr int phases = 3;
  using Shared = Sums;
  Part<T> part;
  int* counts;

  template <int Phase>
  IRC_BOTH void run(int64_t block, int thread, Shared& sums) const {
    if constexpr (Phase == 0) {
      sums.own[thread] = part.executed(part.first(block, thread));
    } else if constexpr (Phase == 1) {
      if (thread < kGroups) add_group(sums, thread);
    } else if (thread == 0) {
      int sum = 0;
      for (int i = 0; i < kGroups; ++i) sum += sums.groups[i];
      counts[block] = sum;
    }
  }
};

// Writes the rows of both kinds in their order.
template <class T>
struct WriteRows {
  static constexpr int phases = 4;
  struct Shared {
    Sums sums;
    int64_t before[kThreads], groups[kGroups];  // executed tokens of earlier blocks; of all before a group
  };
  Part<T> part;
  const int* counts;
  int64_t tokens;
  int64_t *executed, *skipped;
  int64_t padded;  // rows of both kinds, 0 without padding

  template <int Phase>
  IRC_BOTH void run(int64_t block, int thread, Shared& shared) const {
    if constexpr (Phase == 0) {
      shared.sums.own[thread] = part.executed(part.first(block, thread));
      int64_t before = 0;
      for (int64_t i = thread; i < block; i += kThreads) before += counts[i];
      shared.before[thread] = before;
    } else if constexpr (Phase == 1) {
      if (thread < kGroups) {
        add_group(shared.sums, thread);
        int64_t before = 0;
        for (int i = 0; i < 16; ++i) before += shared.before[thread * 16 + i];
        shared.groups[thread] = before;
      }
    } else if constexpr (Phase == 2) {
      if (thread == 0) {
        int64_t before = 0;
        for (int i = 0; i < kGroups; ++i) before += shared.groups[i];
        for (int i = 0; i < kGroups; ++i) {
          shared.groups[i] = before;
          before += shared.sums.groups[i];
        }
      }
    } else {
      const int64_t first = part.first(block, thread), last = part.last(first);
      if (first >= last) return;
      int64_t done = shared.groups[thread / 16];
      for (int i = thread / 16 * 16; i < thread; ++i) done += shared.sums.own[i];
      int64_t sequence = first / tokens, token = first % tokens;
      for (int64_t i = first; i < last; ++i) {
        // Each token is a row of one kind; the other kind gets one row of padding at its end.
        const bool execute = executes(part.given[i]);
        const int64_t place = execute ? done : i - done;
        int64_t* to = (execute ? executed : skipped) + 2 * place;
        to[0] = sequence, to[1] = token;
        if (padded) {
          int64_t* none = (execute ? skipped : executed) + 2 * (padded - 1 - place);
          none[0] = none[1] = -1;
        }
        done += execute;
        if (++token == tokens) token = 0, ++sequence;
      }
    }
  }
};

struct CountOfSequence {
  static constexpr int phases = 1;
  using Shared = Nothing;
  const int64_t* rows;
  int64_t count, batch;
  int64_t* counts;

  template <int>
  IRC_BOTH void run(int64_t block, int thread, Shared&) const {
    const int64_t sequence = block * kThreads + thread;
    if (sequence < batch) counts[sequence] = first_of(rows, count, sequence + 1) - first_of(rows, count, sequence);
  }
};

struct PlaceRows {
  static constexpr int phases = 1;
  using Shared = Nothing;
  const int64_t* rows;
  int64_t count, batch, longest;
  int64_t *places, *index;

  template <int>
  IRC_BOTH void run(int64_t block, int thread, Shared&) const {
    const int64_t row = block * kThreads + thread;
    if (row >= count) return;
    const int64_t sequence = rows[2 * row];
    const int64_t place = sequence < 0 ? -1 : row - first_of(rows, count, sequence);
    places[2 * row] = sequence, places[2 * row + 1] = place;
    if (sequence >= 0 && sequence < batch && place >= 0 && place < longest) index[sequence * longest + place] = row;
  }
};

template <class T>
void choose_rows(const Call& call, const Attributes& attributes) {
  const auto given = call.input<T>(0, 2);
  const Stream stream(call);
  const int64_t count = given.shape.count(), blocks = blocks_for(count, kPart);
  if (!count) {
    call.output<int64_t>(0, {1, 0, 2});
    call.output<int64_t>(1, {1, 0, 2});
    return;
  }
  const Part<T> part{given.data, count};
  const bool pads = count <= attributes.padded;
  const auto write = [&](int64_t executed_rows, int64_t skipped_rows, const int* counts) {
    int64_t* executed = call.output<int64_t>(0, {1, executed_rows, 2});
    int64_t* skipped = call.output<int64_t>(1, {1, skipped_rows, 2});
    stream.launch(blocks, WriteRows<T>{part, counts, given.shape[1], executed, skipped, pads ? count : 0});
  };
  if (pads && blocks == 1) return write(count, count, nullptr);  // nothing comes before the one block
  const Scratch<int> counts(stream, blocks);
  stream.launch(blocks, CountExecuted<T>{part, counts.data()});
  if (pads) return write(count, count, counts.data());
  std::vector<int> found(size_t(blocks), 0);
  stream.fetch(found.data(), counts.data(), blocks * int64_t(sizeof(int)));
  int64_t number = 0;
  for (int each : found) number += each;
  write(number, count - number, counts.data());
}

}  // namespace

void select_rows(const Call& call, const Attributes& attributes) { choose_rows<uint8_t>(call, attributes); }

void decide_rows(const Call& call, const Attributes& attributes) { choose_rows<float>(call, attributes); }

// For a batch of one, and with one new token each (a decoding step), the longest is known without a wait.
template <class T>
void ragged_places(const Call& call) {
  const auto rows = call.input<int64_t>(0, 3);
  const auto like = call.input<T>(1, 3);
  if (rows.shape[0] != 1 || rows.shape[2] != 2) call.fail("rows are " + rows.shape.text() + ", expected [1, n, 2]");
  const Stream stream(call);
  const int64_t count = rows.shape[1], batch = like.shape[0];
  int64_t longest = batch == 1 ? count : count ? 1 : 0;
  if (batch > 1 && count && like.shape[1] > 1) {
    const Scratch<int64_t> counts(stream, batch);
    stream.launch(blocks_for(batch, kThreads), CountOfSequence{rows.data, count, batch, counts.data()});
    std::vector<int64_t> found(size_t(batch), 0);
    stream.fetch(found.data(), counts.data(), batch * int64_t(sizeof(int64_t)));
    longest = *std::max_element(found.begin(), found.end());
  }
  int64_t* places = call.output<int64_t>(0, {1, count, 2});
  int64_t* index = call.output<int64_t>(1, {batch, longest});
  stream.clear(index, batch * longest * int64_t(sizeof(int64_t)));
  stream.launch(blocks_for(count, kThreads), PlaceRows{rows.data, count, batch, longest, places, index});
}

template void ragged_places<float>(const Call&);
template void ragged_places<Half>(const Call&);
template void ragged_places<BFloat>(const Call&);

}  // namespace irc
