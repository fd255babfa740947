// exp and tanh of vectors, each with the largest error that its test finds over all floats.
#pragma once

#include "simd.h"

namespace prefixattn::PREFIXATTN_ISA {

// The polynomial in x with these coefficients, that of the highest power first (Horner's rule).
template <class... Rest>
inline Vector<float> polynomial(Vector<float> x, float highest, Rest... rest) {
  Vector<float> series = broadcast(highest);
  for (const float coefficient : {rest...}) series = fused(series, x, broadcast(coefficient));
  return series;
}

// 2^power e^x for x <= 88; under 1.25 units in the last place; 0 where floats turn subnormal, which
// is below -87.7 for a power of 0.
// x = n ln 2 + r with a whole n (Cody and Waite, 1980), e^x = 2^n e^r; the polynomial in r is a
// minimax fit of degree 6 over |r| <= ln 2 / 2 with its first two coefficients fixed at 1.
template <int power>
inline Vector<float> scaled_exp(Vector<float> x) {
  constexpr float kWhole = 0x1.8p23f;  // added and taken away, it rounds to a whole number
  constexpr float kLowest = float(-127 - power) * 0x1.62e430p-1f;
  x = x < kLowest ? broadcast(kLowest) : x;
  const Vector<float> shifted = fused(x, broadcast(0x1.715476p0f), broadcast(kWhole));
  const Vector<float> n = shifted - kWhole;
  const Vector<float> r = fused(n, broadcast(0x1.bd0106p-13f), fused(n, broadcast(-0x1.63p-1f), x));
  const Vector<float> series = polynomial(r, 0x1.6a2352p-10f, 0x1.123a6cp-7f, 0x1.5558f4p-5f,
                                          0x1.555490p-3f, 0x1.fffffcp-2f, 1.0f, 1.0f);
  const auto exponent =
      bits_as<Vector<int32_t>>(shifted) - bits_as<int32_t>(kWhole) + (127 + power);
  return series * bits_as<Vector<float>>(exponent << 23);
}

#if defined(__AVX512F__)
// 2^x; under 3.4e-6 of it; exactly 1 and 2 at 0 and 1. x = n + r with a whole n below it; the
// polynomial in r is a minimax fit of degree 4 with both ends fixed. `vreduceps` takes n away
// without a limit to x, and `vscalefps` multiplies by 2^n, to 0 and infinity where that is so.
inline Vector<float> exp2(Vector<float> x) {
  const Vector<float> r = (Vector<float>)_mm512_reduce_ps((__m512)x, 9);
  const Vector<float> series =
      polynomial(r, 0x1.bc3424p-7f, 0x1.aa3f0ep-5f, 0x1.ee587ep-3f, 0x1.62d51ep-1f, 1.0f);
  return (Vector<float>)_mm512_scalef_ps((__m512)series, (__m512)x);
}
#endif

template <int power>
inline Vector<double> scaled_exp(Vector<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::ldexp(std::exp(x[lane]), power);
  return x;
}

inline Vector<float> exp(Vector<float> x) { return scaled_exp<0>(x); }
inline Vector<double> exp(Vector<double> x) { return scaled_exp<0>(x); }

// e^x times 2^power as what is stored as T wants it. Weights that are rounded to 16 bits, by some
// 2^-9 or 2^-12, need not be exact to the last place: with AVX-512 half the instructions do.
template <class T, int power>
inline Vector<float> exp_for(Vector<float> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2)
    return exp2(fused(x, broadcast(0x1.715476p0f), broadcast(float(power))));
#endif
  return scaled_exp<power>(x);
}
template <class T, int power>
inline Vector<double> exp_for(Vector<double> x) {
  return scaled_exp<power>(x);
}

// tanh x, under 1.5 units in the last place: a minimax polynomial near 0, 1 - 2 / (e^2x + 1)
// beyond.
inline Vector<float> tanh(Vector<float> x) {
  const Vector<float> size = x < 0.0f ? -x : x;
  const Vector<float> square = x * x;
  const Vector<float> series = polynomial(square, -0x1.75e05ap-8f, 0x1.52264cp-6f, -0x1.b83c4ep-5f,
                                          0x1.110726p-3f, -0x1.555532p-2f);
  const Vector<float> near = fused(x * square, series, x);
  const Vector<float> far =
      1.0f - 2.0f / (exp(size > 10.0f ? broadcast(20.0f) : size + size) + 1.0f);
  return size < 0.625f ? near : x < 0.0f ? -far : far;
}

inline Vector<double> tanh(Vector<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::tanh(x[lane]);
  return x;
}

// tanh x as what is stored as T wants it: for 16 bits within 7e-6 of itself. Near 0 its series,
// where the way over e^x would leave an error that a large soft cap multiplies.
template <class T>
inline Vector<float> tanh_for(Vector<float> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {
    const Vector<float> more = exp2(x * 0x1.715476p1f) + 1.0f;  // infinity for a large x
    const Vector<float> rough = (Vector<float>)_mm512_rcp14_ps((__m512)more);
    // One step of Newton's for the inverse, which would make 0 times infinity of a whole 0.
    const Vector<float> inverse = rough * fused(-more, rough, broadcast(2.0f));
    const Vector<float> far =
        fused(rough == 0.0f ? rough : inverse, broadcast(-2.0f), broadcast(1.0f));
    const Vector<float> square = x * x;
    const Vector<float> series = polynomial(square, -17.0f / 315, 2.0f / 15, -1.0f / 3);
    return square < 0.09f ? fused(x * square, series, x) : far;
  }
#endif
  return tanh(x);
}
template <class T>
inline Vector<double> tanh_for(Vector<double> x) {
  return tanh(x);
}

}  // namespace prefixattn::PREFIXATTN_ISA
