// The forward of plain calls by tiles: products and softmax side by side.
//
// A task is up to 16 strips of 32 queries of one row and key head, which share what is packed of
// the keys: keys go in groups that stay in the second cache. Of a group, each strip takes in the
// chunks that it sees, 32 or 64 keys at a time, and one step does three things at once: the tiles
// multiply the *next* chunk's keys with the queries, the vectors make weights of *this* chunk's
// scores, and the tiles add values times the weights of the chunks *before*. No product waits for a
// softmax, and the vectors' instructions fill the cycles in which the tiles work. The stream of
// steps runs on from strip to strip, and is drained at the end of a group.
#pragma once

#include <tuple>

#include "tile_weights.h"
#include "variant.h"

#if defined(PREFIXATTN_TILES)

namespace prefixattn::PREFIXATTN_ISA {

// Four tiles of C, 32 rows by 32 columns at a stride of kStrip, in one product after another.
//
// To store a tile right after its last product costs 55 cycles, and nothing two products later: the
// lower half of C is stored within the product that comes next.
class Squares {
 public:
  // c = (zero ? 0 : c) + A B. A has 32 rows, `a_row` bytes apart, and steps of 64 bytes, `a_step`
  // apart; B lies as [step][16 pairs][kStrip]. `between` runs after each product of two tiles.
  template <class Between>
  __attribute__((always_inline)) void multiply(float* c, bool zero, const char* a, int64_t a_row,
                                               int64_t a_step, const Pair* b, int64_t steps,
                                               const Between& between) {
    zero ? tile_zero<0>() : tile_load<0>(c, kRow);
    zero ? tile_zero<1>() : tile_load<1>(c + kTileRows, kRow);
    float* const below = c + kTileRows * kStrip;
    for (int64_t step = 0; step < steps; ++step, a += a_step, b += kTilePairs * kStrip) {
      tile_load<6>(b, kRow);
      tile_load<7>(b + kTileRows, kRow);
      tile_load_once<4>(a, a_row);
      tile_multiply<0, 4, 6>(), between();
      tile_multiply<1, 4, 7>(), between();
      if (step == 0) {
        flush();
        zero ? tile_zero<2>() : tile_load<2>(below, kRow);
        zero ? tile_zero<3>() : tile_load<3>(below + kTileRows, kRow);
      }
      tile_load_once<5>(a + kTileRows * a_row, a_row);
      tile_multiply<2, 5, 6>(), between();
      tile_multiply<3, 5, 7>(), between();
    }
    tile_store<0>(c, kRow);
    tile_store<1>(c + kTileRows, kRow);
    late_ = below;
  }

  // Stores what is still in tiles.
  void flush() {
    if (late_ == nullptr) return;
    tile_store<2>(late_, kRow);
    tile_store<3>(late_ + kTileRows, kRow);
    late_ = nullptr;
  }

 private:
  static constexpr int64_t kRow = kStrip * int64_t(sizeof(float));
  float* late_ = nullptr;
};

// One thread's forward of one task after another.
class ByTiles {
 public:
  using T = Bfloat16;

  // Whether a call's scores are products times the scale, and nothing is dropped.
  static bool takes(const Arguments& a) {
    const Variant prefix{a, Half::prefix}, sequence{a, Half::sequence};
    return prefix.plain() && sequence.plain() && !prefix.dropped();
  }

  ByTiles(const Arguments& a, std::atomic<bool>& failed)
      : arguments_(a), steps_(round_up(a.head_dim, 32) / 32),
        blocks_(round_up(a.value_dim, 32) / 32), chunk_(steps_ > 2 ? 32 : 64),
        folds_(a.keys > kFoldAfter || a.prefix_tokens > kFoldAfter),
        scale_(float(a.scale * 1.4426950408889634)), arena_(failed) {
    const int64_t head_dim = steps_ * 32, value_dim = blocks_ * 32;
    arena_.plan(&strips_, kStrips);
    arena_.plan(&queries_, kStrips * head_dim / 2 * kStrip);
    arena_.plan(&sums_, kStrips * value_dim * kStrip);
    arena_.plan(&keys_, kGroup * head_dim / 2);
    arena_.plan(&values_, kGroup * value_dim / 2);
    arena_.plan(&nothing_, value_dim);
    for (float*& scores : scores_) arena_.plan(&scores, chunk_ * kStrip);
    for (Pair*& weights : weights_) arena_.plan(&weights, blocks_ * chunk_ / 2 * kStrip);
    arena_.plan(&whole_, folds_ ? kStrips : 0);
    arena_.plan(&whole_sums_, folds_ ? kStrips * value_dim * kStrip : 0);
    ready_ = arena_.reserve();
    if (ready_) std::memset(nothing_, 0, size_t(value_dim) * sizeof(T));
  }

  bool ready() const { return ready_; }

  // Begins with the row's queries of a key head from number `first` on, `strips` strips at most.
  // Returns whether there are any.
  bool begin(const Row& row, int64_t key_head, int64_t first, int64_t strips) {
    const int64_t group = arguments_.heads / arguments_.key_heads;
    const Interval numbers = overlap({first, first + strips * kStrip}, {0, row.queries * group});
    row_ = row, used_ = 0, since_fold_ = 0, folded_ = false;
    int64_t head = numbers.first % group, query = numbers.first / group;
    for (int64_t number = numbers.first; number < numbers.last; number += kStrip) {
      Strip& strip = strips_[used_];
      strip.query = queries_ + used_ * steps_ * kTilePairs * kStrip;
      strip.sums = sums_ + used_ * blocks_ * 32 * kStrip;
      strip.softmax.begin();
      strip.fresh = true;
      strip.count = numbers.last - number < kStrip ? numbers.last - number : kStrip;
      for (int64_t lane = 0; lane < strip.count; ++lane) {
        strip.lanes[lane] = {key_head * group + head, query};
        if (++head == group) head = 0, ++query;
      }
      const auto row_at = [&](int64_t lane) { return at_lane(arguments_.query, strip, lane); };
      pack_lanes(strip.query, kStrip, row_at, strip.count, arguments_.head_dim);
      ++used_;
    }
    return used_ > 0;
  }

  // Takes in all slots of one half.
  void attend(Half half, const Source<T>& source) {
    Interval span{0, 0};
    for (int64_t i = 0; i < used_; ++i) {
      const Interval seen = look_at(strips_[i], half);
      if (seen.first >= seen.last) continue;
      if (span.first >= span.last) span = seen;
      if (seen.first < span.first) span.first = seen.first;
      if (seen.last > span.last) span.last = seen.last;
    }
    for (int64_t first = span.first / chunk_ * chunk_; first < span.last; first += kGroup) {
      pack_group(source, {first, first + kGroup}, span);
      stream();
      if (folds_ && (since_fold_ += kGroup) >= kFoldAfter) fold();
    }
  }

  // Writes output and lse.
  void finish() {
    if (folded_ && since_fold_ > 0) fold();
    for (int64_t i = 0; i < used_; ++i) finish(strips_[i], i);
  }

 private:
  static constexpr int64_t kStrips = kStripsOfTask, kGroup = kKeysOfGroup;
  // Keys that floats sum before they meet the sum of all, which is kept in double: 1024 chunks.
  static constexpr int64_t kFoldAfter = 1 << 15;

  struct Strip {
    StripSoftmax softmax;
    Pair* query;  // [16 steps_][kStrip]
    float* sums;  // [32 blocks_][kStrip]
    struct {
      int64_t head, query;
    } lanes[kStrip];
    Interval seen[kStrip];  // of the half at hand
    Interval some, all;     // slots of it that some lane sees, and that all see
    int64_t count;
    bool fresh;  // nothing is summed yet
  };

  struct Chunk {
    Strip* strip = nullptr;
    int64_t number = 0;  // in its group
    bool masked = false;
  };

  // Values times weights that are still to be added to a strip's sums, in blocks of 32 rows.
  struct Pending {
    Strip* strip = nullptr;
    int64_t next = 0, blocks = 0, first_step = 0, steps = 0;
    const Pair* weights = nullptr;
    bool fresh = false;
  };

  const T* at_lane(const Tensor& tensor, const Strip& strip, int64_t lane) const {
    return at<T>(tensor, row_.batch, strip.lanes[lane].head,
                 row_.first_query + strip.lanes[lane].query);
  }

  // What each lane sees of a half. Blank lanes see what the last one does.
  Interval look_at(Strip& strip, Half half) const {
    int64_t known = -1;
    for (int64_t lane = 0; lane < kStrip; ++lane) {
      const int64_t query = strip.lanes[lane < strip.count ? lane : strip.count - 1].query;
      strip.seen[lane] =
          query == known ? strip.seen[lane - 1] : seen_by(arguments_, row_, half, query);
      known = query;
      const Interval seen = strip.seen[lane];
      if (lane == 0) strip.some = strip.all = seen;
      strip.all = overlap(strip.all, seen);
      if (seen.first >= seen.last) continue;
      if (strip.some.first >= strip.some.last) strip.some = seen;
      if (seen.first < strip.some.first) strip.some.first = seen.first;
      if (seen.last > strip.some.last) strip.some.last = seen.last;
    }
    return strip.some;
  }

  // Packs values, and keys unless they lie as tiles want them, of the slots in `group` that lie in
  // `span`. What nobody sees may be no number, which a weight of 0 would not keep out of the sums:
  // it is 0 here.
  void pack_group(const Source<T>& source, Interval group, Interval span) {
    group_ = group;
    const Interval real = overlap(group, span);
    const int64_t chunks = ceil_div(real.last - group.first, chunk_);
    for (int64_t key = 0; key < chunks * chunk_; key += 32) {
      const auto value = [&](int64_t i) {
        const int64_t slot = group.first + key + i;
        return slot < real.first || slot >= real.last ? nothing_
                                                      : source.value + slot * source.value_stride;
      };
      pack_transposed(values_ + key / 32 * value_step() / 4, kTilePairs, value, 32,
                      arguments_.value_dim);
    }
    const T* first = source.key + group.first * source.key_stride;
    const bool lie = arguments_.head_dim % 32 == 0;
    in_place_ = lie ? reinterpret_cast<const char*>(first) : nullptr;
    in_place_row_ = source.key_stride * int64_t(sizeof(T));
    whole_chunks_ = lie ? (real.last - group.first) / chunk_ : 0;
    const int64_t done = whole_chunks_ * chunk_, left = real.last - group.first - done;
    if (left == 0) return;
    Pair* const to = keys_ + done * steps_ * kTilePairs;
    pack_rows(to, first + done * source.key_stride, source.key_stride, left, arguments_.head_dim);
    std::memset(to + left * steps_ * kTilePairs, 0,
                size_t((chunks * chunk_ - done - left) * steps_) * kTileBytes);
  }

  int64_t value_step() const { return blocks_ * 32 * kTileBytes; }  // bytes of 32 keys

  // All steps of a group, strip after strip.
  void stream() {
    strip_ = -1, chunk_at_ = chunk_end_ = 0;
    Chunk now = take();
    if (now.strip == nullptr) return;
    int side = 0, panel = 0;  // of scores, and of weights
    int64_t in_panel = 0;     // chunks whose weights lie there
    int64_t panel_first = 0;  // number of the first of them
    pending_ = Pending{};
    multiply_keys(now, scores_[side], [] {});
    squares_.flush();
    while (now.strip) {
      Strip& strip = *now.strip;
      const Chunk next = take();
      if (in_panel == 0) panel_first = now.number;
      if (strip.softmax.unset)
        strip.softmax.set(scores_[side], chunk_, now.number * chunk_, scale_);
      Pair* weights = weights_[panel] + in_panel * chunk_ / 2 * kStrip;
      const bool fits = now.masked ? step_masked<true>(now, next, side, weights)
                                   : step_masked<false>(now, next, side, weights);
      if (!fits) {
        drain();
        hand_over(strip, panel_first, in_panel, weights_[panel]);
        drain();
        raise(now, scores_[side]);
        in_panel = 0, panel_first = now.number;
        now.masked ? weigh<true>(now, scores_[side], weights_[panel])
                   : weigh<false>(now, scores_[side], weights_[panel]);
      }
      if (++in_panel == blocks_ || next.strip != now.strip) {
        drain_blocks();
        hand_over(strip, panel_first, in_panel, weights_[panel]);
        panel ^= 1, in_panel = 0;
      }
      side ^= 1;
      now = next;
    }
    drain();
  }

  // The next chunk that some lane sees, of whichever strip; none at the end of the group.
  Chunk take() {
    while (chunk_at_ >= chunk_end_) {
      if (++strip_ >= used_) return Chunk{};
      Strip& strip = strips_[strip_];
      const Interval seen = overlap(strip.some, group_);
      chunk_at_ = (seen.first - group_.first) / chunk_;
      chunk_end_ = seen.first < seen.last ? ceil_div(seen.last - group_.first, chunk_) : 0;
      for (int64_t lane = 0; lane < kStrip; ++lane) {
        const Interval own = overlap(strip.seen[lane], group_);
        const bool any = own.first < own.last;
        strip.softmax.first[lane] = any ? int32_t(own.first - group_.first) : 0;
        strip.softmax.last[lane] = any ? int32_t(own.last - group_.first) : 0;
      }
    }
    Strip& strip = strips_[strip_];
    const int64_t slot = group_.first + chunk_at_ * chunk_;
    return {&strip, chunk_at_++, strip.all.first > slot || strip.all.last < slot + chunk_};
  }

  // `step` with as many weights after each product as fill a chunk's products.
  template <bool masked>
  bool step_masked(const Chunk& now, const Chunk& next, int side, Pair* to) {
    if (steps_ == 1) return step<masked, 4>(now, next, side, to);
    if (steps_ == 2) return step<masked, 2>(now, next, side, to);
    return step<masked, 1>(now, next, side, to);
  }

  // One step: weights of `now`, the scores of `next`, and a block of what is pending. Returns
  // whether the weights fit; if they do they count.
  template <bool masked, int per_product>
  bool step(const Chunk& now, const Chunk& next, int side, Pair* to) {
    StripSoftmax& softmax = now.strip->softmax;
    Weights<masked> weights(softmax, scores_[side], to, chunk_, now.number * chunk_, scale_);
    const auto between = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int i = 0; i < per_product; ++i) weights.next();
    };
    weights.begin(0);
    if (next.strip) multiply_keys(next, scores_[side ^ 1], between);
    const Vector<float> low = weights.finish();
    weights.begin(kLanes<float>);
    if (pending_.next < pending_.blocks) multiply_values(between);
    const Vector<float> high = weights.finish();
    squares_.flush();
    if (!fits(low) || !fits(high)) return false;
    add(softmax, low, high);
    return true;
  }

  template <bool masked>
  void weigh(const Chunk& chunk, const float* scores, Pair* to) {
    StripSoftmax& softmax = chunk.strip->softmax;
    Weights<masked> weights(softmax, scores, to, chunk_, chunk.number * chunk_, scale_);
    weights.begin(0);
    const Vector<float> low = weights.finish();
    weights.begin(kLanes<float>);
    add(softmax, low, weights.finish());
  }

  static bool fits(Vector<float> sums) {
    return _mm512_cmp_ps_mask((__m512)sums, _mm512_set1_ps(kMostOfChunk), _CMP_NLE_UQ) == 0;
  }

  static void add(StripSoftmax& softmax, Vector<float> low, Vector<float> high) {
    store(softmax.total, load(softmax.total) + low);
    store(softmax.total + kLanes<float>, load(softmax.total + kLanes<float>) + high);
  }

  // Raises levels by a chunk's scores. Nothing is pending now.
  void raise(const Chunk& chunk, const float* scores) {
    Strip& strip = *chunk.strip;
    const auto rescale = [&](int64_t lane, Vector<float> factors) {
      for (int64_t i = 0; !strip.fresh && i < blocks_ * 32; ++i) {
        float* const at = strip.sums + i * kStrip + lane;
        store(at, load(at) * factors);
      }
    };
    strip.softmax.raise(scores, chunk_, chunk.number * chunk_, scale_, rescale);
  }

  template <class Between>
  __attribute__((always_inline)) void multiply_keys(const Chunk& chunk, float* scores,
                                                    const Between& between) {
    const bool in_place = chunk.number < whole_chunks_;
    const int64_t row = in_place ? in_place_row_ : steps_ * kTileBytes;
    const char* const keys =
        (in_place ? in_place_ : reinterpret_cast<const char*>(keys_)) + chunk.number * chunk_ * row;
    for (int64_t key = 0; key < chunk_; key += 32)
      squares_.multiply(scores + key * kStrip, true, keys + key * row, row, kTileBytes,
                        chunk.strip->query, steps_, between);
  }

  template <class Between>
  __attribute__((always_inline)) void multiply_values(const Between& between) {
    Pending& p = pending_;
    const char* const values = reinterpret_cast<const char*>(values_) +
                               p.first_step * value_step() + p.next * 32 * kTileBytes;
    squares_.multiply(p.strip->sums + p.next * 32 * kStrip, p.fresh, values, kTileBytes,
                      value_step(), p.weights, p.steps, between);
    ++p.next;
  }

  // Has the weights of `chunks` chunks wait for their values.
  void hand_over(Strip& strip, int64_t first, int64_t chunks, const Pair* weights) {
    if (chunks == 0) return;
    pending_ = {&strip,  0,          blocks_, first * chunk_ / 32, chunks * chunk_ / 32,
                weights, strip.fresh};
    strip.fresh = false;
  }

  void drain_blocks() {
    while (pending_.next < pending_.blocks) multiply_values([] {});
  }
  void drain() {
    drain_blocks();
    squares_.flush();
  }

  // Takes each strip's state into the one of all its keys, and begins anew.
  void fold() {
    const int64_t numbers = blocks_ * 32;
    for (int64_t i = 0; i < used_; ++i) {
      Strip& strip = strips_[i];
      double* const sums = whole_sums_ + i * numbers * kStrip;
      if (!folded_) {
        whole_[i].begin();
        std::memset(sums, 0, size_t(numbers * kStrip) * sizeof(double));
      }
      double mine[kStrip], others[kStrip];
      for (int64_t lane = 0; lane < kStrip; ++lane)
        std::tie(mine[lane], others[lane]) =
            whole_[i].merge(lane, peak_of(strip, lane), double(strip.softmax.total[lane]));
      for (int64_t at = 0; !strip.fresh && at < numbers * kStrip; ++at)
        sums[at] = sums[at] * mine[at % kStrip] + double(strip.sums[at]) * others[at % kStrip];
      strip.softmax.begin();
      strip.fresh = true;
    }
    since_fold_ = 0, folded_ = true;
  }

  static double peak_of(const Strip& strip, int64_t lane) {
    return double(strip.softmax.level[lane]) * 0.6931471805599453;
  }

  void finish(Strip& strip, int64_t i) {
    const int64_t numbers = blocks_ * 32;
    const double* const sinks = arguments_.sinks;
    alignas(64) float factors[kStrip] = {};
    T* rows[kStrip];
    SoftmaxState<double> state;
    for (int64_t lane = 0; lane < strip.count; ++lane) {
      const auto [head, query] = strip.lanes[lane];
      state.peak[lane] = folded_ ? whole_[i].peak[lane] : peak_of(strip, lane);
      state.total[lane] = folded_ ? whole_[i].total[lane] : double(strip.softmax.total[lane]);
      factors[lane] = float(state.normalise(lane, sinks ? sinks + head : nullptr));
      rows[lane] = const_cast<T*>(at_lane(arguments_.out, strip, lane));
      write_log_sum(head, query, state.log_sum(lane));
    }
    if (folded_)
      for (int64_t at = 0; at < numbers * kStrip; ++at)
        strip.sums[at] = float(whole_sums_[i * numbers * kStrip + at]);
    else if (strip.fresh)
      std::memset(strip.sums, 0, size_t(numbers * kStrip) * sizeof(float));
    unpack_lanes(rows, strip.sums, kStrip, factors, strip.count, arguments_.value_dim);
  }

  void write_log_sum(int64_t head, int64_t query, double log_sum) const {
    const int64_t place = place_of(arguments_, {row_, head, query});
    const float rounded = float(log_sum);
    if (arguments_.lse) static_cast<float*>(arguments_.lse)[place] = rounded;
    if (arguments_.lse_rest)
      static_cast<float*>(arguments_.lse_rest)[place] =
          std::isfinite(rounded) ? float(log_sum - double(rounded)) : 0.0f;
  }

  [[maybe_unused]] Tiles tiles_of_thread_;
  const Arguments& arguments_;
  const int64_t steps_, blocks_, chunk_;  // steps of 32 in the head dim and in the value's; keys
  const bool folds_;
  const float scale_;  // of products, to scores in base 2
  Arena arena_;
  bool ready_;

  Row row_;
  int64_t used_ = 0, since_fold_ = 0;
  bool folded_ = false;
  Strip* strips_;
  Pair *queries_, *keys_, *values_;  // of all strips; of a group: [key][16 steps_], and by steps of
                                     // 32 keys [32 blocks_][16]
  T* nothing_;                       // a row of zeros
  float *sums_, *scores_[2];
  Pair* weights_[2];  // of panels, which are `blocks_` chunks
  SoftmaxState<double>* whole_;
  double* whole_sums_;

  Interval group_{0, 0};
  const char* in_place_ = nullptr;
  int64_t in_place_row_ = 0, whole_chunks_ = 0;  // chunks whose keys are read where they lie
  int64_t strip_ = 0, chunk_at_ = 0, chunk_end_ = 0;
  Pending pending_;
  Squares squares_;
};

}  // namespace prefixattn::PREFIXATTN_ISA

#endif
