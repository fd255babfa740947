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
    arena.plan(&keys_, depth_ * kTile);
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

  // Products [key][kBlock] of some keys and the block's queries.
  void score(const Block<T>& block, const T* keys, int64_t stride, int64_t count, Sum* tile) {
    int64_t done = 0;  // keys
    switch (block.count) {
      case 1: done = multiply_squares<1>(keys, stride, count); break;
      case 2: done = multiply_squares<2>(keys, stride, count); break;
      case 3: done = multiply_squares<3>(keys, stride, count); break;
      case 4: done = multiply_squares<4>(keys, stride, count); break;
    }
    const int64_t left = count - done;
    const T* from = keys + done * stride;
    pack_lanes(keys_, kTile, [&](int64_t key) { return from + key * stride; }, left, head_dim_);
    dot_products<T>(scores_ + done, kTile, Left<Unit>{query_, depth_, 1}, keys_, kTile, block.count,
                    ceil_div(left, kLanes<Sum>), depth_);
    spread(tile, block.count, count);
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
  static constexpr int64_t kSingly = 4;

  struct Wide {
    const Sum* rows;
    int64_t stride;
  };

  // `dot_products` of very few queries and as many keys as fill vectors; returns how many. Keys are
  // multiplied as they come out of their transposition, in the order of that function.
  template <int queries>
  int64_t multiply_squares(const T* keys, int64_t stride, int64_t count) {
    constexpr int lanes = kLanes<Sum>;
    static_assert(kChain<T> % lanes == 0);
    const auto row_at = [&](int64_t key) { return keys + key * stride; };
    const int64_t whole = count - count % lanes;
    for (int64_t key = 0; key < whole; key += lanes) {
      Vector<Sum> sums[queries] = {}, chain[queries] = {};
      for (int64_t unit = 0; unit < depth_; unit += lanes) {
        Vector<Bits<Unit>> square[lanes];
        load_square<Unit>(square, row_at, key, whole, unit, head_dim_);
        const int64_t some = depth_ - unit < lanes ? depth_ - unit : lanes;
        const auto multiply_one = [&](int i) __attribute__((always_inline)) {
#pragma GCC unroll 4
          for (int query = 0; query < queries; ++query)
            chain[query] =
                multiply_add(chain[query], query_ + query * depth_ + unit + i, square[i]);
        };
        if (some == lanes) {
#pragma GCC unroll 16
          for (int i = 0; i < lanes; ++i) multiply_one(i);
        } else {
          for (int i = 0; i < some; ++i) multiply_one(i);
        }
        if ((unit + lanes) % kChain<T> != 0 && unit + lanes < depth_) continue;
        for (int query = 0; query < queries; ++query) {
          sums[query] = unit < kChain<T> ? chain[query] : chain[query] + sums[query];
          chain[query] = Vector<Sum>{};
        }
      }
      for (int query = 0; query < queries; ++query)
        store(scores_ + query * kTile + key, sums[query]);
    }
    return whole;
  }

  // tile [key][kBlock] of scores [query][kTile], blank lanes too. Very few go one by one.
  void spread(Sum* tile, int64_t queries, int64_t count) const {
    if (queries > kSingly) {
      const auto row = [&](int64_t query) -> const Sum* { return scores_ + query * kTile; };
      return pack_lanes(tile, kBlock, row, queries, count);
    }
    for (int64_t key = 0; key < count; ++key) {
      Sum* const to = tile + key * kBlock;
      for (int64_t lane = 0; lane < kWholeLanes<Sum>; lane += kLanes<Sum>)
        store(to + lane, Vector<Sum>{});
      for (int64_t query = 0; query < queries; ++query) to[query] = scores_[query * kTile + key];
    }
  }

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
  Unit *query_, *keys_;             // [query][depth] and, of one tile, [depth][kTile]
  Sum *scores_, *sums_, *widened_;  // [query][kTile], [query][value_width], [kTile][value_width]
};

}  // namespace prefixattn::PREFIXATTN_ISA
