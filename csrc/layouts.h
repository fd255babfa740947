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

// to [rows][depth_of(width)]: the units run along a row.
template <class Unit, class T>
void pack_rows(Unit* to, const T* from, int64_t stride, int64_t rows, int64_t width) {
  const int64_t depth = depth_of<Unit>(width);
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

#if defined(__AVX512F__)
// The transposed square of 16 rows of 16 integers. A load puts four of them where they belong in a
// vector, from each of four rows: half of the work is done by loads, which take turns with
// shuffles.
__attribute__((always_inline)) inline void load_transposed(const uint32_t* const (&rows)[16],
                                                           Vector<uint32_t> (&square)[16]) {
#pragma GCC unroll 4
  for (int column = 0; column < 16; column += 4) {
    __m512i parts[4];  // of row i, i + 4, i + 8 and i + 12
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const auto four = [&](int row) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + column));
      };
      parts[i] = _mm512_castsi128_si512(four(i));
      parts[i] = _mm512_mask_broadcast_i32x4(parts[i], 0x00f0, four(i + 4));
      parts[i] = _mm512_mask_broadcast_i32x4(parts[i], 0x0f00, four(i + 8));
      parts[i] = _mm512_mask_broadcast_i32x4(parts[i], 0xf000, four(i + 12));
    }
    const __m512i low01 = _mm512_unpacklo_epi32(parts[0], parts[1]);
    const __m512i high01 = _mm512_unpackhi_epi32(parts[0], parts[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(parts[2], parts[3]);
    const __m512i high23 = _mm512_unpackhi_epi32(parts[2], parts[3]);
    square[column] = (Vector<uint32_t>)_mm512_unpacklo_epi64(low01, low23);
    square[column + 1] = (Vector<uint32_t>)_mm512_unpackhi_epi64(low01, low23);
    square[column + 2] = (Vector<uint32_t>)_mm512_unpacklo_epi64(high01, high23);
    square[column + 3] = (Vector<uint32_t>)_mm512_unpackhi_epi64(high01, high23);
  }
}
#endif

// A square of units, transposed: number `unit` on of the rows `row_at(lane)` to `row_at(count -
// 1)`, zeros beyond both.
template <class Unit, class RowAt>
__attribute__((always_inline)) inline void load_square(Vector<Bits<Unit>> (&square)[kLanes<Unit>],
                                                       const RowAt& row_at, int64_t lane,
                                                       int64_t count, int64_t unit, int64_t width) {
  constexpr int lanes = kLanes<Unit>;
#if defined(__AVX512F__)
  using T = std::remove_const_t<std::remove_pointer_t<decltype(row_at(0))>>;
  if constexpr (kPerUnit<Unit> * sizeof(T) == 4)
    if (lane + lanes <= count && (unit + lanes) * kPerUnit<Unit> <= width) {
      const uint32_t* rows[lanes];
      for (int i = 0; i < lanes; ++i)
        rows[i] = reinterpret_cast<const uint32_t*>(row_at(lane + i) + unit * kPerUnit<Unit>);
      return load_transposed(rows, square);
    }
#endif
  for (int i = 0; i < lanes; ++i)
    square[i] = lane + i < count ? load_units<Unit>(row_at(lane + i), unit * kPerUnit<Unit>, width)
                                 : Vector<Bits<Unit>>{};
  transpose<Bits<Unit>>(square);
}

// to [depth_of(width)][to_stride]: each of the rows `row_at(0)`, ... becomes a lane; lanes past
// `count` are zero up to `kWholeLanes`.
template <class Unit, class RowAt>
void pack_lanes(Unit* to, int64_t to_stride, const RowAt& row_at, int64_t count, int64_t width) {
  constexpr int lanes = kLanes<Unit>;
  constexpr int64_t whole = kWholeLanes<std::conditional_t<sizeof(Unit) == 8, double, float>>;
  const int64_t depth = depth_of<Unit>(width);
  for (int64_t lane = 0; lane < round_up(count, whole); lane += lanes)
    for (int64_t unit = 0; unit < depth; unit += lanes) {
      Vector<Bits<Unit>> square[lanes];
      load_square<Unit>(square, row_at, lane, count, unit, width);
      for (int i = 0; i < lanes && unit + i < depth; ++i)
        store(reinterpret_cast<Bits<Unit>*>(to + (unit + i) * to_stride + lane), square[i]);
    }
}

// rows[lane][column] = from[column][lane] * factors[lane]: pack_lanes' way back.
template <class T, class Sum>
void unpack_lanes(T* const* rows, const Sum* from, int64_t from_stride, const Sum* factors,
                  int64_t count, int64_t width) {
  constexpr int lanes = kLanes<Sum>;
  for (int64_t lane = 0; lane < count; lane += lanes)
    for (int64_t column = 0; column < width; column += lanes) {
      Vector<Bits<Sum>> square[lanes];
      for (int i = 0; i < lanes; ++i)
        square[i] = column + i < width
                        ? bits_as<Vector<Bits<Sum>>>(
                              load(from + (column + i) * from_stride + lane) * load(factors + lane))
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

#if defined(PREFIXATTN_TILES)
// to [width][to_stride]: the rows `row_at(0)`, ... become columns, two of them in a unit; zeros
// fill it up to whole steps. A square of 32 rows and 32 columns is made of two squares of pairs:
// row 2i and row 2i + 1 give the pairs of even columns to one, and those of odd columns to the
// other.
template <class RowAt>
void pack_transposed(Pair* to, int64_t to_stride, const RowAt& row_at, int64_t rows,
                     int64_t width) {
  constexpr int lanes = kLanes<Pair>;
  for (int64_t row = 0; row < rows; row += 2 * lanes)
    for (int64_t column = 0; column < width; column += 2 * lanes) {
      Vector<uint32_t> even[lanes], odd[lanes];
      const auto numbers = [&](int64_t number) {
        return number < rows ? load_units<Pair>(row_at(number), column, width) : Vector<uint32_t>{};
      };
      for (int i = 0; i < lanes; ++i) {
        const Vector<uint32_t> low = numbers(row + 2 * i), high = numbers(row + 2 * i + 1);
        even[i] = (low & 0xffffu) | high << 16;
        odd[i] = low >> 16 | (high & 0xffff0000u);
      }
      transpose<uint32_t>(even);
      transpose<uint32_t>(odd);
      uint32_t* at = reinterpret_cast<uint32_t*>(to + column * to_stride + row / 2);
      for (int i = 0; i < lanes; ++i, at += 2 * to_stride) {
        if (column + 2 * i < width) store(at, even[i]);
        if (column + 2 * i + 1 < width) store(at + to_stride, odd[i]);
      }
    }
}
#endif

// Room for `over_rows`, of up to kTile rows.
template <class Unit>
constexpr int64_t room_over_rows(int64_t width) {
  return units<Unit>(kTile) * round_up(width, kLanes<Unit>);
}

// The rows `row_at(0)`, ... of a tile as the left side of a product that sums over them.
template <class Unit, class RowAt>
Left<Unit> over_rows(Unit* to, const RowAt& row_at, int64_t rows, int64_t width) {
#if defined(PREFIXATTN_TILES)
  if constexpr (std::is_same_v<Unit, Pair>) {
    pack_transposed(to, units<Unit>(kTile), row_at, rows, width);
    return {to, units<Unit>(kTile), 1};
  }
#endif
  const int64_t stride = round_up(width, kLanes<Unit>);
  pack_columns(to, stride, row_at, rows, width);
  return {to, 1, stride};
}

// A tile of weights [keys][kBlock] as the right side of a product that sums over keys.
template <class Unit, class Sum>
const Unit* over_keys(Unit* to, const Sum* tile, [[maybe_unused]] int64_t keys,
                      [[maybe_unused]] int64_t vectors) {
  if constexpr (std::is_same_v<Unit, Sum>) {
    return tile;
  } else {
#if defined(PREFIXATTN_PAIRS)
    for (int64_t key = 0; key < depth_of<Unit>(keys) * 2; key += 2)
      for (int64_t lane = 0; lane < vectors * kLanes<Sum>; lane += kLanes<Sum>) {
        const Sum* at = tile + key * kBlock + lane;
        const Vector<float> low = key < keys ? load(at) : Vector<float>{};
        const Vector<float> high = key + 1 < keys ? load(at + kBlock) : Vector<float>{};
        store(reinterpret_cast<uint32_t*>(to + key / 2 * kBlock + lane), pairs_across(low, high));
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
#if defined(PREFIXATTN_PAIRS)
    constexpr int lanes = kLanes<Sum>;
    for (int64_t i = 0; i < keys * kBlock; i += 2 * lanes)
      store(reinterpret_cast<uint32_t*>(to + i / 2),
            pairs_along(load(tile + i), load(tile + i + lanes)));
#endif
    return {to, kBlock / 2, 1};
  }
}

// Rows as the left side of a product that sums along them: where they lie, if they lie there in
// whole steps of units, else from `packed`.
template <class T>
Left<UnitOf<T>> along_rows(const T* rows, int64_t stride, int64_t count, int64_t width,
                           [[maybe_unused]] UnitOf<T>* packed) {
  using Unit = UnitOf<T>;
  if constexpr (std::is_same_v<T, Unit>) return {rows, stride, 1};
  constexpr int64_t step = kStep<Unit> * kPerUnit<Unit>;
  if (kStep<Unit> > 1 && width % step == 0 && stride % kPerUnit<Unit> == 0 &&
      reinterpret_cast<uintptr_t>(rows) % sizeof(Unit) == 0)
    return {reinterpret_cast<const Unit*>(rows), stride / kPerUnit<Unit>, 1};
  pack_rows(packed, rows, stride, count, width);
  return {packed, depth_of<Unit>(width), 1};
}

// Products of a tile's rows and of what a block's lanes hold, [row][lane].
template <class T>
void products(SumOf<T>* tile, const T* rows, int64_t stride, int64_t count, int64_t width,
              const UnitOf<T>* lanes, int64_t vectors, UnitOf<T>* packed) {
  dot_products<T>(tile, kBlock, along_rows(rows, stride, count, width, packed), lanes, kBlock,
                  count, vectors, depth_of<UnitOf<T>>(width));
}

}  // namespace prefixattn::PREFIXATTN_ISA
