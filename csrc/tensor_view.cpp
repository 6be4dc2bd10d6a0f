#include "tensor_view.h"

namespace py = pybind11;

namespace fastmeta {
namespace {

constexpr std::int32_t kCpu = 1;

struct Header {
  std::uint32_t major;
  std::uint32_t minor;
  Header* previous;
};

struct ExchangeApi {
  Header header;
  void* allocate;
  void* from_object;
  void* to_object;
  int (*read)(void* object, DLTensor* out);
  void* stream;
};

bool contiguous(const DLTensor& tensor) {
  if (tensor.strides == nullptr) return true;
  std::int64_t stride = 1;
  for (int axis = tensor.ndim - 1; axis >= 0; axis--) {
    if (tensor.shape[axis] != 1 && tensor.strides[axis] != stride) return false;
    stride *= tensor.shape[axis];
  }
  return true;
}

}  // namespace

TensorReader::TensorReader(py::handle tensor_type) {
  const char* attribute = "__dlpack_c_exchange_api__";
  if (!py::hasattr(tensor_type, attribute)) return;
  const py::object capsule = tensor_type.attr(attribute);
  Header* header = static_cast<Header*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (header == nullptr) throw py::error_already_set();
  while (header != nullptr && header->major != 1) header = header->previous;
  if (header != nullptr) read_ = reinterpret_cast<ExchangeApi*>(header)->read;
}

DLTensor TensorReader::operator()(py::handle tensor) const {
  DLTensor found{};
  if (read_(tensor.ptr(), &found) != 0) throw py::error_already_set();
  return found;
}

Layout::Layout(const DLTensor& tensor)
    : shape(tensor.shape, tensor.shape + tensor.ndim),
      code(tensor.dtype.code),
      bits(tensor.dtype.bits) {
  if (!fits(tensor)) throw py::value_error("a tensor of a door must be contiguous and on the CPU");
}

bool Layout::fits(const DLTensor& tensor) const {
  if (tensor.device.type != kCpu || tensor.dtype.code != code || tensor.dtype.bits != bits ||
      tensor.ndim != static_cast<int>(shape.size()))
    return false;
  for (int axis = 0; axis < tensor.ndim; axis++)
    if (tensor.shape[axis] != shape[axis]) return false;
  return contiguous(tensor);
}

}  // namespace fastmeta
