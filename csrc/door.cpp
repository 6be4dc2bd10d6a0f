// A call that was checked once and is only compared from then on. It lives here because comparing
// costs more in Python than the kernel of a small batch.
#include "door.h"

#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "runtime.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace fastmeta {
namespace {

// Names that are looked up at every call, interned once for the life of the process.
struct Names {
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject* version = PyUnicode_InternFromString("_version");
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
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

struct Place {
  py::dict owner;  // a module's parameters
  py::object key;
  py::object param;
  bool requires_grad;
  void* at;
  Layout layout;
};

// A module's attributes, its mode among them, as they were: by identity.
struct Attributes {
  py::dict state;  // a module's __dict__
  std::vector<py::object> known;
};

// Submodules are held weakly: one may refer back to the module whose death closes the door.
struct Children {
  py::dict modules;
  std::vector<py::weakref> known;
};

template <class Known, class Same>
bool same_values(const py::dict& now, const std::vector<Known>& known, const Same& same) {
  if (PyDict_Size(now.ptr()) != static_cast<Py_ssize_t>(known.size())) return false;
  PyObject *key = nullptr, *value = nullptr;
  Py_ssize_t next = 0;
  for (std::size_t i = 0; PyDict_Next(now.ptr(), &next, &key, &value); i++)
    if (!same(value, known[i])) return false;
  return true;
}

class Door {
 public:
  Door(py::object executor, int tasks, double scale, const py::object& tensor_type,
       const std::vector<py::object>& rows,
       const std::vector<std::tuple<py::dict, py::object, py::object, bool>>& places,
       const std::vector<std::pair<py::dict, std::vector<py::object>>>& attributes,
       std::vector<py::dict> empty,
       const std::vector<std::pair<py::dict, std::vector<py::object>>>& children,
       const std::vector<std::uintptr_t>& rates, bool classifies, py::object block,
       py::object empty_like, py::object thread_count)
      : keep_(std::move(executor)),
        executor_(keep_.cast<Executor&>()),
        tasks_(tasks),
        scale_(scale),
        tensor_type_(tensor_type),
        read_(tensor_type),
        empty_(std::move(empty)),
        classifies_(classifies),
        block_(std::move(block)),
        empty_like_(std::move(empty_like)),
        thread_count_(std::move(thread_count)) {
    if (!read_.ok()) throw py::type_error("a door must have tensors that DLPack can exchange");
    for (const py::object& tensor : rows) rows_.emplace_back(read_(tensor));
    element_ = rows_.at(0).bits / 8;
    for (const auto& [owner, key, param, requires_grad] : places) {
      const DLTensor view = read_(param);
      places_.push_back({owner, key, param, requires_grad, address(view), Layout(view)});
      params_.push_back(address(view));
    }
    for (const auto& [state, known] : attributes) attributes_.push_back({state, known});
    for (const auto& [modules, known] : children) {
      children_.push_back({modules, {}});
      for (const py::object& child : known) children_.back().known.emplace_back(child);
    }
    for (std::uintptr_t rate : rates) rates_.push_back(reinterpret_cast<void*>(rate));
    none_.assign(params_.size(), nullptr);
    grads_.resize(params_.size());
  }

  // (gradients, block, versions) after the call, or None if anything is not as it was. The block
  // holds the losses [T], the support losses [T, I] and, where labels are classes, the accuracies
  // [T], one after the other.
  py::object call(py::handle xs, py::handle ys, py::handle xq, py::handle yq) {
    const py::handle rows[4] = {xs, ys, xq, yq};
    void* at[4];
    if (!fits(rows, at)) return py::none();
    const long steps = executor_.plan().steps;
    py::tuple grads(places_.size());
    for (std::size_t i = 0; i < places_.size(); i++) {
      const py::object grad = empty_like(places_[i].param);
      grads_[i] = address(read_(grad));
      grads[i] = grad;
    }
    const py::object block = empty_like(block_);
    char* base = static_cast<char*>(address(read_(block)));
    Call call{};
    call.tasks = tasks_;
    call.params = params_.data();
    call.rates = rates_.data();
    call.grads = grads_.data();
    call.rate_grads = none_.data();
    call.support_x = at[0];
    call.support_y = at[1];
    call.query_x = at[2];
    call.query_y = at[3];
    call.losses = base;
    call.support_losses = base + tasks_ * element_;
    if (classifies_) call.accuracies = base + tasks_ * (1 + steps) * element_;
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
    return py::make_tuple(grads, block, versions);
  }

 private:
  py::object empty_like(py::handle tensor) const {
    return checked(PyObject_CallOneArg(empty_like_.ptr(), tensor.ptr()));
  }

  bool fits(const py::handle* rows, void** at) const {
    for (int i = 0; i < 4; i++) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(rows[i].ptr())) != tensor_type_.ptr()) return false;
      const DLTensor view = read_(rows[i]);
      if (!rows_[i].fits(view)) return false;
      // DLPack does not tell a tensor whose sign is still to be turned
      const py::object negative = checked(PyObject_CallMethodNoArgs(rows[i].ptr(), names().is_neg));
      if (negative.ptr() != Py_False) return false;
      at[i] = address(view);
    }
    for (const py::dict& hooks : empty_)
      if (PyDict_Size(hooks.ptr()) != 0) return false;
    for (const Attributes& module : attributes_)
      if (!same_values(module.state, module.known, [](PyObject* value, const py::object& known) {
            return value == known.ptr();
          }))
        return false;
    for (const Children& module : children_)
      if (!same_values(module.modules, module.known, [](PyObject* value, const py::weakref& known) {
            return value == PyWeakref_GetObject(known.ptr());
          }))
        return false;
    for (const Place& place : places_) {
      if (PyDict_GetItem(place.owner.ptr(), place.key.ptr()) != place.param.ptr()) return false;
      const PyObject* wanted = place.requires_grad ? Py_True : Py_False;
      if (get(place.param, names().requires_grad).ptr() != wanted) return false;
      const DLTensor view = read_(place.param);
      if (address(view) != place.at || !place.layout.fits(view)) return false;
    }
    return true;
  }

  py::object keep_;
  Executor& executor_;
  const int tasks_;
  const double scale_;
  py::object tensor_type_;
  const TensorReader read_;
  const std::vector<py::dict> empty_;
  std::vector<Layout> rows_;
  std::vector<Place> places_;
  std::vector<Attributes> attributes_;
  std::vector<Children> children_;
  std::vector<void*> params_, rates_, grads_, none_;
  int element_ = 0;
  const bool classifies_;
  py::object block_, empty_like_, thread_count_;
};

}  // namespace

void bind_door(py::module_& m) {
  m.def("has_doors", [](py::handle tensor_type) { return TensorReader(tensor_type).ok(); });
  py::class_<Door>(m, "Door")
      .def(py::init<py::object, int, double, const py::object&, const std::vector<py::object>&,
                    const std::vector<std::tuple<py::dict, py::object, py::object, bool>>&,
                    const std::vector<std::pair<py::dict, std::vector<py::object>>>&,
                    std::vector<py::dict>,
                    const std::vector<std::pair<py::dict, std::vector<py::object>>>&,
                    const std::vector<std::uintptr_t>&, bool, py::object, py::object,
                    py::object>(),
           py::kw_only(), py::arg("executor"), py::arg("tasks"), py::arg("scale"),
           py::arg("tensor_type"), py::arg("rows"), py::arg("places"), py::arg("attributes"),
           py::arg("empty"),
           py::arg("children"), py::arg("rates"), py::arg("classifies"), py::arg("block"),
           py::arg("empty_like"), py::arg("thread_count"))
      .def("call", &Door::call);
}

}  // namespace fastmeta
