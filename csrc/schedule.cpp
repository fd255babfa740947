#include "schedule.h"

#include <algorithm>
#include <numeric>

#define PREFIXATTN_ISA scheduling
#include "rows.h"
#include "tuning.h"

namespace prefixattn {
namespace {

using scheduling::kBlock;
using scheduling::kTasksEach;
using scheduling::kTile;
using scheduling::kWorthThreads;
using scheduling::row_of;

// A cut for a fixed number gives the same sums, in the same order, on any number of threads.
constexpr int64_t kFixedThreads = 8;

Schedule common_schedule(const Arguments& a) {
  Schedule s;
  const double work = double(a.rows) * double(a.heads) * double(a.queries) *
                      double(a.keys + a.prefix_tokens) * double(a.head_dim + a.value_dim);
  s.threads = work < kWorthThreads ? 1 : int(a.threads);
  int64_t longest = 0;
  for (int64_t row = 0; row < a.rows; ++row) longest = std::max(longest, row_of(a, row).queries);
  s.blocks = ceil_div(longest * (a.heads / a.key_heads), kBlock);
  return s;
}

void group_rows(const Arguments& a, Schedule& s) {
  s.order.resize(size_t(a.rows));
  std::iota(s.order.begin(), s.order.end(), 0);
  const auto entry = [&](int64_t row) { return row_of(a, row).entry; };
  std::stable_sort(s.order.begin(), s.order.end(),
                   [&](int64_t one, int64_t other) { return entry(one) < entry(other); });
  for (int64_t i = 0; i < a.rows; ++i) {
    const int64_t own = entry(s.order[size_t(i)]);
    if (s.sharers.empty() || s.sharers.back().entry != own) s.sharers.push_back({own, i, i});
    s.sharers.back().last = i + 1;
  }
}

int64_t most_rows(const Schedule& s) {
  int64_t most = 0;
  for (const Sharers& group : s.sharers) most = std::max(most, group.last - group.first);
  return most;
}

// Threads that the cut is made for.
int64_t cut_for(const Arguments& a, const Schedule& s) {
  return a.fixed_order ? kFixedThreads : s.threads;
}

// Chunks of `keys` slots, so that `tasks` of them become enough; none shorter than two tiles.
int64_t chunks(int64_t wanted, int64_t tasks, int64_t keys) {
  return std::clamp<int64_t>(ceil_div(wanted, std::max<int64_t>(tasks, 1)), 1,
                             std::max<int64_t>(keys / (2 * kTile), 1));
}

}  // namespace

Schedule forward_schedule(const Arguments& a) {
  Schedule s = common_schedule(a);
  if (a.bounds_q) return s;
  const int64_t lanes = a.queries * (a.heads / a.key_heads),
                tasks = a.rows * a.key_heads * s.blocks;
  const bool few_queries = lanes <= kBlock / 2, few_tasks = tasks < cut_for(a, s);
  if (!few_queries && !few_tasks) return s;
  group_rows(a, s);
  const bool shared = few_queries && a.prefix_tokens > 0 && most_rows(s) > 1;
  const int64_t wanted = kTasksEach * cut_for(a, s);
  s.prefix_blocks = ceil_div(most_rows(s) * lanes, kBlock);
  const int64_t prefix_tasks = int64_t(s.sharers.size()) * a.key_heads * s.prefix_blocks;
  s.prefix_chunks = chunks(wanted, prefix_tasks, a.prefix_tokens);
  s.sequence_chunks = chunks(wanted, tasks, a.keys);
  s.split = shared || (few_tasks && s.prefix_chunks + s.sequence_chunks > 2);
  return s;
}

Schedule backward_schedule(const Arguments& a) {
  Schedule s = common_schedule(a);
  group_rows(a, s);
  const int64_t strands = int64_t(s.sharers.size()) * a.key_heads;
  const int64_t wanted = ceil_div(kTasksEach * cut_for(a, s), std::max<int64_t>(strands, 1));
  s.slices = std::clamp<int64_t>(most_rows(s), 1, wanted);
  s.parts = std::clamp<int64_t>(ceil_div(wanted, s.slices), 1, std::max<int64_t>(s.blocks, 1));
  return s;
}

}  // namespace prefixattn
