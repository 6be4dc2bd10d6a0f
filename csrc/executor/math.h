// exp, tanh and erf over vectors: polynomials in float32, the C library lane by lane in float64
// (the conformance oracle, which is not tuned). NaN stays NaN.
#pragma once

#include "vec.h"

namespace fastmeta {
namespace FASTMETA_ISA_NAME {

template <class R>
struct Math;

template <>
struct Math<double> {
  typedef V<double> T;

  static FASTMETA_INLINE T exp(T x) {
    for (int i = 0; i < Vec<double>::width; i++) x[i] = __builtin_exp(x[i]);
    return x;
  }
  static FASTMETA_INLINE T expm1(T x) {
    for (int i = 0; i < Vec<double>::width; i++) x[i] = __builtin_expm1(x[i]);
    return x;
  }
  static FASTMETA_INLINE T tanh(T x) {
    for (int i = 0; i < Vec<double>::width; i++) x[i] = __builtin_tanh(x[i]);
    return x;
  }
  static FASTMETA_INLINE T erf(T x) {
    for (int i = 0; i < Vec<double>::width; i++) x[i] = __builtin_erf(x[i]);
    return x;
  }
  static FASTMETA_INLINE double log(double x) { return __builtin_log(x); }
  static FASTMETA_INLINE double sqrt(double x) { return __builtin_sqrt(x); }
};

template <>
struct Math<float> {
  typedef V<float> T;
  typedef Lanes<float>::type I;

  static FASTMETA_INLINE T clamp(T x, float low, float high) {
    x = x < low ? splat(low) : x;
    return x > high ? splat(high) : x;
  }

  // exp(x) = 2^n exp(r), |r| <= log(2) / 2, with a polynomial for exp(r) - 1 - r. Returns 2^n and
  // exp(r) - 1.
  static FASTMETA_INLINE T reduced(T x, T* power) {
    const T magic = splat(12582912.0f);  // adding it rounds to an integer
    x = clamp(x, -87.3f, 88.3f);
    const T n = (x * 1.44269504088896341f + magic) - magic;
    T r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    T p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const I bits = (__builtin_convertvector(n, I) + 127) << 23;
    *power = (T)bits;
    return p * r * r + r;
  }

  static FASTMETA_INLINE T exp(T x) {
    T power;
    const T m = reduced(x, &power);
    return m * power + power;
  }

  static FASTMETA_INLINE T expm1(T x) {
    T power;
    const T m = reduced(x, &power);
    return m * power + (power - 1.0f);
  }

  // Exactly +-1 from `bound` on: 1 - t^2 must vanish there, however large what it multiplies is.
  static FASTMETA_INLINE T saturated(T x, float bound, T value) {
    value = x >= bound ? splat(1.0f) : value;
    return x <= -bound ? splat(-1.0f) : value;
  }

  // Rational minimax approximations in x^2 on the range where the function is not yet +-1.
  static FASTMETA_INLINE T tanh(T z) {
    const T x = clamp(z, -9.0f, 9.0f);
    const T y = x * x;
    T p = splat(-2.76076847742355e-16f);
    p = p * y + 2.00018790482477e-13f;
    p = p * y + -8.60467152213735e-11f;
    p = p * y + 5.12229709037114e-08f;
    p = p * y + 1.48572235717979e-05f;
    p = p * y + 6.37261928875436e-04f;
    p = p * y + 4.89352455891786e-03f;
    T q = splat(1.19825839466702e-06f);
    q = q * y + 1.18534705686654e-04f;
    q = q * y + 2.26843463243900e-03f;
    q = q * y + 4.89352518554385e-03f;
    return saturated(z, 9.0f, x * p / q);
  }

  static FASTMETA_INLINE T erf(T z) {
    const T x = clamp(z, -4.0f, 4.0f);
    const T y = x * x;
    T p = splat(-2.72614225801306e-10f);
    p = p * y + 2.77068142495902e-08f;
    p = p * y + -2.10102402082508e-06f;
    p = p * y + -5.69250639462346e-05f;
    p = p * y + -7.34990630326855e-04f;
    p = p * y + -2.95459980854025e-03f;
    p = p * y + -1.60960333262415e-02f;
    T q = splat(-1.45660718464996e-05f);
    q = q * y + -2.13374055278905e-04f;
    q = q * y + -1.68282697438203e-03f;
    q = q * y + -7.37332916720468e-03f;
    q = q * y + -1.42647390514189e-02f;
    return saturated(z, 4.0f, x * p / q);
  }

  static FASTMETA_INLINE float log(float x) { return __builtin_logf(x); }
  static FASTMETA_INLINE float sqrt(float x) { return __builtin_sqrtf(x); }
};

}  // namespace FASTMETA_ISA_NAME
}  // namespace fastmeta
