// A call that was checked once and is only compared from then on. It lives here because comparing
// costs more in Python than the kernel of a small batch: some sixty attribute reads a call.
// Tensors are reached through their Python attributes, so nothing of torch is compiled in.
#include "door.h"

#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "runtime.h"

namespace py = pybind11;

namespace fastmeta {
namespace {

// Names that are looked up at every call, interned once for the life of the process.
struct Names {
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* is_contiguous = PyUnicode_InternFromString("is_contiguous");
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* version = PyUnicode_InternFromString("_version");
  PyObject* training = PyUnicode_InternFromString("training");
};

const Names& names() {
  static const Names interned;
  return interned;
}

py::object checked(PyObject* made) {
  if (made == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

py::object get(py::handle object, PyObject* name) {
  return checked(PyObject_GetAttr(object.ptr(), name));
}

void* address(py::handle tensor) {
  const py::object found = checked(PyObject_CallMethodNoArgs(tensor.ptr(), names().data_ptr));
  void* at = PyLong_AsVoidPtr(found.ptr());
  if (at == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return at;
}

struct Size {
  py::object shape;
  py::object dtype;
};

struct Place {
  py::dict owner;  // a module's parameters
  py::object key;
  py::object param;
  bool requires_grad;
  void* at;
};

struct Mode {
  py::dict state;  // a module's __dict__
  py::object training;
};

struct Children {
  py::dict modules;
  std::vector<py::object> known;
};

class Door {
 public:
  Door(py::object executor, int tasks, double scale, const py::object& tensor_type,
       const std::vector<std::pair<py::object, py::object>>& sizes,
       const std::vector<std::tuple<py::dict, py::object, py::object, bool>>& places,
       const std::vector<std::pair<py::dict, py::object>>& modes,
       const std::vector<std::pair<py::dict, std::vector<py::object>>>& children,
       const std::vector<std::uintptr_t>& rates, const std::vector<long>& numels, int element,
       bool classifies, py::object allocate, py::object thread_count)
      : keep_(std::move(executor)),
        executor_(keep_.cast<Executor&>()),
        tasks_(tasks),
        scale_(scale),
        tensor_type_(tensor_type),
        element_(element),
        classifies_(classifies),
        allocate_(std::move(allocate)),
        thread_count_(std::move(thread_count)) {
    for (const auto& [shape, dtype] : sizes) sizes_.push_back({shape, dtype});
    for (const auto& [owner, key, param, requires_grad] : places) {
      places_.push_back({owner, key, param, requires_grad, address(param)});
      params_.push_back(places_.back().at);
    }
    for (const auto& [state, training] : modes) modes_.push_back({state, training});
    for (const auto& [modules, known] : children) children_.push_back({modules, known});
    for (std::uintptr_t rate : rates) rates_.push_back(reinterpret_cast<void*>(rate));
    long at = 0;
    for (long numel : numels) {
      offsets_.push_back(at);
      at += numel;
    }
    total_ = at;
  }

  // (block, versions) after the call, or None if anything is not as it was. The block holds the
  // gradients one after the other, then losses [T], support losses [T, I] and, where labels are
  // classes, accuracies [T].
  py::object call(py::handle xs, py::handle ys, py::handle xq, py::handle yq) {
    const py::handle rows[4] = {xs, ys, xq, yq};
    if (!fits(rows)) return py::none();
    const long steps = executor_.plan().steps;
    const long size = total_ + tasks_ * (1 + steps + (classifies_ ? 1 : 0));
    const py::object flat = allocate_(size);
    char* base = static_cast<char*>(address(flat));
    std::vector<void*> grads;
    grads.reserve(offsets_.size());
    for (long offset : offsets_) grads.push_back(base + offset * element_);
    const std::vector<void*> none(offsets_.size(), nullptr);
    Call call{};
    call.tasks = tasks_;
    call.params = params_.data();
    call.rates = rates_.data();
    call.grads = grads.data();
    call.rate_grads = none.data();
    call.support_x = address(xs);
    call.support_y = address(ys);
    call.query_x = address(xq);
    call.query_y = address(yq);
    call.losses = base + total_ * element_;
    call.support_losses = base + (total_ + tasks_) * element_;
    if (classifies_) call.accuracies = base + (total_ + tasks_ * (1 + steps)) * element_;
    call.scale = scale_;
    const py::object threads = checked(PyObject_CallNoArgs(thread_count_.ptr()));
    const int count = static_cast<int>(PyLong_AsLong(threads.ptr()));
    py::tuple versions(places_.size() + 2);
    for (std::size_t i = 0; i < places_.size(); i++)
      versions[i] = get(places_[i].param, names().version);
    versions[places_.size()] = get(xs, names().version);
    versions[places_.size() + 1] = get(ys, names().version);
    {
      py::gil_scoped_release release;
      executor_.run(call, count);
    }
    return py::make_tuple(flat, versions);
  }

 private:
  bool fits(const py::handle* rows) const {
    for (int i = 0; i < 4; i++) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(rows[i].ptr())) != tensor_type_.ptr()) return false;
      if (!get(rows[i], names().dtype).is(sizes_[i].dtype)) return false;
      if (!get(rows[i], names().is_cpu).is(py::handle(Py_True))) return false;
      const int same =
          PyObject_RichCompareBool(get(rows[i], names().shape).ptr(), sizes_[i].shape.ptr(), Py_EQ);
      if (same < 0) throw py::error_already_set();
      if (same == 0) return false;
      const py::object contiguous =
          checked(PyObject_CallMethodNoArgs(rows[i].ptr(), names().is_contiguous));
      if (!contiguous.is(py::handle(Py_True))) return false;
    }
    for (const Mode& mode : modes_)
      if (PyDict_GetItem(mode.state.ptr(), names().training) != mode.training.ptr()) return false;
    for (const Children& children : children_) {
      if (PyDict_Size(children.modules.ptr()) != static_cast<Py_ssize_t>(children.known.size()))
        return false;
      PyObject *key = nullptr, *value = nullptr;
      Py_ssize_t at = 0;
      for (std::size_t i = 0; PyDict_Next(children.modules.ptr(), &at, &key, &value); i++)
        if (value != children.known[i].ptr()) return false;
    }
    for (const Place& place : places_) {
      if (PyDict_GetItem(place.owner.ptr(), place.key.ptr()) != place.param.ptr()) return false;
      const PyObject* wanted = place.requires_grad ? Py_True : Py_False;
      if (get(place.param, names().requires_grad).ptr() != wanted) return false;
      // A parameter of another shape or dtype (`.data = ...`, `.double()`) lies somewhere else.
      if (address(place.param) != place.at) return false;
    }
    return true;
  }

  py::object keep_;
  Executor& executor_;
  const int tasks_;
  const double scale_;
  py::object tensor_type_;
  std::vector<Size> sizes_;
  std::vector<Place> places_;
  std::vector<Mode> modes_;
  std::vector<Children> children_;
  std::vector<void*> params_, rates_;
  std::vector<long> offsets_;
  long total_ = 0;
  const int element_;
  const bool classifies_;
  py::object allocate_, thread_count_;
};

}  // namespace

void bind_door(py::module_& m) {
  py::class_<Door>(m, "Door")
      .def(py::init<py::object, int, double, const py::object&,
                    const std::vector<std::pair<py::object, py::object>>&,
                    const std::vector<std::tuple<py::dict, py::object, py::object, bool>>&,
                    const std::vector<std::pair<py::dict, py::object>>&,
                    const std::vector<std::pair<py::dict, std::vector<py::object>>>&,
                    const std::vector<std::uintptr_t>&, const std::vector<long>&, int, bool,
                    py::object, py::object>(),
           py::kw_only(), py::arg("executor"), py::arg("tasks"), py::arg("scale"),
           py::arg("tensor_type"), py::arg("sizes"), py::arg("places"), py::arg("modes"),
           py::arg("children"), py::arg("rates"), py::arg("numels"), py::arg("element"),
           py::arg("classifies"), py::arg("allocate"), py::arg("thread_count"))
      .def("call", &Door::call);
}

}  // namespace fastmeta
