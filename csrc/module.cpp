// Python bindings. Tensors arrive as addresses; shapes, dtypes and lifetimes are checked by the
// caller (fastmeta/ops), labels here, because only a pass over the data can.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "door.h"
#include "ops/gather_rows.h"
#include "runtime.h"

namespace py = pybind11;

namespace fastmeta {
namespace {

// The order is that of `Op`.
const std::vector<std::string> kOps = {"linear",  "batch_norm", "relu", "leaky_relu", "tanh",
                                       "sigmoid", "gelu",       "gelu_tanh", "silu",  "elu"};

Op op_of(const std::string& name) {
  for (std::size_t i = 0; i < kOps.size(); i++)
    if (kOps[i] == name) return static_cast<Op>(i);
  throw py::value_error("no layer named '" + name + "' is compiled in");
}

using LayerTuple = std::tuple<std::string, int, int, int, int, double>;
// rows, cols, matrix, adapts, per_task, rate_per_step, rate_per_element, rate_gradient,
// rate_owner
using ParamTuple = std::tuple<int, int, bool, bool, bool, bool, bool, bool, int>;

std::unique_ptr<Executor> make_executor(const std::vector<LayerTuple>& layers,
                                        const std::vector<ParamTuple>& params,
                                        const std::string& loss, bool mean_over_rows,
                                        double factor, int support_rows, int query_rows,
                                        int steps, bool second_order, bool reverse,
                                        bool is_double, const std::string& isa) {
  std::vector<Layer> made_layers;
  for (const auto& [op, in, out, weight, bias, constant] : layers)
    made_layers.push_back({op_of(op), in, out, weight, bias, constant});
  std::vector<Param> made_params;
  for (const auto& [rows, cols, matrix, adapts, per_task, per_step, per_element, gradient, owner] :
       params)
    made_params.push_back(
        {rows, cols, matrix, adapts, per_task, per_step, per_element, gradient, owner});
  if (made_layers.empty()) throw py::value_error("a program must have at least one layer");
  Plan plan{};
  plan.loss = {loss == "mse" ? LossKind::mse : LossKind::cross_entropy, mean_over_rows, factor};
  plan.features = made_layers.front().in;
  plan.outputs = made_layers.back().out;
  plan.support_rows = support_rows;
  plan.query_rows = query_rows;
  plan.steps = steps;
  plan.second_order = second_order;
  plan.reverse = reverse;
  return std::make_unique<Executor>(std::move(made_layers), std::move(made_params), plan, is_double,
                                    isa_of(isa));
}

// The addresses of one call, in the order of `Call`: params, rates, cotangents, grads, rate_grads,
// adapted [param_count each], then support x, y, weight, query x, y, weight, losses,
// support_losses, accuracies. Zero is absent.
void run(Executor& executor, int tasks, const py::tuple& addresses, double scale, int threads) {
  const std::size_t params = executor.plan().param_count;
  if (addresses.size() != 6 * params + 9) throw py::value_error("run: wrong number of addresses");
  std::vector<void*> at(addresses.size());
  for (std::size_t i = 0; i < at.size(); i++)
    at[i] = PyLong_AsVoidPtr(PyTuple_GET_ITEM(addresses.ptr(), static_cast<Py_ssize_t>(i)));
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  void** group = at.data();
  const auto next = [&] {
    void** now = group;
    group += params;
    return now;
  };
  const auto optional = [&](void** pointers) {
    for (std::size_t p = 0; p < params; p++)
      if (pointers[p] != nullptr) return pointers;
    return static_cast<void**>(nullptr);
  };
  Call call{};
  call.tasks = tasks;
  call.params = next();
  call.rates = next();
  call.cotangents = optional(next());
  call.grads = next();
  call.rate_grads = next();
  call.adapted = optional(next());
  call.support_x = group[0];
  call.support_y = group[1];
  call.support_weight = group[2];
  call.query_x = group[3];
  call.query_y = group[4];
  call.query_weight = group[5];
  call.losses = group[6];
  call.support_losses = group[7];
  call.accuracies = group[8];
  call.scale = scale;
  py::gil_scoped_release release;
  executor.run(call, threads);
}

}  // namespace
}  // namespace fastmeta

PYBIND11_MODULE(_core, m) {
  using namespace fastmeta;
  m.doc() = "The compiled executors of fastmeta. Private: use fastmeta.meta_grad.";
  m.attr("leaf_tasks") = kLeafTasks;
  m.def("isas", [] {
    std::vector<std::string> names;
    for (Isa isa : supported_isas()) names.push_back(isa_name(isa));
    return names;
  });
  m.def("fma_burst", [](const std::string& isa, bool is_double, long iterations) {
    py::gil_scoped_release release;
    return fma_burst(isa_of(isa), is_double, iterations);
  });
  m.def("set_work_per_thread", &set_work_per_thread);
  m.def("gather_rows", [](std::uintptr_t table, std::int64_t width, std::uintptr_t rows,
                          std::int64_t n, float divisor, std::uintptr_t out, int threads) {
    py::gil_scoped_release release;
    gather_rows(reinterpret_cast<const std::uint8_t*>(table), width,
                reinterpret_cast<const std::int64_t*>(rows), n, divisor,
                reinterpret_cast<float*>(out), threads);
  });
  py::class_<Executor>(m, "Executor")
      .def(py::init(&make_executor), py::kw_only(), py::arg("layers"), py::arg("params"),
           py::arg("loss"), py::arg("mean_over_rows"), py::arg("factor"), py::arg("support_rows"),
           py::arg("query_rows"), py::arg("steps"), py::arg("second_order"), py::arg("reverse"),
           py::arg("is_double"), py::arg("isa"))
      .def("run", &run)
      .def("workspace_bytes", &Executor::workspace_bytes)
      .def("gradient_bytes", &Executor::gradient_bytes)
      .def("leaves_in_flight", &Executor::leaves_in_flight);
  bind_door(m);
}
