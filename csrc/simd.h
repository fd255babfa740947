// Vectors of the instruction set that the including file is compiled for, and the storage types.
//
// GCC's and Clang's vector extensions carry the arithmetic; intrinsics appear only where those have
// no word for an instruction. Everything lives in a namespace of the instruction set, so that the
// copies of one header that are linked into one library never meet.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace prefixattn::PREFIXATTN_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T>
inline Vector<T> load(const T* from) {
  Vector<T> vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class T>
inline void store(T* to, Vector<T> vector) {
  std::memcpy(to, &vector, sizeof vector);
}

template <class T>
inline Vector<T> broadcast(T x) {
  return x - Vector<T>{};
}

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// The integers that a comparison of Vector<T> gives: all bits set where it holds.
template <class T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = int32_t;
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
};
template <class T>
using Integer = typename IntegerOf<T>::type;

// a * b + c, rounded once where the instruction set can. The compiler is told to fuse nothing by
// itself: it would do so in one copy of a formula and not in another, and two passes over the same
// keys would disagree about a score.
inline Vector<float> fused(Vector<float> a, Vector<float> b, Vector<float> c) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vector<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vector<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
inline Vector<double> fused(Vector<double> a, Vector<double> b, Vector<double> c) {
#if defined(__AVX512F__)
  return (Vector<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (Vector<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  return (Vector<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

// NaN in `a` is kept, as it must reach the output.
template <class T>
inline Vector<T> maximum(Vector<T> a, Vector<T> b) {
  return b > a ? b : a;
}

// What tensors hold. Float16 and Bfloat16 are storage: arithmetic is done in float.
struct Float16 {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(Bfloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }

// The exponent of a half is moved into a float's by a product with 2^112, exact for subnormals too;
// infinities and NaN get the float's own exponent.
inline float widen(Float16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  float value = bits_as<float>(magnitude) * 0x1p112f;
  if ((x.bits & 0x7c00) == 0x7c00) value = bits_as<float>(magnitude | 0x7f800000);
  return (x.bits & 0x8000) ? -value : value;
}

template <class T, class Wide>
T narrow(Wide x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline double narrow<double>(double x) {
  return x;
}
// Rounds to nearest, ties to even.
template <>
inline Bfloat16 narrow<Bfloat16>(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if (x != x) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
// Normal halves round in the integer; below 2^-14 adding 0.5 lets the float's own adder round.
template <>
inline Float16 narrow<Float16>(float x) {
  const uint32_t bits = bits_as<uint32_t>(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (size >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
  if (size < 0x38800000) {
    const float shifted = bits_as<float>(size) + 0.5f;
    return {uint16_t(sign | (bits_as<uint32_t>(shifted) - bits_as<uint32_t>(0.5f)))};
  }
  return {uint16_t(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13))};
}

// `kLanes<float>` numbers of memory as floats (doubles for double).
inline Vector<float> widen_vector(const float* from) { return load(from); }
inline Vector<double> widen_vector(const double* from) { return load(from); }

typedef uint16_t Shorts __attribute__((vector_size(kVectorBytes / 2)));

inline Vector<float> widen_vector(const Bfloat16* from) {
  Shorts shorts;
  std::memcpy(&shorts, from, sizeof shorts);
  return bits_as<Vector<float>>(__builtin_convertvector(shorts, Vector<uint32_t>) << 16);
}

inline Vector<float> widen_vector(const Float16* from) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__F16C__)
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#elif defined(__aarch64__)
  float16x4_t halves;
  std::memcpy(&halves, from, sizeof halves);
  return (Vector<float>)vcvt_f32_f16(halves);
#else
  Vector<float> wide;
  for (int lane = 0; lane < kLanes<float>; ++lane) wide[lane] = widen(from[lane]);
  return wide;
#endif
}

inline void narrow_vector(float* to, Vector<float> vector) { store(to, vector); }
inline void narrow_vector(double* to, Vector<double> vector) { store(to, vector); }

inline void narrow_vector(Bfloat16* to, Vector<float> vector) {
  const auto bits = bits_as<Vector<uint32_t>>(vector);
  const auto rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const auto nan = bits >> 16 | 0x40;
  const auto shorts = __builtin_convertvector(vector != vector ? nan : rounded, Shorts);
  std::memcpy(to, &shorts, sizeof shorts);
}

inline void narrow_vector(Float16* to, Vector<float> vector) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)vector, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)vector, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  const float16x4_t halves = vcvt_f16_f32((float32x4_t)vector);
  std::memcpy(to, &halves, sizeof halves);
#else
  for (int lane = 0; lane < kLanes<float>; ++lane) to[lane] = narrow<Float16>(vector[lane]);
#endif
}

// Lanes of two vectors in turn: the first halves, or the second ones.
template <bool second, class T, int... lane>
inline Vector<T> interleaved(Vector<T> a, Vector<T> b, std::integer_sequence<int, lane...>) {
  constexpr int start = second ? kLanes<T> / 2 : 0;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (start + lane / 2 + (lane % 2) * kLanes<T>)...);
#else
  return __builtin_shuffle(a, b, Vector<T>{T(start + lane / 2 + (lane % 2) * kLanes<T>)...});
#endif
}

// Transposes a square of vectors of integers, by interleaving far rows log2(lanes) times.
template <class T>
inline void transpose(Vector<T> (&square)[kLanes<T>]) {
  constexpr int lanes = kLanes<T>;
  constexpr auto sequence = std::make_integer_sequence<int, lanes>{};
  for (int distance = 1; distance < lanes; distance *= 2) {
    Vector<T> next[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes / 2; ++i) {
      next[2 * i] = interleaved<false, T>(square[i], square[i + lanes / 2], sequence);
      next[2 * i + 1] = interleaved<true, T>(square[i], square[i + lanes / 2], sequence);
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) square[i] = next[i];
  }
}

}  // namespace prefixattn::PREFIXATTN_ISA
