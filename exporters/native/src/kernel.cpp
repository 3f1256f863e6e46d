// The boundary to ONNX Runtime: statuses become exceptions here, and exceptions become statuses in operators.cpp.

#include "kernel.h"

#include <algorithm>
#include <memory>
#include <thread>

namespace irc {

int64_t Shape::count() const { return size[0] * size[1] * size[2] * size[3]; }

std::string Shape::text() const {
  std::string text = "[";
  for (int axis = 0; axis < rank; ++axis) text += (axis ? ", " : "") + std::to_string(size[axis]);
  return text + "]";
}

void Call::check(OrtStatus* status) const {
  if (!status) return;
  const std::string message = GetErrorMessage::call(api_, status);
  ReleaseStatus::call(api_, status);
  throw Failure{kRuntimeException, std::string(name_) + ": " + message};
}

void Call::fail(const std::string& what) const { refuse(std::string(name_) + ": " + what); }

const void* Call::read(int index, int rank, Shape* shape) const {
  const OrtValue* value = nullptr;
  check(GetInput::call(api_, context_, size_t(index), &value));
  if (!value) fail("input " + std::to_string(index) + " is missing");
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(GetTensorTypeAndShape::call(api_, value, &info));
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> kept(
      info, reinterpret_cast<void (*)(OrtTensorTypeAndShapeInfo*)>(api_->slot[99]));
  size_t found = 0;
  check(GetDimensionsCount::call(api_, info, &found));
  if (int(found) != rank)
    fail("input " + std::to_string(index) + " has " + std::to_string(found) + " dimensions, expected " + std::to_string(rank));
  shape->rank = rank;
  check(GetDimensions::call(api_, info, shape->size, found));
  void* data = nullptr;
  check(GetTensorMutableData::call(api_, const_cast<OrtValue*>(value), &data));
  return data;
}

void* Call::write(int index, std::initializer_list<int64_t> shape) const {
  OrtValue* value = nullptr;
  check(GetOutput::call(api_, context_, size_t(index), shape.begin(), shape.size(), &value));
  void* data = nullptr;
  check(GetTensorMutableData::call(api_, value, &data));
  return data;
}

void* Call::stream() const {
  void* stream = nullptr;
  check(GetStream::call(api_, context_, &stream));
  return stream;
}

void* Call::resource(int number) const {
  constexpr int kResourceVersion = 3;
  void* found = nullptr;
  check(GetResource::call(api_, context_, kResourceVersion, number, &found));
  return found;
}

void Call::spread(int64_t count, void (*task)(void*, size_t), void* data) const {
  check(ParallelFor::call(api_, context_, task, size_t(count), 0, data));
}

Rows rows_of(const Call& call, int index, int64_t batch, int64_t tokens) {
  const auto input = call.input<int64_t>(index, 3);
  if (input.shape[0] != 1 || input.shape[2] != 2) call.fail("rows are " + input.shape.text() + ", expected [1, n, 2]");
  const Rows rows{input.data, input.shape[1]};
  int64_t before = -1;
  for (int64_t row = 0; row < rows.count; ++row) {
    const int64_t sequence = rows.sequence(row), token = rows.token(row);
    if (sequence < 0 || sequence >= batch || token < 0 || token >= tokens)
      call.fail("row (" + std::to_string(sequence) + ", " + std::to_string(token) + ") lies outside of [" +
                std::to_string(batch) + ", " + std::to_string(tokens) + "]");
    if (sequence * tokens + token <= before) call.fail("rows are not in order, or one comes twice");
    before = sequence * tokens + token;
  }
  return rows;
}

float* scratch(int64_t floats) {
  thread_local std::vector<float> memory;
  if (int64_t(memory.size()) < floats) memory.resize(size_t(floats));
  return memory.data();
}

int64_t thread_count() {
  static const int64_t count = std::max<int64_t>(1, std::thread::hardware_concurrency());
  return count;
}

}  // namespace irc
