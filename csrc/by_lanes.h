// The forward's two products with a query in each lane: the way of full blocks.
#pragma once

#include "block.h"

namespace prefixattn::PREFIXATTN_ISA {

template <class T>
class ByLanes {
 public:
  using Unit = UnitOf<T>;
  using Sum = SumOf<T>;

  void plan(Arena& arena, const Arguments& a) {
    head_dim_ = a.head_dim, value_dim_ = a.value_dim;
    arena.plan(&query_, depth_of<Unit>(head_dim_) * kBlock);
    arena.plan(&key_, kTile * depth_of<Unit>(head_dim_));
    arena.plan(&value_, room_over_rows<Unit>(value_dim_));
    arena.plan(&weights_, units<Unit>(kTile) * kBlock);
    arena.plan(&sums_, value_dim_ * kBlock);
  }

  void begin(const Block<T>& block) {
    T* rows[kBlock];
    block.rows(block.arguments.query, rows);
    pack_lanes(query_, kBlock, [&](int64_t lane) { return rows[lane]; }, block.count, head_dim_);
    fresh_ = true;
  }

  // Products [key][kBlock] of some keys and the block's queries.
  void score(const Block<T>& block, const T* keys, int64_t stride, int64_t count, Sum* tile) {
    products(tile, keys, stride, count, head_dim_, query_, block.vectors(), key_);
  }

  // sums = sums * factors + weights * values, for a tile of weights [key][kBlock].
  void add(const Block<T>& block, const T* values, int64_t stride, int64_t count, const Sum* tile,
           const Sum* factors) {
    const auto row = [&](int64_t key) { return values + key * stride; };
    multiply(sums_, kBlock, over_rows(value_, row, count, value_dim_),
             over_keys(weights_, tile, count, block.vectors()), kBlock, value_dim_, block.vectors(),
             depth_of<Unit>(count), fresh_ ? Start::zero : Start::scaled, factors);
    fresh_ = false;
  }

  // whole = whole * mine + sums * others, lane by lane, and no sums any more.
  void fold(double* whole, const double* mine, const double* others, int64_t count) {
    for (int64_t i = 0; i < value_dim_; ++i)
      for (int64_t lane = 0; lane < count; ++lane) {
        double& sum = whole[i * kBlock + lane];
        sum = sum * mine[lane] + double(sums_[i * kBlock + lane]) * others[lane];
      }
    fresh_ = true;
  }

  // Takes back what was folded.
  void unfold(const double* whole) {
    for (int64_t i = 0; i < value_dim_ * kBlock; ++i) sums_[i] = Sum(whole[i]);
    fresh_ = false;
  }

  // Writes each lane's sums times its factor to its row.
  template <class To>
  void write(To* const* rows, const Sum* factors, int64_t count) {
    if (fresh_) std::memset(sums_, 0, size_t(value_dim_ * kBlock) * sizeof(Sum));
    unpack_lanes(rows, sums_, kBlock, factors, count, value_dim_);
  }

 private:
  int64_t head_dim_, value_dim_;
  bool fresh_;
  Unit *query_, *key_, *value_, *weights_;
  Sum* sums_;  // [value_dim][kBlock]
};

}  // namespace prefixattn::PREFIXATTN_ISA
