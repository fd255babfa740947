// The forward's two products of few queries, which would leave most lanes of a block empty: keys
// lie in the lanes of their scores, and head dims in those of the output. It reads keys and values
// once, as fast as memory gives them.
#pragma once

#include "block.h"

namespace prefixattn::PREFIXATTN_ISA {

// Blocks of fewer queries go this way.
template <class T>
constexpr int kFewQueries = kPerUnit<UnitOf<T>> == 1 ? kFewNumbers : kFewPairs;

template <class T>
class ByRows {
 public:
  using Unit = UnitOf<T>;
  using Sum = SumOf<T>;

  void plan(Arena& arena, const Arguments& a) {
    head_dim_ = a.head_dim, value_dim_ = a.value_dim;
    depth_ = depth_of<Unit>(head_dim_), value_width_ = round_up(value_dim_, kLanes<Sum>);
    arena.plan(&query_, kFewQueries<T> * depth_);
    arena.plan(&keys_, depth_ * kAtOnce);
    arena.plan(&scores_, kFewQueries<T> * kTile);
    arena.plan(&sums_, kFewQueries<T> * value_width_);
    arena.plan(&widened_, kTile * value_width_);
  }

  void begin(const Block<T>& block) {
    T* rows[kBlock];
    block.rows(block.arguments.query, rows);
    for (int64_t query = 0; query < block.count; ++query)
      pack_rows(query_ + query * depth_, rows[query], 0, 1, head_dim_);
    clear(block.count);
  }

  // Products [key][kBlock] of some keys and the block's queries. The keys are transposed some at a
  // time, so that what was written is still in the first cache when it is multiplied.
  void score(const Block<T>& block, const T* keys, int64_t stride, int64_t count, Sum* tile) {
    for (int64_t first = 0; first < count; first += kAtOnce) {
      const int64_t some = count - first < kAtOnce ? count - first : kAtOnce;
      const T* from = keys + first * stride;
      pack_lanes(keys_, kAtOnce, [&](int64_t key) { return from + key * stride; }, some, head_dim_);
      dot_products<T>(scores_ + first, kTile, Left<Unit>{query_, depth_, 1}, keys_, kAtOnce,
                      block.count, ceil_div(some, kLanes<Sum>), depth_);
    }
    pack_lanes(
        tile, kBlock, [&](int64_t query) { return scores_ + query * kTile; }, block.count, count);
  }

  // sums = sums * factors + weights * values, for a tile of weights [key][kBlock].
  void add(const Block<T>& block, const T* values, int64_t stride, int64_t count, const Sum* tile,
           const Sum* factors) {
    const Wide wide = widen(values, stride, count);
    for (int64_t query = 0; query < block.count; ++query)
      for (int64_t i = 0; i < value_width_; i += kLanes<Sum>) {
        Sum* at = sums_ + query * value_width_ + i;
        store(at, load(at) * factors[query]);
      }
    multiply(sums_, value_width_, Left<Sum>{tile, 1, kBlock}, wide.rows, wide.stride, block.count,
             value_width_ / kLanes<Sum>, count, Start::sum);
  }

  // whole = whole * mine + sums * others, query by query, and no sums any more.
  void fold(double* whole, const double* mine, const double* others, int64_t count) {
    for (int64_t query = 0; query < count; ++query)
      for (int64_t i = 0; i < value_dim_; ++i) {
        double& sum = whole[query * value_dim_ + i];
        sum = sum * mine[query] + double(sums_[query * value_width_ + i]) * others[query];
      }
    clear(count);
  }

  // Takes back what was folded.
  void unfold(const double* whole, int64_t count) {
    for (int64_t query = 0; query < count; ++query)
      for (int64_t i = 0; i < value_dim_; ++i)
        sums_[query * value_width_ + i] = Sum(whole[query * value_dim_ + i]);
  }

  // Writes each query's sums times its factor to its row.
  template <class To>
  void write(To* const* rows, const Sum* factors, int64_t count) {
    for (int64_t query = 0; query < count; ++query)
      for (int64_t i = 0; i < value_dim_; ++i)
        rows[query][i] = narrow<To>(sums_[query * value_width_ + i] * factors[query]);
  }

 private:
  static constexpr int64_t kAtOnce = 2 * kLanes<Sum>;

  struct Wide {
    const Sum* rows;
    int64_t stride;
  };

  // The values as whole vectors of sums' numbers: where they lie, if they are that.
  Wide widen(const T* values, int64_t stride, int64_t count) {
    if constexpr (std::is_same_v<T, Sum>)
      if (value_dim_ == value_width_) return {values, stride};
    pack_columns(
        widened_, value_width_, [&](int64_t row) { return values + row * stride; }, count,
        value_dim_);
    return {widened_, value_width_};
  }

  void clear(int64_t count) { std::memset(sums_, 0, size_t(count * value_width_) * sizeof(Sum)); }

  int64_t head_dim_, value_dim_, depth_, value_width_;
  Unit *query_, *keys_;             // [query][depth] and, of some keys, [depth][kAtOnce]
  Sum *scores_, *sums_, *widened_;  // [query][kTile], [query][value_width], [kTile][value_width]
};

}  // namespace prefixattn::PREFIXATTN_ISA
