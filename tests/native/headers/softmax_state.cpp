#include "softmax_state.h"

#include <algorithm>
#include <limits>

#include "check.h"

using namespace prefixattn;
using namespace prefixattn::PREFIXATTN_ISA;

namespace {

constexpr int64_t kKeys = 40;

template <class Sum>
constexpr double kUnit = sizeof(Sum) == 8 ? 1e-14 : 1e-6;

template <class Sum>
bool near(double got, double wanted) {
  return got == wanted ||
         std::abs(got - wanted) <= 8 * kUnit<Sum> * std::max(1.0, std::abs(wanted));
}

// A tile of scores, and which keys each lane sees: blind lanes, whole ones, and all between.
template <class Sum>
struct Tile {
  std::vector<Sum> scores;
  std::vector<int64_t> first, last;

  Tile() : scores(kKeys * kBlock) {
    check::Random random(4);
    for (Sum& score : scores) score = Sum(8 * random.number());
    for (int lane = 0; lane < kBlock; ++lane) {
      first.push_back(lane % 5 == 0 ? 0 : random.whole(0, kKeys));
      last.push_back(lane % 5 == 0 ? kKeys : random.whole(0, kKeys));
    }
  }
  bool sees(int64_t key, int64_t lane) const {
    return key >= first[size_t(lane)] && key < last[size_t(lane)];
  }
  double at(int64_t key, int64_t lane) const { return double(scores[size_t(key * kBlock + lane)]); }
  Limits<Sum> limits(int64_t from, int64_t to) const {
    Limits<Sum> limits;
    for (int lane = 0; lane < kBlock; ++lane) {
      limits.first[lane] = Integer<Sum>(std::clamp(first[size_t(lane)], from, to) - from);
      limits.last[lane] = Integer<Sum>(std::clamp(last[size_t(lane)], from, to) - from);
    }
    return limits;
  }
};

// Takes the tile in by pieces and compares weights, sums and what they leave in the state.
template <class Sum>
void check_absorb(const Tile<Sum>& tile, int64_t pieces, Sum scale) {
  alignas(64) Sum factors[kBlock];
  std::vector<double> sums(kBlock);
  SoftmaxState<Sum> state;
  state.begin();
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t from = piece * kKeys / pieces, to = (piece + 1) * kKeys / pieces;
    std::vector<Sum> weights(tile.scores.begin() + from * kBlock,
                             tile.scores.begin() + to * kBlock);
    const Limits<Sum> limits = tile.limits(from, to);
    state.template absorb<Sum>(weights.data(), to - from, kBlock / kLanes<Sum>, scale, &limits,
                               factors);
    for (int lane = 0; lane < kBlock; ++lane) {
      sums[size_t(lane)] *= double(factors[lane]);
      for (int64_t key = 0; key < to - from; ++key) {
        const double weight = double(weights[size_t(key * kBlock + lane)]);
        CHECK(tile.sees(from + key, lane) || weight == 0);
        sums[size_t(lane)] += weight * double(from + key);  // as if values were key numbers
      }
    }
  }
  for (int lane = 0; lane < kBlock; ++lane) {
    double total = 0, mean = 0;
    for (int64_t key = 0; key < kKeys; ++key) {
      if (!tile.sees(key, lane)) continue;
      const double weight = std::exp(double(scale) * tile.at(key, lane));
      total += weight, mean += weight * double(key);
    }
    CHECK(near<Sum>(double(state.log_sum(lane)), std::log(total)));
    const double factor = double(state.normalise(lane, nullptr));
    CHECK(total == 0 ? factor == 0 : near<Sum>(sums[size_t(lane)] * factor, mean / total));
  }
}

// A tile that is seen whole needs no limits, and touches no more vectors than it is told of.
template <class Sum>
void check_whole(const Tile<Sum>& tile) {
  alignas(64) Sum factors[kBlock];
  SoftmaxState<Sum> state;
  state.begin();
  std::vector<Sum> weights = tile.scores;
  state.template absorb<Sum>(weights.data(), kKeys, 1, Sum(0.5), nullptr, factors);
  for (int lane = 0; lane < kBlock; ++lane) {
    double total = 0;
    for (int64_t key = 0; key < kKeys; ++key) total += std::exp(0.5 * tile.at(key, lane));
    if (lane < kLanes<Sum>)
      CHECK(near<Sum>(double(state.log_sum(lane)), std::log(total)));
    else
      CHECK(state.total[lane] == 0 && weights[size_t(lane)] == tile.scores[size_t(lane)]);
  }
}

// Merging states over two sets of keys is one state over both; a sink is a key without a value.
template <class Sum>
void check_merge() {
  SoftmaxState<Sum> state;
  state.begin();
  CHECK(state.log_sum(0) == -Sum(INFINITY) && state.normalise(0, nullptr) == 0);
  auto factors = state.merge(0, -Sum(INFINITY), Sum(0));
  CHECK(factors.first == 0 && factors.second == 0 && state.total[0] == 0);
  const Sum one = kOne<Sum>;
  factors = state.merge(0, Sum(3), 2 * one);
  CHECK(factors.first == 0 && factors.second == 1 && state.peak[0] == 3);
  CHECK(state.total[0] == 2 * one);
  factors = state.merge(0, -Sum(INFINITY), Sum(0));
  CHECK(factors.first == 1 && factors.second == 0 && state.total[0] == 2 * one);
  factors = state.merge(0, Sum(5), one);
  CHECK(near<Sum>(double(factors.first), std::exp(-2.0)) && factors.second == 1);
  const double total = 2 * std::exp(3.0) + std::exp(5.0), sink = 6;
  CHECK(near<Sum>(double(state.log_sum(0)), std::log(total)));
  const double factor = double(state.normalise(0, &sink));
  CHECK(near<Sum>(factor * one * std::exp(-5.0), 1 / (total + std::exp(sink))));
  CHECK(near<Sum>(double(state.log_sum(0)), std::log(total + std::exp(sink))));

  state.begin();
  state.normalise(1, &sink);  // of a query that sees nothing else
  CHECK(state.log_sum(1) == Sum(6));
}

// What lse lacks: of keys that are all hidden by the lowest number it is the log of their count.
template <class Sum>
void check_rest() {
  const Sum lowest = std::numeric_limits<Sum>::lowest();
  alignas(64) Sum factors[kBlock];
  SoftmaxState<Sum> state;
  state.begin();
  CHECK(state.log_sum_rest(0) == 0);  // of a query that sees nothing
  std::vector<Sum> tile(size_t(kKeys * kBlock), lowest);
  for (int lane = 0; lane < kBlock; lane += 2)
    for (int64_t key = 0; key < kKeys; ++key) tile[size_t(key * kBlock + lane)] = Sum(0.25);
  state.template absorb<Sum>(tile.data(), kKeys, kBlock / kLanes<Sum>, Sum(1), nullptr, factors);
  for (int lane = 0; lane < kBlock; ++lane) {
    const bool hidden = lane % 2;
    CHECK(hidden ? state.log_sum(lane) == lowest
                 : near<Sum>(state.log_sum(lane), 0.25 + std::log(double(kKeys))));
    CHECK(near<Sum>(state.log_sum_rest(lane), hidden ? std::log(double(kKeys)) : 0));
  }
}

template <class Sum>
void check_type() {
  const Tile<Sum> tile;
  for (const int64_t pieces : {1, 2, 5})
    for (const double scale : {1.0, 0.3, -0.7, 0.0}) check_absorb(tile, pieces, Sum(scale));
  check_whole(tile);
  check_merge<Sum>();
  check_rest<Sum>();
}

}  // namespace

int main() {
  check_type<float>();
  check_type<double>();
  return check::finish();
}
