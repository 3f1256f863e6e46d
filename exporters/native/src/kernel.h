// A kernel's view of ONNX Runtime: checked tensors, outputs, attributes, the thread pool.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "abi.h"

namespace irc {

// An error that becomes an OrtStatus; what() names the operator, what was found and what was expected.
struct Failure {
  int code;
  std::string message;
};

[[noreturn]] inline void refuse(const std::string& message) { throw Failure{kInvalidArgument, message}; }

struct Shape {
  int64_t size[4] = {1, 1, 1, 1};
  int rank = 0;
  int64_t operator[](int axis) const { return size[axis]; }
  int64_t count() const;
  std::string text() const;
};

// A tensor of the node: `data` may be null if it has no elements.
template <class T>
struct Input {
  const T* data;
  Shape shape;
};

// One call of a kernel.
class Call {
 public:
  Call(const OrtApi* api, OrtKernelContext* context, const char* name) : api_(api), context_(context), name_(name) {}

  // Input `index`, whose rank must be `rank`.
  template <class T>
  Input<T> input(int index, int rank) const {
    Input<T> found;
    found.data = static_cast<const T*>(read(index, rank, &found.shape));
    return found;
  }

  // Output `index` of a shape.
  template <class T>
  T* output(int index, std::initializer_list<int64_t> shape) const {
    return static_cast<T*>(write(index, shape));
  }

  // The stream of the execution provider, null on the CPU.
  void* stream() const;

  // A resource of the CUDA provider by its number (CudaResource in ONNX Runtime's sources), such as a cuBLAS handle.
  void* resource(int number) const;

  // Ends the call with a message about its inputs. Messages are built only when they are needed.
  [[noreturn]] void fail(const std::string& what) const;

  // Runs task(0) ... task(count - 1) on ONNX Runtime's threads; tasks must not throw.
  template <class Task>
  void parallel(int64_t count, const Task& task) const {
    if (count == 1) task(0);
    if (count > 1) spread(count, [](void* data, size_t index) { (*static_cast<const Task*>(data))(int64_t(index)); }, const_cast<Task*>(&task));
  }

  const char* name() const { return name_; }

 private:
  const void* read(int index, int rank, Shape* shape) const;
  void* write(int index, std::initializer_list<int64_t> shape) const;
  void spread(int64_t count, void (*task)(void*, size_t), void* data) const;
  void check(OrtStatus* status) const;

  const OrtApi* api_;
  OrtKernelContext* context_;
  const char* name_;
};

// The attributes of RoutedAttention, and that of SelectRows and DecideRows, which only CUDA uses.
struct Attributes {
  int64_t heads = 0, kv_heads = 0;
  float scale = 0;
  int64_t padded = 0;
};

// Rows [1, n, 2]: pairs (sequence, token), checked to lie within [batch, tokens] and to be in order.
struct Rows {
  const int64_t* pairs;
  int64_t count;
  int64_t sequence(int64_t row) const { return pairs[2 * row]; }
  int64_t token(int64_t row) const { return pairs[2 * row + 1]; }
};
Rows rows_of(const Call& call, int index, int64_t batch, int64_t tokens);

// Memory of the calling thread that is kept between calls, so that a decoding step allocates none.
float* scratch(int64_t floats);

// The approximate number of threads that share the work.
int64_t thread_count();

// A mask below this hides a key: models are written with -3e4 (fp16) or -1e30.
constexpr float kUnseen = -2.5e4f;

// Kernels: each reads its inputs from a call and writes its outputs.
void select_rows(const Call& call, const Attributes& attributes);
void decide_rows(const Call& call, const Attributes& attributes);
template <class T>
void compact(const Call& call);
template <class T>
void scatter(const Call& call);
template <class T>
void scatter_add(const Call& call);
template <class T>
void routed_matmul(const Call& call);  // CUDA alone
template <class T>
void routed_gate(const Call& call);  // CUDA alone
template <class T>
void router(const Call& call);
template <class T>
void forecast_add(const Call& call);
template <class T>
void ragged_places(const Call& call);  // CUDA alone
template <class T>
void routed_attention(const Call& call, const Attributes& attributes);

}  // namespace irc
