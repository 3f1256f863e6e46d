// Checked inputs of RoutedAttention, and its outputs: the same on the CPU and on CUDA.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>

#include "kernel.h"

namespace irc {

// The mask tells how many tokens there are. A cache of the past alone grows; one with room for the new tokens is written
// in place if past and present are the same memory.
template <class T>
struct AttentionInputs {
  Input<T> q, k, v, past_k, past_v, mask;
  int64_t batch, heads, kv_heads, size, tokens, past, total;  // total: past and new
  int64_t room, places;                                       // of the cache before and after, total or more
  T *y, *keys, *values;

  AttentionInputs(const Call& call, const Attributes& attributes, int64_t rows)
      : q(call.input<T>(0, 3)), k(call.input<T>(2, 3)), v(call.input<T>(3, 3)), past_k(call.input<T>(4, 4)),
        past_v(call.input<T>(5, 4)), mask(call.input<T>(6, 3)), batch(k.shape[0]), heads(attributes.heads),
        kv_heads(attributes.kv_heads), size(past_k.shape[3]), tokens(k.shape[1]), past(mask.shape[2] - tokens),
        total(mask.shape[2]), room(past_k.shape[2]), places(room == past ? total : room) {
    const auto same = [](const Shape& shape, std::initializer_list<int64_t> expected) {
      return std::equal(expected.begin(), expected.end(), shape.size);
    };
    const int64_t stride = kv_heads * size;
    if (!same(q.shape, {1, rows, heads * size}))
      call.fail("q is " + q.shape.text() + " for " + std::to_string(rows) + " rows and " + std::to_string(heads) + " heads of " + std::to_string(size));
    if (!same(k.shape, {batch, tokens, stride}) || !same(v.shape, {batch, tokens, stride}))
      call.fail("k is " + k.shape.text() + ", v " + v.shape.text() + ", the past " + past_k.shape.text());
    if (past < 0 || places < total)
      call.fail("past keys are " + past_k.shape.text() + ", the mask " + mask.shape.text() + " says " + std::to_string(past) + " past tokens and " + std::to_string(tokens) + " new ones");
    if (!same(past_k.shape, {batch, kv_heads, room, size}) || !same(past_v.shape, {batch, kv_heads, room, size}))
      call.fail("past keys are " + past_k.shape.text() + ", values " + past_v.shape.text());
    if (!same(mask.shape, {batch, tokens, total})) call.fail("mask is " + mask.shape.text() + " for k " + k.shape.text());
    y = call.output<T>(0, {1, rows, heads * size});
    keys = call.output<T>(1, {batch, kv_heads, places, size});
    values = call.output<T>(2, {batch, kv_heads, places, size});
  }
};

}  // namespace irc
