// Work of a whole warp: sums of products of 16 x 16 parts of matrices, on tensor cores for 16-bit numbers and by plain
// multiplications for float32, always with sums in float32; and asynchronous copies to shared memory.
//
// The distribution of a part over the threads is an implementation detail: element i of one Sums has the same position as
// element i of another of its type. In emulation the first thread of a warp does everything.
#pragma once

#include "device.h"
#ifndef IRC_EMULATED
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <mma.h>
#endif

namespace irc {

constexpr int kWarp = 32, kWarps = kThreads / kWarp, kSide = 16;  // of a part

#ifdef IRC_EMULATED

// Whether a thread takes part in the work of its warp.
inline bool in_warp(int thread) { return thread % kWarp == 0; }

template <class T>
struct Sums {
  static constexpr int count = kSide * kSide;
  float value[count];

  float& operator[](int i) { return value[i]; }
  void read(const float* from, int stride) {
    for (int i = 0; i < count; ++i) value[i] = from[i / kSide * stride + i % kSide];
  }
  void write(float* to, int stride) {
    for (int i = 0; i < count; ++i) to[i / kSide * stride + i % kSide] = value[i];
  }
};

// sums[i] += A times B_i for i below `used`. A, of rows a_stride apart, is at a; B_i at b + i * b_step, of rows b_stride
// apart, or where it is transposed of columns.
template <bool kTransposed, int Count, class T>
void add_products(Sums<T> (&sums)[Count], int used, const T* a, int a_stride, const T* b, int b_stride,
                  int b_step) {
  float left[kSide][kSide], right[kSide][kSide];
  for (int row = 0; row < kSide; ++row)
    for (int k = 0; k < kSide; ++k) left[row][k] = load(a[row * a_stride + k]);
  for (int i = 0; i < used; ++i, b += b_step) {
    for (int k = 0; k < kSide; ++k)
      for (int column = 0; column < kSide; ++column)
        right[k][column] = load(b[kTransposed ? column * b_stride + k : k * b_stride + column]);
    for (int row = 0; row < kSide; ++row)
      for (int k = 0; k < kSide; ++k)
        for (int column = 0; column < kSide; ++column)
          sums[i].value[row * kSide + column] += left[row][k] * right[k][column];
  }
}

// Copies 16 aligned bytes, or zeros if there are none. A thread's copies since it last closed a group form a group; it
// waits until all but the last `Open` groups have arrived, and other threads see them after the next barrier.
inline void copy_later(void* to, const void* from, bool any) {
  if (any) std::memcpy(to, from, 16);
  else std::memset(to, 0, 16);
}
inline void close_copies() {}
template <int Open>
void wait_for_copies() {}

#else

IRC_DEVICE bool in_warp(int) { return true; }

// Two rows of four columns per thread.
template <class T>
struct PlainSums {
  static constexpr int count = 8;
  float value[count];

  static IRC_DEVICE int row(int i) { return int(threadIdx.x) % kWarp / 4 * 2 + i / 4; }
  static IRC_DEVICE int column(int i) { return int(threadIdx.x) % 4 * 4 + i % 4; }
  IRC_DEVICE float& operator[](int i) { return value[i]; }
  IRC_DEVICE void read(const float* from, int stride) {
    IRC_UNROLL
    for (int i = 0; i < count; ++i) value[i] = from[row(i) * stride + column(i)];
  }
  IRC_DEVICE void write(float* to, int stride) {
    IRC_UNROLL
    for (int i = 0; i < count; ++i) to[row(i) * stride + column(i)] = value[i];
  }
};

template <bool kTransposed, int Count, class T>
IRC_DEVICE void add_products(PlainSums<T> (&sums)[Count], int used, const T* a, int a_stride, const T* b, int b_stride,
                             int b_step) {
  using Plain = PlainSums<T>;
  IRC_UNROLL
  for (int i = 0; i < Count; ++i) {
    if (i >= used) continue;
    for (int k = 0; k < kSide; ++k)
      IRC_UNROLL
      for (int e = 0; e < Plain::count; ++e) {
        const int column = Plain::column(e);
        const T factor = b[i * b_step + (kTransposed ? column * b_stride + k : k * b_stride + column)];
        sums[i].value[e] += load(a[Plain::row(e) * a_stride + k]) * load(factor);
      }
  }
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

// The types that tensor cores take.
template <class T>
struct TensorType {
  using Type = __half;
};
template <>
struct TensorType<BFloat> {
  using Type = __nv_bfloat16;
};

template <class T>
struct TensorSums {
  using Part = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, kSide, kSide, kSide, float>;
  static constexpr int count = Part::num_elements;
  Part part;

  IRC_DEVICE float& operator[](int i) { return part.x[i]; }
  IRC_DEVICE void read(const float* from, int stride) {
    nvcuda::wmma::load_matrix_sync(part, from, unsigned(stride), nvcuda::wmma::mem_row_major);
  }
  IRC_DEVICE void write(float* to, int stride) {
    nvcuda::wmma::store_matrix_sync(to, part, unsigned(stride), nvcuda::wmma::mem_row_major);
  }
};

template <bool kTransposed, int Count, class T>
IRC_DEVICE void add_products(TensorSums<T> (&sums)[Count], int used, const T* a, int a_stride, const T* b, int b_stride,
                             int b_step) {
  namespace wmma = nvcuda::wmma;
  using Number = typename TensorType<T>::Type;
  using Order = std::conditional_t<kTransposed, wmma::col_major, wmma::row_major>;
  wmma::fragment<wmma::matrix_a, kSide, kSide, kSide, Number, wmma::row_major> left;
  wmma::load_matrix_sync(left, reinterpret_cast<const Number*>(a), unsigned(a_stride));
  IRC_UNROLL
  for (int i = 0; i < Count; ++i) {
    if (i >= used) continue;
    wmma::fragment<wmma::matrix_b, kSide, kSide, kSide, Number, Order> right;
    wmma::load_matrix_sync(right, reinterpret_cast<const Number*>(b + i * b_step), unsigned(b_stride));
    wmma::mma_sync(sums[i].part, left, right, sums[i].part);
  }
}

template <class T>
using Sums = std::conditional_t<std::is_same_v<T, float>, PlainSums<T>, TensorSums<T>>;

#else
template <class T>
using Sums = PlainSums<T>;
#endif

IRC_DEVICE void copy_later(void* to, const void* from, bool any) { __pipeline_memcpy_async(to, from, 16, any ? 0 : 16); }
IRC_DEVICE void close_copies() { __pipeline_commit(); }
template <int Open>
IRC_DEVICE void wait_for_copies() { __pipeline_wait_prior(Open); }

#endif

}  // namespace irc
