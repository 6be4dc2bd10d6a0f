// A tensor's address, shape and layout without torch's headers, by DLPack's C exchange interface
// (dlpack 1.3; torch 2.10 and later have it): some ten nanoseconds where Python attributes take
// several hundred. The structures below are that interface's.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace fastmeta {

struct DLTensor {
  void* data;
  struct {
    std::int32_t type;
    std::int32_t id;
  } device;
  std::int32_t ndim;
  struct {
    std::uint8_t code;
    std::uint8_t bits;
    std::uint16_t lanes;
  } dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

// Reads tensors of one type. `ok` is false where the type lacks the interface.
class TensorReader {
 public:
  explicit TensorReader(pybind11::handle tensor_type);

  bool ok() const { return read_ != nullptr; }
  // Throws what the framework raises.
  DLTensor operator()(pybind11::handle tensor) const;

 private:
  int (*read_)(void* object, DLTensor* out) = nullptr;
};

// What a tensor must be again: on the CPU, contiguous, of this shape and dtype.
struct Layout {
  explicit Layout(const DLTensor& tensor);
  bool fits(const DLTensor& tensor) const;

  std::vector<std::int64_t> shape;
  std::uint8_t code;
  std::uint8_t bits;
};

inline void* address(const DLTensor& tensor) {
  return static_cast<char*>(tensor.data) + tensor.byte_offset;
}

}  // namespace fastmeta
