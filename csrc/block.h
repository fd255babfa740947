// Blocks of queries, and the keys that each of them sees.
#pragma once

#include "parallel.h"
#include "rows.h"
#include "softmax_state.h"

namespace prefixattn::PREFIXATTN_ISA {

// Keys and values of one head of a row's half.
template <class T>
struct Source {
  const T *key, *value;
  int64_t key_stride, value_stride;
};

template <class T>
inline Source<T> source_of(const Arguments& a, const Row& row, Half half, int64_t key_head) {
  const bool prefix = half == Half::prefix;
  const Tensor &key = prefix ? a.prefix_key : a.key, &value = prefix ? a.prefix_value : a.value;
  const int64_t batch = prefix ? row.entry : row.batch, first = prefix ? 0 : row.first_key;
  return {at<T>(key, batch, key_head, first), at<T>(value, batch, key_head, first), key.token,
          value.token};
}

// Tiles of keys that are summed before they meet the sum of all, which is kept in double. One float
// for all keys of a long row would err as their number, and stand still from 2^24 keys on.
constexpr int64_t kTilesInRun = 1536 / kTile;

inline bool has_long_rows(const Arguments& a) {
  return a.keys > kTilesInRun * kTile || a.prefix_tokens > kTilesInRun * kTile;
}

// Queries of one key head, one in each lane. Lanes past `count` are blank up to `whole_lanes`.
template <class T>
struct Block {
  using Sum = SumOf<T>;

  explicit Block(const Arguments& a) : arguments(a) {}

  const Arguments& arguments;
  Lane lanes[kBlock];
  int64_t count = 0;

  int64_t vectors() const { return (count + kLanes<Sum> - 1) / kLanes<Sum>; }
  int64_t whole_lanes() const { return round_up(count, kWholeLanes<Sum>); }

  // Where each lane's row of a tensor that is laid out as the query is lies.
  void rows(const Tensor& tensor, T** places) const {
    for (int64_t lane = 0; lane < count; ++lane) places[lane] = at<T>(tensor, lanes[lane]);
  }

  // The slots in `range` that some lane sees, and each lane's own in `seen` if there are any.
  Interval span(Half half, Interval range, Interval* seen) const {
    if (range.first >= range.last) return {0, 0};
    Interval all{range.last, range.first};
    for (int64_t lane = 0; lane < count; ++lane) {
      const Lane& at = lanes[lane];
      seen[lane] = overlap(seen_by(arguments, at.row, half, at.query), range);
      if (seen[lane].first >= seen[lane].last) continue;
      if (seen[lane].first < all.first) all.first = seen[lane].first;
      if (seen[lane].last > all.last) all.last = seen[lane].last;
    }
    return all;
  }

  // The lanes' limits in a tile; null if they all see the whole of it.
  const Limits<Sum>* limit(const Interval* seen, int64_t first, int64_t keys,
                           Limits<Sum>& limits) const {
    bool whole = true;
    for (int64_t lane = 0; lane < count; ++lane)
      whole &= seen[lane].first <= first && seen[lane].last >= first + keys;
    if (whole) return nullptr;
    for (int64_t lane = 0; lane < whole_lanes(); ++lane) {
      Interval own = lane < count ? overlap(seen[lane], {first, first + keys}) : Interval{0, 0};
      if (own.first >= own.last) own = {first, first};  // what sees nothing may lie anywhere
      limits.first[lane] = Integer<Sum>(own.first - first);
      limits.last[lane] = Integer<Sum>(own.last - first);
    }
    return &limits;
  }
};

}  // namespace prefixattn::PREFIXATTN_ISA
