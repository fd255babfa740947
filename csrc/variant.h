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
  template <class Sum>
  void score(Sum* tile, Sum* slopes, const Lane* lanes, int64_t count, int64_t first,
             int64_t keys) const {
    const Sum scale = Sum(arguments.scale), cap = Sum(arguments.softcap);
    for (int64_t key = 0; key < keys; ++key)
      for (int64_t lane = 0; lane < count; lane += kLanes<Sum>) {
        const int64_t at = key * kBlock + lane;
        Vector<Sum> scores = load(tile + at) * scale;
        if (capped()) {
          const Vector<Sum> bent = tanh(scores / cap);
          scores = bent * cap;
          if (slopes) store(slopes + at, Sum(1) - bent * bent);
        }
        store(tile + at, scores);
      }
    if (has_alibi())
      for (int64_t lane = 0; lane < count; ++lane) {
        const Sum slope = Sum(arguments.alibi_slopes[lanes[lane].head]);
        const int64_t far = distance(lanes[lane]) - first;
        for (int64_t key = 0; key < keys; ++key)
          tile[key * kBlock + lane] -= slope * Sum(std::abs(far - key));
      }
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
    const uint64_t threshold = uint64_t(std::nearbyint(arguments.dropout * 0x1p32));
    const Sum kept = Sum(1 / (1 - arguments.dropout));
    const uint64_t seed = uint64_t(arguments.dropout_seed[0]);
    for (int64_t lane = 0; lane < count; ++lane) {
      const Lane& at = lanes[lane];
      // A packed segment is a row of its own here.
      const uint32_t row = uint32_t(at.row.number + arguments.dropout_seed[1]);
      for (int64_t key = 0; key < keys; ++key) {
        const uint32_t word = random_word(seed, uint32_t(column(first + key)), uint32_t(at.query),
                                          uint32_t(at.head), row);
        tile[key * kBlock + lane] *= word >= threshold ? kept : Sum(0);
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

  template <class T, class Sum>
  void add_bias(Sum* tile, const Lane* lanes, int64_t count, int64_t first, int64_t keys) const {
    for (int64_t lane = 0; lane < count; ++lane) {
      const T* numbers =
          static_cast<const T*>(bias().data) + place(bias(), lanes[lane]) + first * bias().key;
      for (int64_t key = 0; key < keys; ++key, numbers += bias().key) {
        Sum& score = tile[key * kBlock + lane];
        if constexpr (std::is_same_v<T, bool>) {
          if (!*numbers) score = -Sum(INFINITY);
        } else {
          score += Sum(widen(*numbers));
        }
      }
    }
  }
};

}  // namespace prefixattn::PREFIXATTN_ISA
