// The forward of one block: it walks over the tiles of prefix and sequence, where they lie, and
// keeps one softmax for both.
#pragma once

#include <tuple>

#include "by_lanes.h"
#include "by_rows.h"
#include "variant.h"

namespace prefixattn::PREFIXATTN_ISA {

// Writes a query's log-sum-exp, and what its rounding took, where they are asked for.
template <class Sum>
void write_log_sum(const Arguments& a, const Lane& at_lane, const SoftmaxState<Sum>& state,
                   int64_t lane) {
  const int64_t place = place_of(a, at_lane);
  if (a.lse) static_cast<Sum*>(a.lse)[place] = state.log_sum(lane);
  if (a.lse_rest) static_cast<Sum*>(a.lse_rest)[place] = state.log_sum_rest(lane);
}

// One thread's forward of one block after another.
template <class T>
class Forward {
 public:
  using Sum = SumOf<T>;

  Forward(const Arguments& a, std::atomic<bool>& failed)
      : arguments_(a), folds_(has_long_rows(a)), arena_(failed), block_(a) {
    by_lanes_.plan(arena_, a);
    by_rows_.plan(arena_, a);
    arena_.plan(&tile_, kTile * kBlock);
    arena_.plan(&values_, folds_ ? kBlock * a.value_dim : 0);
    ready_ = arena_.reserve();
  }

  bool ready() const { return ready_; }
  Block<T>& block() { return block_; }

  // Begins with the block that was filled in.
  void begin() {
    state_.begin();
    tiles_ = 0, folded_ = false;
    few() ? by_rows_.begin(block_) : by_lanes_.begin(block_);
  }

  // Takes in the slots of one half that lie in `range`.
  void attend(Half half, const Source<T>& source, Interval range) {
    Interval seen[kBlock];
    const Interval span = block_.span(half, range, seen);
    const Variant variant{arguments_, half};
    for (int64_t first = span.first; first < span.last; first += kTile) {
      const int64_t keys = overlap({first, first + kTile}, span).last - first;
      if (few()) fetch(source, overlap({first + kTile, first + 2 * kTile}, span));
      Limits<Sum> limits;
      absorb(variant, source, first, keys, block_.limit(seen, first, keys, limits));
      if (++tiles_ >= kTilesInRun && folds_) fold();
    }
  }

  // Writes output and lse of the block.
  void finish() {
    unfold();
    const double* sinks = arguments_.sinks;
    alignas(64) Sum factors[kBlock] = {};
    T* rows[kBlock];
    block_.rows(arguments_.out, rows);
    for (int64_t lane = 0; lane < block_.count; ++lane) {
      const Lane& at_lane = block_.lanes[lane];
      factors[lane] = state_.normalise(lane, sinks ? sinks + at_lane.head : nullptr);
      write_log_sum(arguments_, at_lane, state_, lane);
    }
    write(rows, factors);
  }

  // Writes the block's unfinished state to its places among `peaks`, `totals` and `values`.
  void keep(Sum* peaks, Sum* totals, Sum* values) {
    unfold();
    alignas(64) Sum ones[kBlock];
    Sum* rows[kBlock];
    for (int64_t lane = 0; lane < kBlock; ++lane) ones[lane] = 1;
    for (int64_t lane = 0; lane < block_.count; ++lane) {
      const int64_t place = place_of(arguments_, block_.lanes[lane]);
      peaks[place] = state_.peak[lane];
      totals[place] = state_.total[lane];
      rows[lane] = values + place * arguments_.value_dim;
    }
    write(rows, ones);
  }

 private:
  // Asks for the slots in `range`, which come in while others are worked on: few queries have too
  // little work on each key to wait for it, and between two layers a model's weights have driven
  // them out of any cache. Inlined by force, since GCC drops the call of a function that only asks.
  __attribute__((always_inline)) void fetch(const Source<T>& source, Interval range) const {
    constexpr int64_t line = 64 / int64_t(sizeof(T));
    for (int64_t slot = range.first; slot < range.last; ++slot) {
      for (int64_t i = 0; i < arguments_.head_dim; i += line)
        __builtin_prefetch(source.key + slot * source.key_stride + i, 0, 2);
      for (int64_t i = 0; i < arguments_.value_dim; i += line)
        __builtin_prefetch(source.value + slot * source.value_stride + i, 0, 2);
    }
  }

  // Takes the run of tiles at hand into the state of all.
  void fold() {
    if (!folded_) {
      whole_.begin();
      std::memset(values_, 0, size_t(kBlock * arguments_.value_dim) * sizeof(double));
    }
    double mine[kBlock], others[kBlock];
    for (int64_t lane = 0; lane < block_.count; ++lane)
      std::tie(mine[lane], others[lane]) =
          whole_.merge(lane, double(state_.peak[lane]), double(state_.total[lane]));
    few() ? by_rows_.fold(values_, mine, others, block_.count)
          : by_lanes_.fold(values_, mine, others, block_.count);
    state_.begin();
    tiles_ = 0, folded_ = true;
  }

  // Makes the block's state that of all its tiles.
  void unfold() {
    if (!folded_) return;
    if (tiles_ > 0) fold();
    for (int64_t lane = 0; lane < block_.count; ++lane) {
      state_.peak[lane] = Sum(whole_.peak[lane]);
      state_.total[lane] = Sum(whole_.total[lane]);
    }
    few() ? by_rows_.unfold(values_, block_.count) : by_lanes_.unfold(values_);
  }

  bool few() const { return block_.count < kFewQueries<T>; }

  template <class To>
  void write(To* const* rows, const Sum* factors) {
    few() ? by_rows_.write(rows, factors, block_.count)
          : by_lanes_.write(rows, factors, block_.count);
  }

  void absorb(const Variant& variant, const Source<T>& source, int64_t first, int64_t keys,
              const Limits<Sum>* limits) {
    const T* key = source.key + first * source.key_stride;
    const T* value = source.value + first * source.value_stride;
    alignas(64) Sum factors[kBlock];
    few() ? by_rows_.score(block_, key, source.key_stride, keys, tile_)
          : by_lanes_.score(block_, key, source.key_stride, keys, tile_);
    Sum scale = Sum(arguments_.scale);
    if (!variant.plain()) {
      variant.score<T>(tile_, static_cast<Sum*>(nullptr), block_.lanes, block_.count, first, keys);
      scale = 1;
    }
    state_.template absorb<T>(tile_, keys, block_.vectors(), scale, limits, factors);
    if (variant.dropped()) variant.drop(tile_, block_.lanes, block_.count, first, keys);
    few() ? by_rows_.add(block_, value, source.value_stride, keys, tile_, factors)
          : by_lanes_.add(block_, value, source.value_stride, keys, tile_, factors);
  }

  [[maybe_unused]] Tiles tiles_of_thread_;
  const Arguments& arguments_;
  const bool folds_;
  Arena arena_;
  Block<T> block_;
  SoftmaxState<Sum> state_;
  ByLanes<T> by_lanes_;
  ByRows<T> by_rows_;
  Sum* tile_;                   // [kTile][kBlock]
  SoftmaxState<double> whole_;  // of the runs of tiles before the one at hand, if `folded_`
  double* values_;              // theirs: [value_dim][kBlock] or [query][value_dim]
  int64_t tiles_ = 0;           // of the run at hand
  bool folded_ = false, ready_;
};

}  // namespace prefixattn::PREFIXATTN_ISA
