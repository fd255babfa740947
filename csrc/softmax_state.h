// The running softmax of a block of queries, one in each lane (Milakov and Gimelshein, "Online
// normalizer calculation for softmax", 2018).
#pragma once

#include <cmath>

#include "functions.h"
#include "layouts.h"

namespace prefixattn::PREFIXATTN_ISA {

// Which slots each lane sees, counted from a tile's first.
template <class Sum>
struct Limits {
  alignas(64) Integer<Sum> first[kBlock], last[kBlock];
};

// -inf where a lane does not see a slot of the tile.
template <class Sum>
inline Vector<Sum> hide(Vector<Sum> scores, const Limits<Sum>& limits, int64_t lane, int64_t key) {
  const Integer<Sum> slot = Integer<Sum>(key);
  const auto seen = (load(limits.first + lane) <= slot) & (load(limits.last + lane) > slot);
  return seen ? scores : broadcast(-Sum(INFINITY));
}

// A weight of 1 is kept as 2^-24, so that the sum of as many values stays within the largest number
// wherever their mean does. It costs nothing: exp writes another exponent.
constexpr int kHeadroom = -24;
template <class Sum>
constexpr Sum kOne = Sum(0x1p-24);

template <class Sum>
struct SoftmaxState {
  alignas(64) Sum peak[kBlock], total[kBlock];

  void begin() {
    for (int lane = 0; lane < kBlock; ++lane) peak[lane] = -Sum(INFINITY), total[lane] = 0;
  }

  // Takes in a tile of products [keys][kBlock] and leaves weights, exp(scale * product - peak)
  // times kOne, in their place. `factors` is what sums of earlier weights have to be multiplied by.
  // With `limits` null the whole tile is seen. T is what the weights will be rounded to.
  template <class T>
  void absorb(Sum* tile, int64_t keys, int64_t vectors, Sum scale, const Limits<Sum>* limits,
              Sum* factors) {
    for (int64_t lane = 0; lane < vectors * kLanes<Sum>; lane += kLanes<Sum>) {
      Vector<Sum> highest = load(peak + lane);
      for (int64_t key = 0; key < keys; ++key) {
        Vector<Sum> scores = load(tile + key * kBlock + lane) * scale;
        if (limits) {
          scores = hide(scores, *limits, lane, key);
          store(tile + key * kBlock + lane, scores);
        }
        highest = maximum<Sum>(highest, scores);
      }
      // Nothing seen yet: any finite number serves, and all weights are 0.
      const Vector<Sum> level = highest == -Sum(INFINITY) ? Vector<Sum>{} : highest;
      const Vector<Sum> factor = exp(load(peak + lane) - level);
      const Sum pending = limits ? Sum(1) : scale;
      Vector<Sum> sum{};  // the tile's own, before it meets what may be a large number
      for (int64_t key = 0; key < keys; ++key) {
        Sum* at = tile + key * kBlock + lane;
        const Vector<Sum> weights = exp_for<T, kHeadroom>(load(at) * pending - level);
        sum += weights;
        store(at, weights);
      }
      store(peak + lane, highest);
      store(total + lane, fused(load(total + lane), factor, sum));
      store(factors + lane, factor);
    }
  }

  // Merges the state of the same query over other keys, or of a sink, into a lane. Returns what
  // this side's sums and the other's have to be multiplied by.
  std::pair<Sum, Sum> merge(int64_t lane, Sum other_peak, Sum other_total) {
    const Sum highest = peak[lane] < other_peak ? other_peak : peak[lane];
    const Sum level = highest == -Sum(INFINITY) ? Sum(0) : highest;
    const Sum mine = std::exp(peak[lane] - level), others = std::exp(other_peak - level);
    total[lane] = total[lane] * mine + other_total * others;
    peak[lane] = highest;
    return {mine, others};
  }

  // Takes in a sink, unless null, and returns the factor that makes the sums so far means.
  Sum normalise(int64_t lane, const double* sink) {
    const Sum mine = sink ? merge(lane, Sum(*sink), kOne<Sum>).first : Sum(1);
    return total[lane] == 0 ? Sum(0) : mine / total[lane];
  }

  // Natural log of the sum over all keys of e^score; -inf for a query that sees none.
  Sum log_sum(int64_t lane) const { return peak[lane] + log_total(lane); }

  // What rounding took from `log_sum`. Of a query all of whose keys have a score of finfo.min it is
  // the log of their number, without which each would have the whole weight in the backward.
  Sum log_sum_rest(int64_t lane) const {
    const Sum sum = log_sum(lane);
    return std::isfinite(sum) ? (peak[lane] - sum) + log_total(lane) : Sum(0);
  }

 private:
  Sum log_total(int64_t lane) const { return std::log(total[lane] / kOne<Sum>); }
};

}  // namespace prefixattn::PREFIXATTN_ISA
