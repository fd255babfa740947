// What makes a score of a product, beyond the scale: soft cap, biases, masks, ALiBi; and dropout.
//
// All of it is rare, and goes number by number over a tile [key][query] in the cache. A plain half
// never comes here.
#pragma once

#include <cmath>

#include "functions.h"
#include "layouts.h"
#include "philox.h"
#include "rows.h"

namespace prefixattn::PREFIXATTN_ISA {

struct Variant {
  const Arguments& arguments;
  Half half;

  bool capped() const { return arguments.softcap > 0; }
  bool dropped() const { return arguments.dropout_seed != nullptr; }
  const Bias& bias() const {
    return half == Half::prefix ? arguments.prefix_bias : arguments.attn_mask;
  }
  bool has_alibi() const {
    return arguments.alibi_slopes && (half == Half::sequence || arguments.windowed_prefix);
  }
  // Whether a score is the product times the scale, and nothing else.
  bool plain() const { return !capped() && !bias().data && !has_alibi(); }

  // The number of a slot among all columns, the prefix first.
  int64_t column(int64_t slot) const {
    return half == Half::prefix ? slot : arguments.prefix_tokens + slot;
  }

  // A lane's distance to slot 0 of this half.
  int64_t distance(const Lane& lane) const {
    const int64_t position = lane.row.offset + lane.query;
    return half == Half::prefix ? position - lane.row.start + lane.row.prefix_tokens : position;
  }

  // Where a bias, or its gradient, holds a lane's number for slot 0.
  int64_t place(const Bias& bias, const Lane& lane) const {
    const int64_t slot = half == Half::prefix ? 0 : lane.row.first_key;
    return lane.row.batch * bias.row + lane.head * bias.head +
           (lane.row.first_query + lane.query) * bias.query + slot * bias.key;
  }

  // Makes scores of the products of `keys` slots from `first` on. With a soft cap, `slopes` (unless
  // null) becomes the derivative of the score by the scaled product.
  template <class T, class Sum>
  void score(Sum* tile, Sum* slopes, const Lane* lanes, int64_t count, int64_t first,
             int64_t keys) const {
    const Sum scale = Sum(arguments.scale), cap = Sum(arguments.softcap), inverse = 1 / cap;
    // A product is quicker than a quotient, and exact enough for 16 bits where the inverse is.
    const bool multiplies = sizeof(T) == 2 && std::isnormal(inverse);
    for (int64_t key = 0; key < keys; ++key)
      for (int64_t lane = 0; lane < count; lane += kLanes<Sum>) {
        const int64_t at = key * kBlock + lane;
        Vector<Sum> scores = load(tile + at) * scale;
        if (capped()) {
          const Vector<Sum> bent = tanh_for<T>(multiplies ? scores * inverse : scores / cap);
          scores = bent * cap;
          if (slopes) store(slopes + at, Sum(1) - bent * bent);
        }
        store(tile + at, scores);
      }
    if (has_alibi()) add_alibi(tile, lanes, count, first, keys);
    switch (bias().data ? bias().kind : -1) {
      case kFloat32: return add_bias<float>(tile, lanes, count, first, keys);
      case kFloat64: return add_bias<double>(tile, lanes, count, first, keys);
      case kFloat16: return add_bias<Float16>(tile, lanes, count, first, keys);
      case kBfloat16: return add_bias<Bfloat16>(tile, lanes, count, first, keys);
      case kBool:
        add_bias<bool>(tile, lanes, count, first, keys);
        return hide_blank(tile, count, keys);
    }
  }

  // Dropout: the numbers that stay are divided by what stays on average, the others are 0.
  template <class Sum>
  void drop(Sum* tile, const Lane* lanes, int64_t count, int64_t first, int64_t keys) const {
    constexpr int width = Counters::kWords;
    // A word under the threshold drops; which may be one more than the last word there is.
    const uint64_t threshold = uint64_t(std::nearbyint(arguments.dropout * 0x1p32));
    const bool all = threshold == 0;
    const uint32_t last = uint32_t(threshold - 1);
    const Sum kept = Sum(1 / (1 - arguments.dropout));
    const RoundKeys round_keys(uint64_t(arguments.dropout_seed[0]));
    for (int64_t start = 0; start < count; start += width) {
      Counters counters{};
      for (int64_t i = 0; i < width && start + i < count; ++i) {
        const Lane& at = lanes[start + i];
        const int64_t half = i / kLanes<uint64_t>, place = i % kLanes<uint64_t>;
        // A packed segment is a row of its own here.
        counters.row[half][place] = uint32_t(at.row.number + arguments.dropout_seed[1]);
        counters.query[half][place] = uint32_t(at.query);
        counters.head[half][place] = uint32_t(at.head);
      }
      for (int64_t key = 0; key < keys; ++key) {
        uint32_t words[width];
        counters.words(words, round_keys, uint32_t(column(first + key)));
        Sum* const at = tile + key * kBlock + start;
        for (int i = 0; !all && i < width; ++i) at[i] *= words[i] > last ? kept : Sum(0);
      }
    }
  }

 private:
  // A key that is hidden from all queries may be NaN, which no weight of 0 takes out of a sum over
  // lanes. A blank lane has no mask of its own.
  template <class Sum>
  void hide_blank(Sum* tile, int64_t count, int64_t keys) const {
    for (int64_t key = 0; key < keys; ++key)
      for (int64_t lane = count; lane % kWholeLanes<Sum> != 0; ++lane)
        tile[key * kBlock + lane] = -Sum(INFINITY);
  }

  // Takes slope * distance from each score. Distances are whole numbers, exact as vectors of `Sum`
  // where they are not too large for them.
  template <class Sum>
  void add_alibi(Sum* tile, const Lane* lanes, int64_t count, int64_t first, int64_t keys) const {
    constexpr int64_t kExact = int64_t(1) << (sizeof(Sum) == 4 ? 24 : 53);
    for (int64_t start = 0; start < count; start += kLanes<Sum>) {
      alignas(64) Sum slopes[kLanes<Sum>] = {}, far[kLanes<Sum>] = {};
      bool exact = true;
      const int64_t used = count - start < kLanes<Sum> ? count - start : kLanes<Sum>;
      for (int64_t i = 0; i < used; ++i) {
        const int64_t apart = distance(lanes[start + i]) - first;
        exact &= apart > -kExact && apart < kExact - keys;
        slopes[i] = Sum(arguments.alibi_slopes[lanes[start + i].head]), far[i] = Sum(apart);
      }
      Sum* at = tile + start;
      if (exact) {
        const Vector<Sum> slope = load(slopes);
        Vector<Sum> apart = load(far);
        for (int64_t key = 0; key < keys; ++key, at += kBlock, apart -= Sum(1))
          store(at, load(at) - slope * (apart < Sum(0) ? -apart : apart));
        continue;
      }
      for (int64_t i = 0; i < used; ++i) {
        const int64_t apart = distance(lanes[start + i]) - first;
        for (int64_t key = 0; key < keys; ++key)
          at[key * kBlock + i] -= slopes[i] * Sum(std::abs(apart - key));
      }
    }
  }

  // What a vector of a bias's numbers adds to scores, or -inf where a mask hides them.
  template <class Sum, class T>
  static Vector<Sum> addends(const T* numbers) {
    if constexpr (std::is_same_v<T, bool>) {
      typedef uint8_t Bytes __attribute__((vector_size(kLanes<Sum>)));
      Bytes bytes;
      std::memcpy(&bytes, numbers, sizeof bytes);
      const auto shown = __builtin_convertvector(bytes, Vector<Integer<Sum>>) != 0;
      return shown ? Vector<Sum>{} : broadcast(-Sum(INFINITY));
    } else if constexpr (std::is_same_v<Sum, float> && !std::is_same_v<T, double>) {
      return widen_vector(numbers);
    } else {
      Vector<Sum> wide{};
      for (int i = 0; i < kLanes<Sum>; ++i) wide[i] = Sum(widen(numbers[i]));
      return wide;
    }
  }

  // Adds a bias, whose numbers lie along keys, to scores, which lie along queries: squares of both
  // are transposed. Numbers with gaps between them, or shared by all keys, go one by one.
  template <class T, class Sum>
  void add_bias(Sum* tile, const Lane* lanes, int64_t count, int64_t first, int64_t keys) const {
    constexpr int width = kLanes<Sum>;
    const T* rows[kBlock];
    for (int64_t lane = 0; lane < count; ++lane)
      rows[lane] =
          static_cast<const T*>(bias().data) + place(bias(), lanes[lane]) + first * bias().key;
    const int64_t squares = bias().key == 1 ? keys / width * width : 0;
    for (int64_t start = 0; start < count && squares; start += width)
      for (int64_t key = 0; key < squares; key += width) {
        Vector<Bits<Sum>> square[width];
        for (int i = 0; i < width; ++i)
          square[i] = start + i < count
                          ? bits_as<Vector<Bits<Sum>>>(addends<Sum>(rows[start + i] + key))
                          : Vector<Bits<Sum>>{};
        transpose<Bits<Sum>>(square);
        for (int i = 0; i < width; ++i) {
          Sum* const at = tile + (key + i) * kBlock + start;
          const Vector<Sum> scores = load(at), more = bits_as<Vector<Sum>>(square[i]);
          // What is hidden may be no number.
          store(at, std::is_same_v<T, bool> ? (more == 0 ? scores : more) : scores + more);
        }
      }
    for (int64_t lane = 0; lane < count; ++lane)
      for (int64_t key = squares; key < keys; ++key) {
        Sum& score = tile[key * kBlock + lane];
        const T number = rows[lane][key * bias().key];
        if constexpr (std::is_same_v<T, bool>) {
          if (!number) score = -Sum(INFINITY);
        } else {
          score += Sum(widen(number));
        }
      }
  }
};

}  // namespace prefixattn::PREFIXATTN_ISA
