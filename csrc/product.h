// The matrix product that everything here is made of: C += A B, with A broadcast number by number
// and a row of B in vectors.
//
// Attention has five products. With queries in the lanes of vectors (scores, and their gradients,
// as [key][query]; the output as [head dim][query]) none of them needs a sum across lanes.
#pragma once

#include "tuning.h"

// Whether the instruction set multiplies pairs of bfloat16.
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define PREFIXATTN_PAIRS
#endif

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
#if defined(PREFIXATTN_PAIRS)
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

// Units that one step of a product sums. What is packed is filled up with zeros to whole steps.
template <class Unit>
constexpr int64_t kStep = 1;
#if defined(PREFIXATTN_TILES)
template <>
inline constexpr int64_t kStep<Pair> = kTilePairs;
#endif
// Lanes past a block's last one are blank up to a vector, or to what a product over lanes sums in
// one step.
template <class Sum>
constexpr int64_t kWholeLanes = kLanes<Sum>;
#if defined(PREFIXATTN_TILES)
template <>
inline constexpr int64_t kWholeLanes<float> = 2 * kTilePairs;
#endif
template <class Unit>
constexpr int64_t depth_of(int64_t numbers) {
  return (units<Unit>(numbers) + kStep<Unit> - 1) / kStep<Unit> * kStep<Unit>;
}

#if defined(PREFIXATTN_PAIRS)
inline Vector<uint32_t> load(const Pair* from) {
  return load(reinterpret_cast<const uint32_t*>(from));
}

// sum + a * b: both products of a pair are added to one float. The instructions take subnormal
// numbers as 0. ARM's rounds each of its steps to odd, which errs by up to a unit in a float's last
// place, and bfloat16 itself by 2^15 of them.
inline Vector<float> fused(Vector<uint32_t> a, Vector<uint32_t> b, Vector<float> sum) {
#if defined(__AVX512BF16__)
  return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)b, (__m512bh)a);
#else
  return (Vector<float>)vbfdotq_f32((float32x4_t)sum, bits_as<bfloat16x8_t>(b),
                                    bits_as<bfloat16x8_t>(a));
#endif
}

#if defined(__AVX512BF16__)
constexpr uint16_t kInTurn[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                  8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
#endif

// Pairs of the numbers in the same lane of two vectors, rounded to nearest.
inline Vector<uint32_t> pairs_across(Vector<float> low, Vector<float> high) {
#if defined(__AVX512BF16__)
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return (Vector<uint32_t>)_mm512_permutexvar_epi16(_mm512_loadu_si512(kInTurn), both);
#else
  const auto rounded = [](Vector<float> x) {
    return bits_as<uint16x8_t>(vcvtq_low_bf16_f32((float32x4_t)x));
  };
  return bits_as<Vector<uint32_t>>(vzip1q_u16(rounded(low), rounded(high)));
#endif
}

// Pairs of the numbers in lanes next to each other, rounded to nearest.
inline Vector<uint32_t> pairs_along(Vector<float> first, Vector<float> second) {
#if defined(__AVX512BF16__)
  return (Vector<uint32_t>)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
#else
  return bits_as<Vector<uint32_t>>(
      vcvtq_high_bf16_f32(vcvtq_low_bf16_f32((float32x4_t)first), (float32x4_t)second));
#endif
}
#endif

// The same with a row of B in a vector already, as the bits of its units.
inline Vector<float> multiply_add(Vector<float> sum, const float* a, Vector<uint32_t> b) {
  return fused(broadcast(*a), bits_as<Vector<float>>(b), sum);
}
inline Vector<double> multiply_add(Vector<double> sum, const double* a, Vector<uint64_t> b) {
  return fused(broadcast(*a), bits_as<Vector<double>>(b), sum);
}
#if defined(PREFIXATTN_PAIRS)
inline Vector<float> multiply_add(Vector<float> sum, const Pair* a, Vector<uint32_t> b) {
  return fused(broadcast(a->bits), b, sum);
}
#endif

inline Vector<float> multiply_add(Vector<float> sum, const float* a, const float* b) {
  return fused(broadcast(*a), load(b), sum);
}
inline Vector<double> multiply_add(Vector<double> sum, const double* a, const double* b) {
  return fused(broadcast(*a), load(b), sum);
}
#if defined(PREFIXATTN_PAIRS)
inline Vector<float> multiply_add(Vector<float> sum, const Pair* a, const Pair* b) {
  return fused(broadcast(a->bits), load(b), sum);
}
#endif

// The same lane by lane.
inline Vector<float> multiply_lanes(Vector<float> sum, const float* a, const float* b) {
  return fused(load(a), load(b), sum);
}
inline Vector<double> multiply_lanes(Vector<double> sum, const double* a, const double* b) {
  return fused(load(a), load(b), sum);
}
#if defined(PREFIXATTN_PAIRS)
inline Vector<float> multiply_lanes(Vector<float> sum, const Pair* a, const Pair* b) {
  return fused(load(a), load(b), sum);
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

// `multiply` by vectors.
template <class Sum, class Unit>
void multiply_panels(Sum* c, int64_t c_stride, Left<Unit> a, const Unit* b, int64_t b_stride,
                     int64_t rows, int64_t vectors, int64_t depth, Start start,
                     const Sum* factors) {
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

#if defined(PREFIXATTN_TILES)

// A block of C, 16 or 32 rows by 16 or 32 columns, plus A B over `steps` steps of 16 pairs.
//
// Four products share two loads of A and two of B. A is read once for each block of columns and
// comes from the second cache, so that its loads leave the first one to B and C.
template <int rows, int columns>
void tile_block(float* c, int64_t c_stride, Left<Pair> a, const Pair* b, int64_t b_stride,
                int64_t steps, bool zero) {
  const int64_t c_row = c_stride * 4, a_row = a.row_stride * 4, b_row = b_stride * 4;
  float* const below = c + kTileRows * c_stride;
  if (zero) {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  } else {
    tile_load<0>(c, c_row);
    if constexpr (columns > 1) tile_load<1>(c + kTileRows, c_row);
    if constexpr (rows > 1) tile_load<2>(below, c_row);
    if constexpr (rows > 1 && columns > 1) tile_load<3>(below + kTileRows, c_row);
  }
  for (int64_t step = 0; step < steps; ++step) {
    tile_load<6>(b, b_row);
    if constexpr (columns > 1) tile_load<7>(b + kTileRows, b_row);
    tile_load_once<4>(a.data, a_row);
    tile_multiply<0, 4, 6>();
    if constexpr (columns > 1) tile_multiply<1, 4, 7>();
    if constexpr (rows > 1) {
      tile_load_once<5>(a.data + kTileRows * a.row_stride, a_row);
      tile_multiply<2, 5, 6>();
      if constexpr (columns > 1) tile_multiply<3, 5, 7>();
    }
    a.data += kTilePairs, b += kTilePairs * b_stride;
  }
  tile_store<0>(c, c_row);
  if constexpr (columns > 1) tile_store<1>(c + kTileRows, c_row);
  if constexpr (rows > 1) tile_store<2>(below, c_row);
  if constexpr (rows > 1 && columns > 1) tile_store<3>(below + kTileRows, c_row);
}

template <int columns>
void tile_rows(float* c, int64_t c_stride, Left<Pair> a, const Pair* b, int64_t b_stride,
               int64_t rows, int64_t steps, bool zero) {
  for (; rows >= 2; rows -= 2) {
    tile_block<2, columns>(c, c_stride, a, b, b_stride, steps, zero);
    c += 2 * kTileRows * c_stride, a.data += 2 * kTileRows * a.row_stride;
  }
  if (rows) tile_block<1, columns>(c, c_stride, a, b, b_stride, steps, zero);
}

// `multiply` for as many rows as fill tiles; returns how many. What the depth leaves over whole
// steps goes the way of vectors.
inline int64_t multiply_tiles(float* c, int64_t c_stride, Left<Pair> a, const Pair* b,
                              int64_t b_stride, int64_t rows, int64_t vectors, int64_t depth,
                              Start start, const float* factors) {
  const int64_t steps = depth / kTilePairs, rest = depth % kTilePairs;
  rows -= rows % kTileRows;
  if (a.depth_stride != 1 || rows == 0 || steps == 0) return 0;
  for (int64_t row = 0; start == Start::scaled && row < rows; ++row)
    for (int64_t lane = 0; lane < vectors * kLanes<float>; lane += kLanes<float>) {
      float* const at = c + row * c_stride + lane;
      store(at, load(at) * load(factors + lane));
    }
  for (int64_t j = 0; j < vectors; j += 2) {
    float* const to = c + j * kTileRows;
    const Pair* const from = b + j * kTileRows;
    const bool zero = start == Start::zero;
    vectors - j >= 2 ? tile_rows<2>(to, c_stride, a, from, b_stride, rows / kTileRows, steps, zero)
                     : tile_rows<1>(to, c_stride, a, from, b_stride, rows / kTileRows, steps, zero);
  }
  if (rest) {
    a.data += steps * kTilePairs, b += steps * kTilePairs * b_stride;
    multiply_panels(c, c_stride, a, b, b_stride, rows, vectors, rest, Start::sum, factors);
  }
  return rows;
}

#endif

// C [rows][vectors * lanes] = start + A [rows][depth] B [depth][vectors * lanes]. With
// `Start::scaled` every column of C is first multiplied by its one of `factors`.
template <class Sum, class Unit>
void multiply(Sum* c, int64_t c_stride, Left<Unit> a, const Unit* b, int64_t b_stride, int64_t rows,
              int64_t vectors, int64_t depth, Start start, const Sum* factors = nullptr) {
#if defined(PREFIXATTN_TILES)
  if constexpr (std::is_same_v<Unit, Pair>) {
    const int64_t done =
        multiply_tiles(c, c_stride, a, b, b_stride, rows, vectors, depth, start, factors);
    c += done * c_stride, a.data += done * a.row_stride, rows -= done;
  }
#endif
  multiply_panels(c, c_stride, a, b, b_stride, rows, vectors, depth, start, factors);
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
