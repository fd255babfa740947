#include "by_rows.h"

#include "by_lanes.h"
#include "ways.h"

namespace {

using namespace prefixattn;
using namespace prefixattn::PREFIXATTN_ISA;

// Few queries get the very scores that they would have in a full block: the backward has full ones.
template <class T>
void check_same_scores(int64_t keys, int64_t head_dim) {
  check::Problem<T> problem({.rows = 1, .queries = 40, .keys = keys, .head_dim = head_dim});
  const Arguments a = problem.arguments();
  std::atomic<bool> failed{false};
  Arena arena(failed);
  ByRows<T> by_rows;
  ByLanes<T> by_lanes;
  SumOf<T>*few, *full;
  by_rows.plan(arena, a), by_lanes.plan(arena, a);
  arena.plan(&few, kTile * kBlock), arena.plan(&full, kTile * kBlock);
  CHECK(arena.reserve());
  const Row row = row_of(a, 0);
  const Source<T> source = source_of<T>(a, row, Half::sequence, 1);
  for (const int64_t count : {1, 3, kFewQueries<T> - 1}) {
    Block<T> block(a);
    for (; block.count < count; ++block.count)
      block.lanes[block.count] = lane_of(a, row, 1, block.count);
    by_rows.begin(block), by_rows.score(block, source.key, source.key_stride, keys, few);
    by_lanes.begin(block), by_lanes.score(block, source.key, source.key_stride, keys, full);
    for (int64_t key = 0; key < keys; ++key)
      for (int64_t lane = 0; lane < count; ++lane)
        CHECK(few[key * kBlock + lane] == full[key * kBlock + lane]);
  }
}

template <class T>
void check_same_scores() {
  for (const int64_t head_dim : {1, 17, 64, 72}) check_same_scores<T>(41, head_dim);
}

}  // namespace

int main() {
  [[maybe_unused]] prefixattn::PREFIXATTN_ISA::Tiles tiles;
  check::check_types<prefixattn::PREFIXATTN_ISA::ByRows>(6, 96, 64, 32);
  check::check_types<prefixattn::PREFIXATTN_ISA::ByRows>(5, 41, 17, 35);
  check::check_types<prefixattn::PREFIXATTN_ISA::ByRows>(1, 1, 1, 1);
  check_same_scores<float>();
  check_same_scores<double>();
  check_same_scores<Float16>();
  // Tiles sum in another order than vectors, by far less than the storage rounds.
  if (kStep<UnitOf<Bfloat16>> == 1) check_same_scores<Bfloat16>();
  return check::finish();
}
