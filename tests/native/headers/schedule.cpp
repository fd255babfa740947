#include "schedule.h"

#include <set>

#include "check.h"
#include "rows.h"
#include "tuning.h"

using namespace prefixattn;

namespace {

using PREFIXATTN_ISA::kBlock;
using PREFIXATTN_ISA::kTile;
using PREFIXATTN_ISA::row_of;

// A call with some entries of a bank, or with segments.
struct Call {
  Arguments a{};
  std::vector<int64_t> index, bounds_q{0}, bounds_k{0};

  explicit Call(check::Random& random) {
    a.rows = random.whole(1, 9), a.key_heads = random.whole(1, 3);
    a.heads = a.key_heads * random.whole(1, 4), a.bank = random.whole(1, 4);
    a.queries = random.whole(0, 1) ? random.whole(1, 4) : random.whole(1, 300);
    a.keys = random.whole(0, 3000), a.prefix_tokens = random.whole(0, 1) * random.whole(0, 2000);
    a.head_dim = a.value_dim = 64, a.window = -1;
    for (int64_t row = 0; row < a.rows; ++row) index.push_back(random.whole(-1, a.bank - 1));
    a.prefix_index = index.data();
    if (random.whole(0, 2) > 0) return;
    for (int64_t row = 0; row < a.rows; ++row) {
      bounds_q.push_back(bounds_q.back() + random.whole(0, 90));
      bounds_k.push_back(bounds_k.back() + random.whole(0, 90));
    }
    a.queries = bounds_q.back(), a.keys = bounds_k.back();
    a.bounds_q = bounds_q.data(), a.bounds_k = bounds_k.data();
  }
  int64_t longest() const {
    int64_t longest = 0;
    for (int64_t row = 0; row < a.rows; ++row) longest = std::max(longest, row_of(a, row).queries);
    return longest;
  }
};

bool same_cut(const Schedule& s, const Schedule& t) {
  return s.blocks == t.blocks && s.split == t.split && s.prefix_blocks == t.prefix_blocks &&
         s.prefix_chunks == t.prefix_chunks && s.sequence_chunks == t.sequence_chunks &&
         s.slices == t.slices && s.parts == t.parts && s.order == t.order;
}

// Every row stands in `order` once, among those of its own entry, which come in their own order.
void check_rows(const Arguments& a, const Schedule& s) {
  CHECK(std::set<int64_t>(s.order.begin(), s.order.end()).size() == size_t(a.rows));
  CHECK(s.order.size() == size_t(a.rows));
  std::set<int64_t> entries;
  int64_t next = 0;
  for (const Sharers& group : s.sharers) {
    CHECK(group.first == next && group.last > group.first && entries.insert(group.entry).second);
    for (int64_t i = group.first; i < group.last; ++i) {
      const int64_t row = s.order[size_t(i)];
      CHECK(row_of(a, row).entry == group.entry);
      CHECK(i == group.first || s.order[size_t(i - 1)] < row);
    }
    next = group.last;
  }
  CHECK(next == a.rows);
}

void check_call(Call& call) {
  Arguments& a = call.a;
  const int64_t group = a.heads / a.key_heads, blocks = ceil_div(call.longest() * group, kBlock);
  for (const bool fixed_order : {false, true}) {
    a.fixed_order = fixed_order, a.threads = 1;
    const Schedule forward_of_one = forward_schedule(a), backward_of_one = backward_schedule(a);
    for (a.threads = 1; a.threads <= 9; a.threads += 4) {
      const Schedule forward = forward_schedule(a), backward = backward_schedule(a);
      for (const Schedule& s : {forward, backward}) {
        CHECK(s.threads == 1 || s.threads == a.threads);
        CHECK(s.blocks == blocks);
      }
      if (fixed_order)
        CHECK(same_cut(forward, forward_of_one) && same_cut(backward, backward_of_one));
      check_rows(a, backward);
      int64_t most = 0;
      for (const Sharers& each : backward.sharers) most = std::max(most, each.last - each.first);
      CHECK(backward.slices >= 1 && backward.slices <= most);
      CHECK(backward.parts >= 1 && backward.parts <= std::max<int64_t>(blocks, 1));
      if (!forward.split) continue;
      check_rows(a, forward);
      CHECK(!a.bounds_q && forward.prefix_blocks == ceil_div(most * a.queries * group, kBlock));
      for (const auto& [chunks, keys] : {std::pair{forward.prefix_chunks, a.prefix_tokens},
                                         std::pair{forward.sequence_chunks, a.keys}})
        CHECK(chunks >= 1 && (chunks == 1 || keys / chunks >= 2 * kTile));
    }
  }
}

void check_decode_splits() {
  Arguments a{};
  a.rows = 8, a.heads = 8, a.key_heads = 8, a.queries = 1, a.keys = 4096, a.bank = 1;
  a.prefix_tokens = 2048, a.head_dim = a.value_dim = 64, a.window = -1, a.threads = 2;
  CHECK(forward_schedule(a).split);  // the shared prefix is read once
  a.rows = a.heads = a.key_heads = 1, a.head_dim = a.value_dim = 256;
  CHECK(forward_schedule(a).split && forward_schedule(a).threads == 2);
  CHECK(forward_schedule(a).sequence_chunks >= 2 && forward_schedule(a).prefix_chunks >= 2);
  a.queries = 4096;
  CHECK(!forward_schedule(a).split);
  a.queries = a.keys = a.prefix_tokens = 1;
  CHECK(forward_schedule(a).threads == 1);
}

}  // namespace

int main() {
  static_assert(ceil_div(0, 5) == 0 && ceil_div(11, 5) == 3 && round_up(11, 5) == 15);
  check::Random random(7);
  for (int i = 0; i < 2000; ++i) {
    Call call(random);
    check_call(call);
  }
  check_decode_splits();
  return check::finish();
}
