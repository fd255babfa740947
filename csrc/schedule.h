// How one call is cut into tasks for threads: numbers only, the same for every instruction set.
#pragma once

#include <cstdint>
#include <vector>

#include "arguments.h"

namespace prefixattn {

constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
constexpr int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

// The rows of one bank entry (-1: of none), `first` to `last` of `Schedule::order`.
struct Sharers {
  int64_t entry, first, last;
};

struct Schedule {
  int threads = 1;
  int64_t blocks = 0;          // of the longest row and one key head
  std::vector<int64_t> order;  // rows, those of one entry side by side
  std::vector<Sharers> sharers;

  // Forward. Split: each half in chunks of keys on its own, then one merge; the prefix half packs
  // the queries of all rows that share an entry.
  bool split = false;
  int64_t prefix_blocks = 0;  // of the entry with most rows, when packed so
  int64_t prefix_chunks = 1, sequence_chunks = 1;

  // Backward. The rows of an entry are cut into `slices`, the blocks of a row into `parts` in turn;
  // each slice and part of an entry and key head sums its own gradient of the prefix.
  int64_t slices = 1, parts = 1;
};

Schedule forward_schedule(const Arguments& arguments);
Schedule backward_schedule(const Arguments& arguments);

}  // namespace prefixattn
