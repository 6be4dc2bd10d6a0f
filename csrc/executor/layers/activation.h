// Elementwise layers: y = f(z). They run in place; `first` and `second` keep f'(z) and f''(z) for
// the passes that follow. ReLU keeps neither: its derivative is read off its output.
#pragma once

#include "../../program.h"
#include "../math.h"
#include "../vec.h"

namespace fastmeta {
namespace FASTMETA_ISA_NAME {

constexpr bool is_smooth(Op op) {
  return op != Op::linear && op != Op::batch_norm && op != Op::relu && op != Op::leaky_relu;
}

template <class R>
struct Derivatives {
  V<R> value, first, second;
};

template <class R>
FASTMETA_INLINE Derivatives<R> tanh_like(V<R> t) {
  const V<R> first = R(1) - t * t;
  return {t, first, R(-2) * t * first};
}

template <class R>
FASTMETA_INLINE V<R> sigmoid(V<R> z) {
  return R(1) / (R(1) + Math<R>::exp(-z));
}

template <class R, Op op>
FASTMETA_INLINE Derivatives<R> derivatives(V<R> z, R constant) {
  if constexpr (op == Op::tanh) {
    return tanh_like<R>(Math<R>::tanh(z));
  } else if constexpr (op == Op::sigmoid) {
    const V<R> s = sigmoid<R>(z), first = s * (R(1) - s);
    return {s, first, first * (R(1) - R(2) * s)};
  } else if constexpr (op == Op::silu) {
    const V<R> s = sigmoid<R>(z), slope = s * (R(1) - s);
    return {z * s, s + z * slope, slope * (R(2) + z * (R(1) - R(2) * s))};
  } else if constexpr (op == Op::gelu) {
    const V<R> cdf = R(0.5) * (R(1) + Math<R>::erf(z * R(0.70710678118654752440)));
    const V<R> pdf = R(0.39894228040143267794) * Math<R>::exp(R(-0.5) * z * z);
    return {z * cdf, cdf + z * pdf, pdf * (R(2) - z * z)};
  } else if constexpr (op == Op::gelu_tanh) {
    const R root = R(0.79788456080286535588), cubic = R(0.044715);
    const Derivatives<R> t = tanh_like<R>(Math<R>::tanh(root * (z + cubic * z * z * z)));
    const V<R> u1 = root * (R(1) + R(3) * cubic * z * z), u2 = R(6) * root * cubic * z;
    const V<R> half = R(0.5) * z;
    return {half * (R(1) + t.value), R(0.5) * (R(1) + t.value) + half * t.first * u1,
            t.first * u1 + half * (t.first * u2 + t.second * u1 * u1)};
  } else {
    static_assert(op == Op::elu);
    const V<R> m = constant * Math<R>::expm1(z < R(0) ? z : V<R>{});
    return {z < R(0) ? m : z, z > R(0) ? splat(R(1)) : m + constant,
            z > R(0) ? V<R>{} : m + constant};
  }
}

template <class R>
struct ActivationArgs {
  R* value;   // z on entry, y on return
  R* first;   // f'(z)
  R* second;  // f''(z)
  long size;
  R constant;
};

template <class R, Op op>
void smooth_forward(const ActivationArgs<R>& args) {
  for (long i = 0; i < args.size; i += Vec<R>::width) {
    const Derivatives<R> d = derivatives<R, op>(load(args.value + i), args.constant);
    store(args.value + i, d.value);
    store(args.first + i, d.first);
    store(args.second + i, d.second);
  }
}

// slope * x, where ReLU's slope of zero makes zero of everything, infinity and NaN included.
template <class R>
FASTMETA_INLINE V<R> sloped(R slope, V<R> x) {
  return slope == R(0) ? V<R>{} : slope * x;
}

template <class R>
void leaky_forward(R* value, long size, R slope) {
  for (long i = 0; i < size; i += Vec<R>::width) {
    const V<R> z = load(value + i);
    store(value + i, z < R(0) ? sloped<R>(slope, z) : z);
  }
}

template <class R>
void activation_forward(Op op, const ActivationArgs<R>& args) {
  switch (op) {
    case Op::relu: leaky_forward<R>(args.value, args.size, R(0)); break;
    case Op::leaky_relu: leaky_forward<R>(args.value, args.size, args.constant); break;
    case Op::tanh: smooth_forward<R, Op::tanh>(args); break;
    case Op::sigmoid: smooth_forward<R, Op::sigmoid>(args); break;
    case Op::gelu: smooth_forward<R, Op::gelu>(args); break;
    case Op::gelu_tanh: smooth_forward<R, Op::gelu_tanh>(args); break;
    case Op::silu: smooth_forward<R, Op::silu>(args); break;
    case Op::elu: smooth_forward<R, Op::elu>(args); break;
    case Op::linear:
    case Op::batch_norm: break;
  }
}

// d = slope(y) * d in place, for the piecewise linear layers: the VJP, and both R-rules. As in
// torch, a NaN in y lets d through.
template <class R>
void leaky_gate(const R* y, R* d, long size, R slope) {
  for (long i = 0; i < size; i += Vec<R>::width) {
    const V<R> x = load(d + i);
    store(d + i, load(y + i) <= R(0) ? sloped<R>(slope, x) : x);
  }
}

// out = f' * d: the VJP (dz = f' dy) and the R-forward rule (ry = f' rz).
template <class R>
void smooth_scale(const R* first, const R* d, R* out, long size) {
  for (long i = 0; i < size; i += Vec<R>::width) store(out + i, load(first + i) * load(d + i));
}

// rdz = f' rdy + f'' rz dy; either of rdy and rz may be null (zero).
template <class R>
void smooth_r_vjp(const R* first, const R* second, const R* rz, const R* dy, const R* rdy, R* out,
                  long size) {
  for (long i = 0; i < size; i += Vec<R>::width) {
    V<R> sum = V<R>{};
    if (rdy != nullptr) sum += load(first + i) * load(rdy + i);
    if (rz != nullptr) sum += load(second + i) * load(rz + i) * load(dy + i);
    store(out + i, sum);
  }
}

}  // namespace FASTMETA_ISA_NAME
}  // namespace fastmeta
