// Plain descriptions that the runtime hands to the executors. Every instruction set's translation
// unit includes this file, so it holds no code and nothing from the standard library.
//
// Shape letters: T tasks, S support rows, Q query rows, L layers, I inner steps.
#pragma once

namespace fastmeta {

enum class Op : int {
  linear,
  batch_norm,
  relu,
  leaky_relu,
  tanh,
  sigmoid,
  gelu,
  gelu_tanh,
  silu,
  elu,
};

struct Layer {
  Op op;
  int in;           // columns of the input
  int out;          // columns of the output
  int weight;       // index of a parameter, or -1
  int bias;         // index of a parameter, or -1
  double constant;  // negative slope, alpha, or eps
};

// A parameter in PyTorch's layout: a matrix [rows, cols], or a vector [cols] with rows == 1.
struct Param {
  int rows;
  int cols;
  bool matrix;
  bool adapts;
  bool per_task;           // the tensor has a leading task axis
  bool rate_per_step;      // the rate has a leading step axis
  bool rate_per_element;   // the rate has the parameter's shape; otherwise one number
  bool rate_gradient;      // the rate is a meta-parameter
  int rate_owner;          // the parameter of the same rate that collects its gradient; -1: itself
};

enum class LossKind : int { mse, cross_entropy };

// L = factor / divisor * sum_n w_n l_n; the divisor is the sum of the weights, or one.
struct Loss {
  LossKind kind;
  bool mean_over_rows;
  double factor;
};

struct Plan {
  const Layer* layers;
  int layer_count;
  const Param* params;
  int param_count;
  Loss loss;
  int features;      // columns of x
  int outputs;       // columns of the program's output
  int support_rows;  // S
  int query_rows;    // Q; 0 where there is no query (adaptation alone)
  int steps;         // I
  bool second_order;
  bool reverse;  // a gradient is wanted, not only the adapted parameters
};

// Pointers of one call. Null where an optional tensor is absent.
struct Call {
  int tasks;
  const void* const* params;  // [param_count]
  const void* const* rates;   // [param_count]; null for a parameter that does not adapt
  const void* support_x;      // [T, S, features]
  const void* support_y;      // [T, S, outputs], or int64 [T, S]
  const void* support_weight; // [T, S]
  const void* query_x;
  const void* query_y;
  const void* query_weight;
  const void* const* cotangents;  // [param_count], each [T, ...]: the adjoint at theta_I instead of a query
  void* const* grads;             // [param_count]
  void* const* rate_grads;        // [param_count]; null where not wanted
  void* const* adapted;           // [param_count], each [T, ...]
  void* losses;                   // [T]
  void* support_losses;           // [T, I]
  void* accuracies;               // [T]
  double scale;                   // of every gradient: 1 for a sum, 1/T for a mean
};

// What one instruction set offers for one real type. A workspace belongs to one thread; the
// shared area is written once a call and read by all threads.
struct Kernels {
  long (*workspace_bytes)(const Plan&);
  void (*workspace_init)(const Plan&, void* memory);
  long (*shared_bytes)(const Plan&);
  void (*pack_shared)(const Plan&, const Call&, void* shared);
  long (*gradient_size)(const Plan&);  // elements of one leaf's gradient
  void (*run_leaf)(const Plan&, const Call&, const void* shared, void* workspace, int first,
                   int last, void* gradient);
  void (*add)(void* into, const void* other, long size);
  void (*unpack)(const Plan&, const Call&, const void* gradient);
  long (*fma_burst)(long iterations);  // for measuring the peak; returns its operations
};

}  // namespace fastmeta
