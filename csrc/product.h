// The matrix product that everything here is made of: C += A B, with A broadcast number by number
// and a row of B in vectors.
//
// Attention has five products. With queries in the lanes of vectors (scores, and their gradients,
// as [key][query]; the output as [head dim][query]) none of them needs a sum across lanes.
#pragma once

#include "simd.h"

namespace prefixattn::PREFIXATTN_ISA {

// One step along the dimension that a product sums over: a number, or two bfloat16 whose products
// an instruction adds to a float.
struct Pair {
  uint32_t bits;
};

// How numbers that are stored as T are multiplied: in which units, and summed in what.
template <class T>
struct Arithmetic {
  using Unit = float;
  using Sum = float;
};
template <>
struct Arithmetic<double> {
  using Unit = double;
  using Sum = double;
};
#if defined(__AVX512BF16__)
template <>
struct Arithmetic<Bfloat16> {
  using Unit = Pair;
  using Sum = float;
};
#endif
template <class T>
using UnitOf = typename Arithmetic<T>::Unit;
template <class T>
using SumOf = typename Arithmetic<T>::Sum;

// How many numbers a unit holds, and how many units a sum over `numbers` takes.
template <class Unit>
constexpr int kPerUnit = std::is_same_v<Unit, Pair> ? 2 : 1;
template <class Unit>
constexpr int64_t units(int64_t numbers) {
  return (numbers + kPerUnit<Unit> - 1) / kPerUnit<Unit>;
}

inline Vector<float> multiply_add(Vector<float> sum, const float* a, const float* b) {
  return fused(broadcast(*a), load(b), sum);
}
inline Vector<double> multiply_add(Vector<double> sum, const double* a, const double* b) {
  return fused(broadcast(*a), load(b), sum);
}
#if defined(__AVX512BF16__)
inline Vector<float> multiply_add(Vector<float> sum, const Pair* a, const Pair* b) {
  return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(b),
                                         (__m512bh)_mm512_set1_epi32(int(a->bits)));
}
#endif

// The same lane by lane.
inline Vector<float> multiply_lanes(Vector<float> sum, const float* a, const float* b) {
  return fused(load(a), load(b), sum);
}
inline Vector<double> multiply_lanes(Vector<double> sum, const double* a, const double* b) {
  return fused(load(a), load(b), sum);
}
#if defined(__AVX512BF16__)
inline Vector<float> multiply_lanes(Vector<float> sum, const Pair* a, const Pair* b) {
  return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(b),
                                         (__m512bh)_mm512_loadu_si512(a));
}
#endif

// What C holds before a product is added to it.
enum class Start { zero, sum, scaled };

// Unit A[row][k] lies at data[row * row_stride + k * depth_stride].
template <class Unit>
struct Left {
  const Unit* data;
  int64_t row_stride, depth_stride;
};

// The block of C that stays in registers; as many as there are, less some for A and B.
constexpr int kPanelRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kPanelVectors = 4;
#else
constexpr int kPanelVectors = 2;
#endif

template <int rows, int vectors, class Sum, class Unit>
inline void panel(Sum* c, int64_t c_stride, Left<Unit> a, const Unit* b, int64_t b_stride,
                  int64_t depth, Start start, const Sum* factors) {
  Vector<Sum> sums[rows][vectors] = {};
  for (int64_t k = 0; k < depth; ++k)
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < vectors; ++j)
        sums[i][j] = multiply_add(sums[i][j], a.data + i * a.row_stride + k * a.depth_stride,
                                  b + k * b_stride + j * kLanes<Sum>);
  // C comes last: a product's small terms are summed before they meet what may be a large number.
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < vectors; ++j) {
      const int lane = j * kLanes<Sum>;
      Sum* const to = c + i * c_stride + lane;
      if (start == Start::sum) sums[i][j] += load(to);
      if (start == Start::scaled) sums[i][j] = fused(load(to), load(factors + lane), sums[i][j]);
      store(to, sums[i][j]);
    }
}

template <int vectors, class Sum, class Unit>
void panels(Sum* c, int64_t c_stride, Left<Unit> a, const Unit* b, int64_t b_stride, int64_t rows,
            int64_t depth, Start start, const Sum* factors) {
  const auto advance = [&](int64_t done) {
    rows -= done;
    c += done * c_stride;
    a.data += done * a.row_stride;
  };
  constexpr int most = kPanelRows * (vectors < kPanelVectors ? 2 : 1);
  while (rows >= most) {
    panel<most, vectors>(c, c_stride, a, b, b_stride, depth, start, factors);
    advance(most);
  }
  while (rows >= 4) {
    panel<4, vectors>(c, c_stride, a, b, b_stride, depth, start, factors);
    advance(4);
  }
  if (rows & 2) {
    panel<2, vectors>(c, c_stride, a, b, b_stride, depth, start, factors);
    advance(2);
  }
  if (rows & 1) panel<1, vectors>(c, c_stride, a, b, b_stride, depth, start, factors);
}

// C [rows][vectors * lanes] = start + A [rows][depth] B [depth][vectors * lanes]. With
// `Start::scaled` every column of C is first multiplied by its one of `factors`.
template <class Sum, class Unit>
void multiply(Sum* c, int64_t c_stride, Left<Unit> a, const Unit* b, int64_t b_stride, int64_t rows,
              int64_t vectors, int64_t depth, Start start, const Sum* factors = nullptr) {
  constexpr int lanes = kLanes<Sum>;
  for (int64_t j = 0; j < vectors;) {
    const int64_t left = vectors - j;
    if (kPanelVectors >= 4 && left >= 4) {
      panels<4>(c, c_stride, a, b, b_stride, rows, depth, start, factors);
      j += 4, c += 4 * lanes, b += 4 * lanes, factors += factors ? 4 * lanes : 0;
    } else if (left >= 2) {
      panels<2>(c, c_stride, a, b, b_stride, rows, depth, start, factors);
      j += 2, c += 2 * lanes, b += 2 * lanes, factors += factors ? 2 * lanes : 0;
    } else {
      panels<1>(c, c_stride, a, b, b_stride, rows, depth, start, factors);
      j += 1, c += lanes, b += lanes, factors += factors ? lanes : 0;
    }
  }
}

// Numbers of a dot product that are summed before they meet the others. One chain over a whole head
// dimension would carry the rounding of a large number, as that of an outlier channel, through all
// numbers behind it. Storage of 16 bits rounds by more than that.
template <class T>
constexpr int64_t kChain = sizeof(T) >= 4 ? 32 : 1 << 20;

// C [rows][vectors * lanes] = A B, where every number of C is a dot product of numbers stored as T.
//
// Every score is such a number, whatever its block looks like, so that the backward finds the very
// number that the forward had. A score that differed in its last digits would leave the gradients
// of a query's scores with a sum other than 0, and that sum reaches the query's gradient times
// whatever all keys have in common, which is large where one channel of the keys is.
template <class T, class Sum, class Unit>
void dot_products(Sum* c, int64_t c_stride, Left<Unit> a, const Unit* b, int64_t b_stride,
                  int64_t rows, int64_t vectors, int64_t depth) {
  for (int64_t k = 0; k < depth; k += kChain<T>) {
    const int64_t chain = depth - k < kChain<T> ? depth - k : kChain<T>;
    multiply(c, c_stride, a, b, b_stride, rows, vectors, chain, k ? Start::sum : Start::zero);
    a.data += chain * a.depth_stride;
    b += chain * b_stride;
  }
}

}  // namespace prefixattn::PREFIXATTN_ISA
