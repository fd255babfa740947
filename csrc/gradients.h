// The backward of one block: it walks over the tiles once more and adds to the gradients.
//
// With weights w = exp((score - lse) - lse_rest) and d = sum(dout * out) - dlse, the gradient of a
// score is w (dout . value - d) (Dao et al., "FlashAttention", 2022, appendix B.2).
#pragma once

#include "block.h"
#include "variant.h"

namespace prefixattn::PREFIXATTN_ISA {

// Sums of gradients of one head's keys and values, [keys][width]; null where nobody asked.
template <class Sum>
struct Sums {
  Sum *key, *value;
};

// One thread's backward of one block after another.
template <class T>
class Backward {
 public:
  using Unit = UnitOf<T>;
  using Sum = SumOf<T>;

  Backward(const Arguments& a, Arena& arena) : arguments_(a), folds_(has_long_rows(a)), block_(a) {
    arena.plan(&query_, depth_of<Unit>(a.head_dim) * kBlock);
    arena.plan(&dout_, depth_of<Unit>(a.value_dim) * kBlock);
    arena.plan(&out_, depth_of<Unit>(a.value_dim) * kBlock);
    arena.plan(&query_columns_, units<Unit>(kBlock) * key_width());
    arena.plan(&dout_columns_, units<Unit>(kBlock) * value_width());
    arena.plan(&packed_,
               kTile * depth_of<Unit>(a.head_dim > a.value_dim ? a.head_dim : a.value_dim));
    arena.plan(&key_columns_, room_over_rows<Unit>(a.head_dim));
    arena.plan(&operand_, units<Unit>(kTile * kBlock));
    arena.plan(&weights_, kTile * kBlock);
    arena.plan(&gradients_, kTile * kBlock);
    arena.plan(&slopes_, a.softcap > 0 ? kTile * kBlock : 0);
    arena.plan(&dquery_, a.head_dim * kBlock);
    arena.plan(&whole_, folds_ ? a.head_dim * kBlock : 0);
  }

  // Numbers from one key's sums to the next.
  int64_t key_width() const { return round_up(arguments_.head_dim, kLanes<Sum>); }
  int64_t value_width() const { return round_up(arguments_.value_dim, kLanes<Sum>); }

  Block<T>& block() { return block_; }

  // Packs the block that was filled in, and what comes from upstream at its queries.
  void begin() {
    const Arguments& a = arguments_;
    const T *queries[kBlock], *douts[kBlock], *outs[kBlock];
    for (int64_t lane = 0; lane < kBlock; ++lane) {
      const bool real = lane < block_.count;
      const Lane& at_lane = block_.lanes[real ? lane : 0];
      queries[lane] = at<T>(a.query, at_lane);
      douts[lane] = at<T>(a.dout, at_lane);
      const int64_t place = place_of(a, at_lane);
      const Sum lse = static_cast<const Sum*>(a.lse)[place];
      lse_rest_[lane] = real ? static_cast<const Sum*>(a.lse_rest)[place] : Sum(0);
      // Queries that see nothing, and lanes without one, get weights of exp(-inf).
      lse_[lane] = !real || lse == -Sum(INFINITY) ? Sum(INFINITY) : lse;
      outs[lane] = at<T>(a.out, at_lane);
    }
    pack(query_, queries, a.head_dim);
    pack(dout_, douts, a.value_dim);
    sum_delta(outs);
    pack_columns(
        query_columns_, key_width(), [&](int64_t lane) { return queries[lane]; }, lanes(),
        a.head_dim);
    pack_columns(
        dout_columns_, value_width(), [&](int64_t lane) { return douts[lane]; }, lanes(),
        a.value_dim);
    std::memset(dquery_, 0, size_t(a.head_dim * kBlock) * sizeof(Sum));
    tiles_ = 0, folded_ = false;
  }

  // Adds what the slots in `range` give to the queries' gradient and to `sums`.
  void attend(Half half, const Source<T>& source, Interval range, Sums<Sum> sums) {
    if (!sums.key && !sums.value && !arguments_.dquery.data) return;
    Interval seen[kBlock];
    const Interval span = block_.span(half, range, seen);
    for (int64_t first = span.first; first < span.last; first += kTile) {
      const int64_t keys = overlap({first, first + kTile}, span).last - first;
      differentiate(half, source, seen, first, keys);
      if (sums.value) add_to_values(sums.value + first * value_width(), half, first, keys);
      if (capped()) bend(keys);
      if (sums.key)
        multiply(sums.key + first * key_width(), key_width(),
                 over_queries(operand_, gradients_, keys), query_columns_, key_width(), keys,
                 key_width() / kLanes<Sum>, units<Unit>(lanes()), Start::sum);
      if (!arguments_.dquery.data) continue;
      add_to_queries(source, first, keys);
      if (++tiles_ >= kTilesInRun && folds_) fold();
    }
  }

  // Writes the gradient of the block's queries.
  void finish() {
    if (!arguments_.dquery.data) return;
    if (folded_) fold();
    const int64_t numbers = arguments_.head_dim * kBlock;
    for (int64_t i = 0; folded_ && i < numbers; ++i) dquery_[i] = Sum(whole_[i]);
    alignas(64) Sum scale[kBlock];
    T* rows[kBlock];
    block_.rows(arguments_.dquery, rows);
    for (int64_t lane = 0; lane < kBlock; ++lane) scale[lane] = Sum(arguments_.scale);
    unpack_lanes(rows, dquery_, kBlock, scale, block_.count, arguments_.head_dim);
  }

  // Adds the gradients of the scores of some slots to that of their half's bias.
  void add_to_bias(Half half, const Source<T>& source, Interval range, const Bias& bias) {
    Interval seen[kBlock];
    const Interval span = block_.span(half, range, seen);
    const Variant variant{arguments_, half};
    for (int64_t first = span.first; first < span.last; first += kTile) {
      const int64_t keys = overlap({first, first + kTile}, span).last - first;
      differentiate(half, source, seen, first, keys);
      for (int64_t lane = 0; lane < block_.count; ++lane) {
        Sum* sums = static_cast<Sum*>(bias.data) + variant.place(bias, block_.lanes[lane]) +
                    first * bias.key;
        for (int64_t key = 0; key < keys; ++key)
          sums[key * bias.key] += gradients_[key * kBlock + lane];
      }
    }
  }

 private:
  // Takes what the run of tiles at hand gave to the queries' gradient into the sum of all.
  void fold() {
    const int64_t numbers = arguments_.head_dim * kBlock;
    for (int64_t i = 0; i < numbers; ++i)
      whole_[i] = (folded_ ? whole_[i] : 0) + double(dquery_[i]);
    std::memset(dquery_, 0, size_t(numbers) * sizeof(Sum));
    tiles_ = 0, folded_ = true;
  }

  void pack(Unit* to, const T* const* rows, int64_t width) const {
    pack_lanes(to, kBlock, [&](int64_t lane) { return rows[lane]; }, block_.count, width);
  }

  int64_t lanes() const { return block_.whole_lanes(); }
  int64_t vectors() const { return lanes() / kLanes<Sum>; }
  bool capped() const { return arguments_.softcap > 0; }

  // sum(dout * out) - dlse at each query, in the order in which `dot_products` sums dout . value:
  // of a query that sees one key both are the same number, and the gradient is 0.
  void sum_delta(const T* const* outs) {
    const Sum* dlse = static_cast<const Sum*>(arguments_.dlse);
    pack(out_, outs, arguments_.value_dim);
    const int64_t depth = depth_of<Unit>(arguments_.value_dim);
    for (int64_t lane = 0; lane < lanes(); lane += kLanes<Sum>) {
      Vector<Sum> delta{};
      for (int64_t first = 0; first < depth; first += kChain<T>) {
        Vector<Sum> sums{};
        for (int64_t unit = first; unit < depth && unit < first + kChain<T>; ++unit)
          sums = multiply_lanes(sums, out_ + unit * kBlock + lane, dout_ + unit * kBlock + lane);
        delta = first ? delta + sums : sums;
      }
      store(delta_ + lane, delta);
    }
    for (int64_t lane = 0; dlse && lane < block_.count; ++lane)
      delta_[lane] -= dlse[place_of(arguments_, block_.lanes[lane])];
  }

  // Weights (before dropout) and gradients of the scores of one tile.
  void differentiate(Half half, const Source<T>& source, const Interval* seen, int64_t first,
                     int64_t keys) {
    const Arguments& a = arguments_;
    const Variant variant{a, half};
    products(weights_, source.key + first * source.key_stride, source.key_stride, keys, a.head_dim,
             query_, vectors(), packed_);
    products(gradients_, source.value + first * source.value_stride, source.value_stride, keys,
             a.value_dim, dout_, vectors(), packed_);
    Sum scale = Sum(a.scale);
    if (!variant.plain()) {
      variant.template score<T>(weights_, capped() ? slopes_ : nullptr, block_.lanes, block_.count,
                                first, keys);
      scale = 1;
    }
    if (variant.dropped()) variant.drop(gradients_, block_.lanes, block_.count, first, keys);
    Limits<Sum> room;
    const Limits<Sum>* limits = block_.limit(seen, first, keys, room);
    for (int64_t lane = 0; lane < lanes(); lane += kLanes<Sum>) {
      const Vector<Sum> lse = load(lse_ + lane), rest = load(lse_rest_ + lane);
      const Vector<Sum> delta = load(delta_ + lane);
      for (int64_t key = 0; key < keys; ++key) {
        const int64_t at = key * kBlock + lane;
        Vector<Sum> scores = load(weights_ + at) * scale;
        if (limits) scores = hide(scores, *limits, lane, key);
        const Vector<Sum> weights = exp_for<T, 0>((scores - lse) - rest);
        store(weights_ + at, weights);
        store(gradients_ + at, weights * (load(gradients_ + at) - delta));
      }
    }
  }

  // Through the soft cap, to the gradients of scaled products.
  void bend(int64_t keys) {
    for (int64_t key = 0; key < keys; ++key)
      for (int64_t lane = 0; lane < block_.count; lane += kLanes<Sum>) {
        const int64_t at = key * kBlock + lane;
        store(gradients_ + at, load(gradients_ + at) * load(slopes_ + at));
      }
  }

  void add_to_values(Sum* sums, Half half, int64_t first, int64_t keys) {
    const Variant variant{arguments_, half};
    if (variant.dropped()) variant.drop(weights_, block_.lanes, block_.count, first, keys);
    multiply(sums, value_width(), over_queries(operand_, weights_, keys), dout_columns_,
             value_width(), keys, value_width() / kLanes<Sum>, units<Unit>(lanes()), Start::sum);
  }

  void add_to_queries(const Source<T>& source, int64_t first, int64_t keys) {
    const T* from = source.key + first * source.key_stride;
    const auto row = [&](int64_t key) { return from + key * source.key_stride; };
    multiply(dquery_, kBlock, over_rows(key_columns_, row, keys, arguments_.head_dim),
             over_keys(operand_, gradients_, keys, vectors()), kBlock, arguments_.head_dim,
             vectors(), depth_of<Unit>(keys), Start::sum);
  }

  [[maybe_unused]] Tiles tiles_of_thread_;
  const Arguments& arguments_;
  const bool folds_;
  Block<T> block_;
  alignas(64) Sum lse_[kBlock], lse_rest_[kBlock], delta_[kBlock];
  Unit *query_, *dout_, *out_, *query_columns_, *dout_columns_, *packed_, *key_columns_, *operand_;
  Sum *weights_, *gradients_, *slopes_, *dquery_;
  double* whole_;      // [head_dim][kBlock], of the runs of tiles before the one at hand
  int64_t tiles_ = 0;  // of the run at hand
  bool folded_ = false;
};

}  // namespace prefixattn::PREFIXATTN_ISA
