// Where a batch row or a packed segment lies, and which keys each of its queries sees.
#pragma once

#include "arguments.h"

namespace prefixattn::PREFIXATTN_ISA {

struct Interval {
  int64_t first, last;  // [first, last)
};

inline Interval overlap(Interval a, Interval b) {
  return {a.first > b.first ? a.first : b.first, a.last < b.last ? a.last : b.last};
}

enum class Half { prefix, sequence };

// Slots count from the row's first key. `entry` is the row's place in the bank, -1 for none.
struct Row {
  int64_t number, batch, first_query, queries, first_key, keys, start, stop, offset, entry,
      prefix_tokens;
};

inline Row row_of(const Arguments& a, int64_t number) {
  // A query's position stays within int64, and beyond what a window, below 2^62, reaches.
  constexpr int64_t kFar = (int64_t(1) << 62) + (int64_t(1) << 50);
  Row row{number, number, 0, a.queries, 0, a.keys, 0, a.keys, 0, a.bank == 1 ? 0 : number, 0};
  if (a.bounds_q) {
    row.batch = 0;
    row.first_query = a.bounds_q[number];
    row.queries = a.bounds_q[number + 1] - row.first_query;
    row.first_key = a.bounds_k[number];
    row.keys = row.stop = a.bounds_k[number + 1] - row.first_key;
  }
  if (a.key_start) row.start = a.key_start[number];
  if (a.key_length) row.stop = a.key_length[number];
  row.offset = a.offsets ? a.offsets[number] : a.has_offset ? a.offset : row.keys - row.queries;
  row.offset = row.offset > kFar ? kFar : row.offset < -kFar ? -kFar : row.offset;
  if (a.prefix_index) row.entry = a.prefix_index[number];
  if (row.entry >= 0 && a.bank > 0)
    row.prefix_tokens = a.prefix_lengths ? a.prefix_lengths[row.entry] : a.prefix_tokens;
  return row;
}

// A number of any size as a slot from 0 to `slots`.
inline int64_t slot_at(__int128 number, int64_t slots) {
  return number < 0 ? 0 : number > slots ? slots : int64_t(number);
}

// The slots of one half that a query of the row sees, before any mask.
inline Interval seen_by(const Arguments& a, const Row& row, Half half, int64_t query) {
  const int64_t position = row.offset + query;
  const __int128 oldest = __int128(position) - a.window + 1;  // what a window still shows
  if (half == Half::prefix) {
    Interval seen{0, row.prefix_tokens};
    if (a.windowed_prefix && a.window >= 0)  // token j sits at start + j - prefix_tokens
      seen.first = slot_at(oldest - row.start + row.prefix_tokens, row.prefix_tokens);
    return seen;
  }
  Interval seen{row.start, row.stop};
  if (a.is_causal) seen.last = slot_at(__int128(position) + 1, row.stop);
  if (a.window >= 0) seen.first = slot_at(oldest, row.stop);
  return overlap(seen, {row.start, row.stop});
}

// One query of one head: what a lane of a block computes. `query` counts from the row's first.
struct Lane {
  Row row;
  int64_t head, query;
};

// Lanes of a row and key head, query by query: those that share a key lie side by side.
inline Lane lane_of(const Arguments& a, const Row& row, int64_t key_head, int64_t number) {
  const int64_t group = a.heads / a.key_heads;
  return {row, key_head * group + number % group, number / group};
}

// The place of a lane's numbers in [rows, heads, queries].
inline int64_t place_of(const Arguments& a, const Lane& lane) {
  return (lane.row.batch * a.heads + lane.head) * a.queries + lane.row.first_query + lane.query;
}

template <class T>
inline T* at(const Tensor& tensor, int64_t row, int64_t head, int64_t token) {
  return static_cast<T*>(tensor.data) + row * tensor.row + head * tensor.head +
         token * tensor.token;
}

// A lane's row of a tensor that is laid out as the query is.
template <class T>
inline T* at(const Tensor& tensor, const Lane& lane) {
  return at<T>(tensor, lane.row.batch, lane.head, lane.row.first_query + lane.query);
}

}  // namespace prefixattn::PREFIXATTN_ISA
