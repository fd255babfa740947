// The layouts that a product reads, made from rows of a tensor or of a score tile, and back.
#pragma once

#include "product.h"
#include "schedule.h"

namespace prefixattn::PREFIXATTN_ISA {

// An integer with a unit's bits, which shuffles move about.
template <class Unit>
using Bits = std::conditional_t<sizeof(Unit) == 8, uint64_t, uint32_t>;

// The units of one row from number `first` on, zeros past its end.
template <class Unit, class T>
inline Vector<Bits<Unit>> load_units(const T* row, int64_t first, int64_t width) {
  constexpr int numbers = kLanes<Unit> * kPerUnit<Unit>;
  T padded[numbers];
  const T* from = row + first;
  if (width - first < numbers) {
    std::memset(padded, 0, sizeof padded);
    std::memcpy(padded, from, size_t(width - first) * sizeof(T));
    from = padded;
  }
  if constexpr (std::is_same_v<Unit, Pair>) {
    return load(reinterpret_cast<const uint32_t*>(from));
  } else {
    return bits_as<Vector<Bits<Unit>>>(widen_vector(from));
  }
}

// to [rows][units(width)]: the units run along a row.
template <class Unit, class T>
void pack_rows(Unit* to, const T* from, int64_t stride, int64_t rows, int64_t width) {
  const int64_t depth = units<Unit>(width);
  for (int64_t row = 0; row < rows; ++row, from += stride, to += depth) {
    int64_t unit = 0;
    for (; unit + kLanes<Unit> <= depth; unit += kLanes<Unit>)
      store(reinterpret_cast<Bits<Unit>*>(to + unit),
            load_units<Unit>(from, unit * kPerUnit<Unit>, width));
    if (unit == depth) continue;
    const auto rest = load_units<Unit>(from, unit * kPerUnit<Unit>, width);
    std::memcpy(to + unit, &rest, size_t(depth - unit) * sizeof(Unit));
  }
}

// to [units(rows)][to_stride]: a unit holds numbers of one column of the rows `row_at(0)`, ...
// Zeros fill it up to whole vectors, for which `to_stride` has room.
template <class Unit, class RowAt>
void pack_columns(Unit* to, int64_t to_stride, const RowAt& row_at, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; row += kPerUnit<Unit>, to += to_stride) {
    const auto* first = row_at(row);
    for (int64_t column = 0; column < width; column += kLanes<Unit>) {
      Bits<Unit>* at = reinterpret_cast<Bits<Unit>*>(to + column);
      if constexpr (std::is_same_v<Unit, Pair>) {
        const bool lone = row + 1 == rows;
        const auto low = bits_as<Vector<uint32_t>>(load_units<float>(first, column, width)) >> 16;
        const auto high = bits_as<Vector<uint32_t>>(
            load_units<float>(lone ? first : row_at(row + 1), column, width));
        store(at, lone ? low : low | high);
      } else {
        store(at, load_units<Unit>(first, column, width));
      }
    }
  }
}

// to [units(width)][to_stride]: each of the rows `row_at(0)`, ... becomes a lane; lanes past
// `count` are zero up to a vector.
template <class Unit, class RowAt>
void pack_lanes(Unit* to, int64_t to_stride, const RowAt& row_at, int64_t count, int64_t width) {
  constexpr int lanes = kLanes<Unit>;
  const int64_t depth = units<Unit>(width);
  for (int64_t lane = 0; lane < count; lane += lanes)
    for (int64_t unit = 0; unit < depth; unit += lanes) {
      Vector<Bits<Unit>> square[lanes];
      for (int i = 0; i < lanes; ++i)
        square[i] = lane + i < count
                        ? load_units<Unit>(row_at(lane + i), unit * kPerUnit<Unit>, width)
                        : Vector<Bits<Unit>>{};
      transpose<Bits<Unit>>(square);
      for (int i = 0; i < lanes && unit + i < depth; ++i)
        store(reinterpret_cast<Bits<Unit>*>(to + (unit + i) * to_stride + lane), square[i]);
    }
}

// rows[lane][column] = from[column][lane] * factors[lane]: pack_lanes' way back.
template <class T, class Sum>
void unpack_lanes(T* const* rows, const Sum* from, const Sum* factors, int64_t count,
                  int64_t width) {
  constexpr int lanes = kLanes<Sum>;
  for (int64_t lane = 0; lane < count; lane += lanes)
    for (int64_t column = 0; column < width; column += lanes) {
      Vector<Bits<Sum>> square[lanes];
      for (int i = 0; i < lanes; ++i)
        square[i] = column + i < width
                        ? bits_as<Vector<Bits<Sum>>>(load(from + (column + i) * kBlock + lane) *
                                                     load(factors + lane))
                        : Vector<Bits<Sum>>{};
      transpose<Bits<Sum>>(square);
      for (int i = 0; i < lanes && lane + i < count; ++i) {
        T numbers[lanes];
        narrow_vector(numbers, bits_as<Vector<Sum>>(square[i]));
        const int64_t left = width - column;
        std::memcpy(rows[lane + i] + column, numbers,
                    size_t(left < lanes ? left : lanes) * sizeof(T));
      }
    }
}

// A tile of weights [keys][kBlock] as the right side of a product that sums over keys.
template <class Unit, class Sum>
const Unit* over_keys(Unit* to, const Sum* tile, [[maybe_unused]] int64_t keys,
                      [[maybe_unused]] int64_t vectors) {
  if constexpr (std::is_same_v<Unit, Sum>) {
    return tile;
  } else {
#if defined(__AVX512BF16__)
    uint16_t places[32];
    for (int i = 0; i < 32; ++i) places[i] = uint16_t(i / 2 + i % 2 * 16);
    const __m512i in_turn = _mm512_loadu_si512(places);
    for (int64_t key = 0; key < keys; key += 2)
      for (int64_t lane = 0; lane < vectors * kLanes<Sum>; lane += kLanes<Sum>) {
        const Sum* at = tile + key * kBlock + lane;
        const __m512 low = (__m512)load(at);
        const __m512 high = key + 1 < keys ? (__m512)load(at + kBlock) : _mm512_setzero_ps();
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        _mm512_storeu_si512(to + key / 2 * kBlock + lane, _mm512_permutexvar_epi16(in_turn, both));
      }
#endif
    return to;
  }
}

// The same tile as the left side of a product that sums over queries: units along a row.
template <class Unit, class Sum>
Left<Unit> over_queries(Unit* to, const Sum* tile, [[maybe_unused]] int64_t keys) {
  if constexpr (std::is_same_v<Unit, Sum>) {
    return {tile, kBlock, 1};
  } else {
#if defined(__AVX512BF16__)
    for (int64_t i = 0; i < keys * kBlock; i += 32)
      _mm512_storeu_si512(to + i / 2, (__m512i)_mm512_cvtne2ps_pbh((__m512)load(tile + i + 16),
                                                                   (__m512)load(tile + i)));
#endif
    return {to, kBlock / 2, 1};
  }
}

// Products of a tile's rows and of what a block's lanes hold, [row][lane]. The rows are multiplied
// where they lie if they lie there in units, else from `packed`.
template <class T>
void products(SumOf<T>* tile, const T* rows, int64_t stride, int64_t count, int64_t width,
              const UnitOf<T>* lanes, int64_t vectors, [[maybe_unused]] UnitOf<T>* packed) {
  using Unit = UnitOf<T>;
  Left<Unit> left{packed, units<Unit>(width), 1};
  if constexpr (std::is_same_v<T, Unit>) {
    left = {rows, stride, 1};
  } else {
    pack_rows(packed, rows, stride, count, width);
  }
  dot_products<T>(tile, kBlock, left, lanes, kBlock, count, vectors, units<Unit>(width));
}

}  // namespace prefixattn::PREFIXATTN_ISA
