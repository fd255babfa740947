#include "tile_weights.h"

#include "check.h"

using namespace prefixattn::PREFIXATTN_ISA;

#if defined(PREFIXATTN_TILES)

namespace {

constexpr int64_t kKeys = 64;
constexpr float kScale = 0.75f;

bool near(double got, double wanted, double share) {
  return got == wanted || std::abs(got - wanted) <= share * std::abs(wanted);
}

void check_exp2() {
  CHECK(exp2(broadcast(0.0f))[0] == 1 && exp2(broadcast(3.0f))[0] == 8);
  CHECK(exp2(broadcast(-INFINITY))[0] == 0 && exp2(broadcast(-1e30f))[0] == 0);
  CHECK(exp2(broadcast(INFINITY))[0] == INFINITY && exp2(broadcast(200.0f))[0] == INFINITY);
  CHECK(std::isnan(exp2(broadcast(NAN))[0]));
  for (float x = -120; x < 120; x += 0.00137f)
    CHECK(near(exp2(broadcast(x))[5], std::exp2(double(x)), 3.5e-6));
}

// Scores [key][kStrip], of which each lane sees some: lane 0 none, lane 1 all.
struct Scores {
  alignas(64) float scores[kKeys * kStrip];
  StripSoftmax softmax;

  explicit Scores(uint64_t seed, float size) {
    check::Random random(seed);
    for (float& score : scores) score = size * float(random.number());
    for (int lane = 0; lane < kStrip; ++lane) {
      softmax.first[lane] = lane < 2 ? 0 : int32_t(random.whole(0, kKeys));
      softmax.last[lane] = lane < 2 ? int32_t(lane * kKeys) : int32_t(random.whole(0, kKeys));
    }
    softmax.begin();
  }
  bool sees(int64_t key, int lane) const {
    return key >= softmax.first[lane] && key < softmax.last[lane];
  }
  double score(int64_t key, int lane) const { return double(scores[key * kStrip + lane]) * kScale; }
  double top(int lane) const {
    double top = -INFINITY;
    for (int64_t key = 0; key < kKeys; ++key)
      if (sees(key, lane)) top = std::max(top, score(key, lane));
    return top;
  }
};

template <bool masked>
void check_weights() {
  Scores s(1, 20);
  s.softmax.set(s.scores, kKeys, 0, kScale);
  CHECK(s.softmax.unset);  // lane 0
  Pair pairs[kKeys / 2 * kStrip];
  Weights<masked> weights(s.softmax, s.scores, pairs, kKeys, 0, kScale);
  for (int start = 0; start < kStrip; start += kLanes<float>) {
    weights.begin(start);
    for (int i = 0; i < 7; ++i) weights.next();
    const Vector<float> sums = weights.finish();
    weights.next();  // there are no more
    for (int lane = start; lane < start + kLanes<float>; ++lane) {
      const float level = s.softmax.level[lane];
      CHECK(level == -INFINITY ? s.top(lane) == -INFINITY : near(level, s.top(lane), 1e-6));
      double total = 0;
      for (int64_t key = 0; key < kKeys; ++key) {
        const double power = s.score(key, lane) - (level == -INFINITY ? 0 : level);
        const double wanted =
            masked && !s.sees(key, lane) ? 0 : std::ldexp(std::exp2(power), kHeadroom);
        const uint32_t bits = pairs[key / 2 * kStrip + lane].bits;
        CHECK(near(widen(Bfloat16{uint16_t(key % 2 ? bits >> 16 : bits)}), wanted, 0x1.1p-8));
        total += wanted;
      }
      CHECK(near(sums[lane - start], total, 2e-5));
    }
  }
}

// Levels rise by whole numbers, where a score passes them by more than the slack.
void check_raise() {
  Scores low(2, 1), high(2, 40);
  low.softmax.set(low.scores, kKeys, 0, kScale);
  StripSoftmax softmax = low.softmax;
  for (float& total : softmax.total) total = 3;
  softmax.raise(high.scores, kKeys, 0, kScale, [&](int lane, Vector<float> factors) {
    for (int i = 0; i < kLanes<float>; ++i) {
      const float old = low.softmax.level[lane + i], now = softmax.level[lane + i];
      if (old == -INFINITY) continue;
      const double rise = high.top(lane + i) - double(old);
      CHECK(rise > kSlack ? now >= old + rise - 1e-4 && now < old + rise + 1 : now == old);
      CHECK(near(factors[i], std::exp2(double(old) - double(now)), 1e-6));
    }
  });
  for (int lane = 0; lane < kStrip; ++lane)
    if (low.softmax.level[lane] != -INFINITY)
      CHECK(near(softmax.total[lane],
                 3 * std::exp2(double(low.softmax.level[lane]) - double(softmax.level[lane])),
                 1e-6));
  StripSoftmax same = low.softmax;
  same.set(high.scores, kKeys, 0, kScale);  // sets what was not set, and raises nothing
  for (int lane = 0; lane < kStrip; ++lane)
    CHECK(same.level[lane] == low.softmax.level[lane] || low.softmax.level[lane] == -INFINITY);
}

}  // namespace

int main() {
  check_exp2();
  check_weights<true>();
  check_weights<false>();
  check_raise();
  return check::finish();
}

#else

int main() { return check::finish(); }

#endif
