// The softmax of plain scores beside tiles: 32 queries, a strip, in two vectors, and a weight for
// each key of a chunk, two keys at a time.
//
// No maximum is looked for in the loop. A query has a *level*: the largest score of the first chunk
// it sees, in base 2. A weight is 2^(score - level), and may be more than 1. Where a chunk's
// weights pass a limit, which scores of a usual kind never do, the level is raised by a whole
// number, what was summed so far is multiplied by an exact power of two, and the chunk is done
// again. So the loop has neither a maximum nor factors for the sums of values.
#pragma once

#include "block.h"

#if defined(PREFIXATTN_TILES)

namespace prefixattn::PREFIXATTN_ISA {

constexpr int kStrip = 32;  // lanes: two vectors, and the columns of two tiles

// A weight of 1 is kept as 2^kHeadroom. The limit of a chunk's sum leaves as many chunks as one
// sum of a long row takes in, and is above what a chunk's own maximum can lead to.
constexpr float kMostOfChunk = 0x1p-10f;
// Levels are raised where a score passes them by more: 2^8 times 64 keys are the limit.
constexpr float kSlack = 8;

// The running softmax of a strip. What a lane sees of the chunk at hand are the keys from `first`
// to `last`, counted from where `Weights` is told.
struct StripSoftmax {
  alignas(64) float level[kStrip], total[kStrip];  // a level of -inf: nothing seen yet
  alignas(64) int32_t first[kStrip], last[kStrip];
  bool unset;  // whether some lane has seen nothing yet

  void begin() {
    for (int lane = 0; lane < kStrip; ++lane) level[lane] = -INFINITY, total[lane] = 0;
    unset = true;
  }

  // Sets the levels that were not set, by each lane's largest score.
  void set(const float* scores, int64_t keys, int64_t slot, float scale) {
    look(scores, keys, slot, scale, false, [](int, Vector<float>) {});
  }

  // And raises those that a score passes by more than the slack. Calls `rescale(lane, factors)`
  // with what the vector of sums from `lane` on has to be multiplied by.
  template <class Rescale>
  void raise(const float* scores, int64_t keys, int64_t slot, float scale, const Rescale& rescale) {
    look(scores, keys, slot, scale, true, rescale);
  }

 private:
  template <class Rescale>
  void look(const float* scores, int64_t keys, int64_t slot, float scale, bool raising,
            const Rescale& rescale) {
    unset = false;
    for (int lane = 0; lane < kStrip; lane += kLanes<float>) {
      Vector<float> top = broadcast(-INFINITY);
      for (int64_t key = 0; key < keys; ++key) {
        const Vector<float> scored = load(scores + key * kStrip + lane) * scale;
        top = maximum<float>(top, seen(scored, lane, slot + key));
      }
      const Vector<float> old = load(level + lane);
      const Vector<float> rise = top - old;  // infinite, or NaN, where nothing was seen
      const auto fresh = old == -INFINITY, raised = (rise > kSlack) & ~fresh & (raising ? -1 : 0);
      const Vector<float> whole = (Vector<float>)_mm512_roundscale_ps((__m512)rise, 10);
      const Vector<float> next = fresh ? top : raised ? old + whole : old;
      const Vector<float> factors = raised ? exp2(-whole) : broadcast(1.0f);
      store(level + lane, next);
      store(total + lane, load(total + lane) * factors);
      rescale(lane, factors);
      for (int i = 0; i < kLanes<float>; ++i) unset |= next[i] == -INFINITY;
    }
  }

  // -inf where a lane does not see a slot.
  Vector<float> seen(Vector<float> scores, int lane, int64_t slot) const {
    const int32_t at = int32_t(slot);
    const auto visible = (load(first + lane) <= at) & (load(last + lane) > at);
    return visible ? scores : broadcast(-INFINITY);
  }
};

// Makes weights of scores [key][kStrip], as the right side of a product over keys: pairs of
// bfloat16 [key / 2][kStrip]. Each call of `next` makes those of two keys for one of the strip's
// two vectors, as work for the vector units between two products of tiles.
template <bool masked>
class Weights {
 public:
  Weights(const StripSoftmax& softmax, const float* scores, Pair* to, int64_t keys, int64_t slot,
          float scale)
      : softmax_(softmax), scores_(scores), to_(to), pairs_(keys / 2), slot_(slot),
        scale_(broadcast(scale)) {}

  void begin(int lane) {
    const Vector<float> level = load(softmax_.level + lane);
    level_ = (level == -INFINITY ? Vector<float>{} : level) - float(kHeadroom);
    if (masked) first_ = load(softmax_.first + lane), last_ = load(softmax_.last + lane);
    from_ = scores_ + lane, into_ = to_ + lane, key_ = int32_t(slot_), left_ = pairs_;
    sums_[0] = sums_[1] = Vector<float>{};
  }

  __attribute__((always_inline)) void next() {
    if (left_ == 0) return;
    --left_;
    const Vector<float> even = weight(load(from_), key_);
    const Vector<float> odd = weight(load(from_ + kStrip), key_ + 1);
    store(reinterpret_cast<uint32_t*>(into_), pairs(even, odd));
    sums_[0] += even, sums_[1] += odd;
    // GCC would keep the weights of many calls, and add them up later.
    asm volatile("" : "+v"(sums_[0]), "+v"(sums_[1]));
    from_ += 2 * kStrip, into_ += kStrip, key_ += 2;
  }

  // Does what is left, and returns the sum of all.
  Vector<float> finish() {
    while (left_ > 0) next();
    return sums_[0] + sums_[1];
  }

 private:
  Vector<float> weight(Vector<float> score, [[maybe_unused]] int32_t key) const {
    Vector<float> power =
        (Vector<float>)_mm512_fmsub_ps((__m512)score, (__m512)scale_, (__m512)level_);
    if (masked) power = (first_ <= key) & (last_ > key) ? power : broadcast(-INFINITY);
    return exp2(power);
  }

  // Rounded to the nearest bfloat16, halves away from 0. By shuffles, which have a unit of their
  // own, where shifts would take turns with the polynomials.
  static Vector<uint32_t> pairs(Vector<float> even, Vector<float> odd) {
    const auto rounded = [](Vector<float> x) { return bits_as<Vector<uint32_t>>(x) + 0x8000u; };
    const __m512i high_to_low = _mm512_broadcast_i32x4(
        _mm_setr_epi8(2, 3, 2, 3, 6, 7, 6, 7, 10, 11, 10, 11, 14, 15, 14, 15));
    const __m512i low = _mm512_shuffle_epi8((__m512i)rounded(even), high_to_low);
    return (Vector<uint32_t>)_mm512_mask_mov_epi16(low, 0xAAAAAAAA, (__m512i)rounded(odd));
  }

  const StripSoftmax& softmax_;
  const float* const scores_;
  Pair* const to_;
  const int64_t pairs_, slot_;
  const Vector<float> scale_;
  Vector<float> level_, sums_[2];
  Vector<int32_t> first_, last_;
  const float* from_ = nullptr;
  Pair* into_ = nullptr;
  int32_t key_ = 0;
  int64_t left_ = 0;
};

}  // namespace prefixattn::PREFIXATTN_ISA

#endif
