// The forward's two products with numbers of one query in the lanes: the way of few queries, which
// would leave most lanes of a block empty. It reads keys and values once, as fast as memory gives
// them.
#pragma once

#include "block.h"

namespace prefixattn::PREFIXATTN_ISA {

// From this many queries on a block's lanes are the faster way (measured on Zen 4, D = 64 and 128):
// sooner where a unit holds two numbers, which here have to be widened first.
template <class T>
constexpr int kFewQueries = kPerUnit<UnitOf<T>> == 1 ? 12 : 7;

template <class T>
class ByRows {
 public:
  using Sum = SumOf<T>;

  void plan(Arena& arena, const Arguments& a) {
    head_dim_ = a.head_dim, value_dim_ = a.value_dim;
    key_width_ = round_up(head_dim_, kLanes<Sum>), value_width_ = round_up(value_dim_, kLanes<Sum>);
    arena.plan(&query_, kFewQueries<T> * key_width_);
    arena.plan(&sums_, kFewQueries<T> * value_width_);
    arena.plan(&widened_, kTile * (key_width_ > value_width_ ? key_width_ : value_width_));
  }

  void begin(const Block<T>& block) {
    T* rows[kBlock];
    block.rows(block.arguments.query, rows);
    pack_columns(query_, key_width_, [&](int64_t i) { return rows[i]; }, block.count, head_dim_);
    std::memset(sums_, 0, size_t(block.count * value_width_) * sizeof(Sum));
  }

  // Products [key][kBlock] of some keys and the block's queries.
  void score(const Block<T>& block, const T* keys, int64_t stride, int64_t count, Sum* tile) {
    constexpr int lanes = kLanes<Sum>;
    const Wide wide = widen_rows(keys, stride, count, head_dim_, key_width_);
    for (int64_t key = 0; key < count; ++key)  // blank lanes too, up to a whole vector
      for (int64_t lane = 0; lane < block.count; lane += lanes)
        store(tile + key * kBlock + lane, Vector<Sum>{});
    for (int64_t key = 0; key < count; key += lanes)
      for (int64_t query = 0; query < block.count; ++query) {
        const int64_t left = count - key < lanes ? count - key : lanes;
        const auto dots =
            left == lanes ? dot<lanes>(query, wide, key, lanes) : dot<1>(query, wide, key, left);
        for (int64_t i = 0; i < left; ++i) tile[(key + i) * kBlock + query] = dots[i];
      }
  }

  // sums = sums * factors + weights * values, for a tile of weights [key][kBlock].
  void add(const Block<T>& block, const T* values, int64_t stride, int64_t count, const Sum* tile,
           const Sum* factors) {
    const Wide wide = widen_rows(values, stride, count, value_dim_, value_width_);
    for (int64_t query = 0; query < block.count; ++query)
      for (int64_t i = 0; i < value_width_; i += kLanes<Sum>) {
        Sum* at = sums_ + query * value_width_ + i;
        store(at, load(at) * factors[query]);
      }
    multiply(sums_, value_width_, Left<Sum>{tile, 1, kBlock}, wide.rows, wide.stride, block.count,
             value_width_ / kLanes<Sum>, count, Start::sum);
  }

  // Writes each query's sums times its factor to its row.
  template <class To>
  void write(To* const* rows, const Sum* factors, int64_t count) {
    for (int64_t query = 0; query < count; ++query)
      for (int64_t i = 0; i < value_dim_; ++i)
        rows[query][i] = narrow<To>(sums_[query * value_width_ + i] * factors[query]);
  }

 private:
  struct Wide {
    const Sum* rows;
    int64_t stride;
  };

  // The rows as whole vectors of sums' numbers: where they lie, if they are that.
  Wide widen_rows(const T* rows, int64_t stride, int64_t count, int64_t width, int64_t padded) {
    if constexpr (std::is_same_v<T, Sum>)
      if (width == padded) return {rows, stride};
    pack_columns(widened_, padded, [&](int64_t row) { return rows + row * stride; }, count, width);
    return {widened_, padded};
  }

  // Dot products of a query and the keys from `key` on: `count` of them, as many as there are lanes
  // or (with steps of 1) fewer.
  template <int step>
  Vector<Sum> dot(int64_t query, const Wide& keys, int64_t key, int64_t count) const {
    constexpr int lanes = kLanes<Sum>;
    Vector<Sum> sums[lanes] = {};
    for (int64_t first = 0; first < count; first += step)
      for (int64_t i = 0; i < key_width_; i += lanes) {
        const Vector<Sum> numbers = load(query_ + query * key_width_ + i);
#pragma GCC unroll 16
        for (int j = 0; j < step; ++j)
          sums[first + j] += numbers * load(keys.rows + (key + first + j) * keys.stride + i);
      }
    return sum_each<Sum>(sums);
  }

  int64_t head_dim_, value_dim_, key_width_, value_width_;
  Sum *query_, *sums_, *widened_;
};

}  // namespace prefixattn::PREFIXATTN_ISA
