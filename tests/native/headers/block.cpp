#include "block.h"

#include "problem.h"

using namespace check;

namespace {

// Spans and limits against every slot and lane, for tiles of a few slots.
template <class T>
void check_limits(const Block<T>& block, Half half, Interval range) {
  using Sum = SumOf<T>;
  const Arguments& a = block.arguments;
  const auto sees = [&](int64_t lane, int64_t slot) {
    const Interval seen = seen_by(a, block.lanes[lane].row, half, block.lanes[lane].query);
    return slot >= seen.first && slot < seen.last && slot >= range.first && slot < range.last;
  };
  Interval seen[kBlock];
  const Interval span = block.span(half, range, seen);
  Interval wanted{99, 0};
  for (int64_t slot = 0; slot < 40; ++slot)
    for (int64_t lane = 0; lane < block.count; ++lane)
      if (sees(lane, slot)) wanted = {std::min(wanted.first, slot), slot + 1};
  if (wanted.first > wanted.last) return (void)CHECK(span.first >= span.last);
  CHECK(span.first == wanted.first && span.last == wanted.last);

  for (int64_t first = span.first; first < span.last; ++first)
    for (const int64_t keys : {int64_t(1), span.last - first}) {
      Limits<Sum> room;
      const Limits<Sum>* limits = block.limit(seen, first, keys, room);
      for (int64_t lane = 0; lane < block.vectors() * kLanes<Sum>; ++lane)
        for (int64_t key = 0; key < keys; ++key) {
          const bool real = lane < block.count;
          const bool shown = !limits || (key >= limits->first[lane] && key < limits->last[lane]);
          CHECK(shown == (real && sees(lane, first + key)) || (!real && !limits));
        }
    }
}

template <class T>
void check_type() {
  for (const bool causal : {false, true})
    for (const int64_t window : {-1, 1, 4}) {
      Problem<T> problem({.keys = 12,
                          .prefix_tokens = 6,
                          .causal = causal,
                          .positions = true,
                          .padded = true,
                          .window = window});
      const Arguments a = problem.arguments();
      Block<T> block(a);
      for (int64_t number = 1; number < 14; number += 1 + number / 5)
        block.lanes[block.count++] = lane_of(a, row_of(a, number % 3), 1, number);
      CHECK(block.vectors() == ceil_div(block.count, kLanes<SumOf<T>>));
      for (const Interval range : {Interval{0, 12}, {0, 6}, {3, 5}, {4, 4}, {30, 12}, {9, 3}})
        for (const Half half : {Half::prefix, Half::sequence}) check_limits(block, half, range);
    }
}

void check_sources() {
  Problem<float> problem({.bank = 2});
  const Arguments a = problem.arguments();
  const Row row = row_of(a, 2);
  CHECK(row.entry == 1);
  const Source<float> prefix = source_of<float>(a, row, Half::prefix, 1);
  CHECK(prefix.key == &problem.prefix_key.stored[problem.prefix_key.place(1, 1, 0)]);
  CHECK(prefix.value == &problem.prefix_value.stored[problem.prefix_value.place(1, 1, 0)]);
  CHECK(prefix.key_stride == 12 && prefix.value_stride == 8);
  const Source<float> sequence = source_of<float>(a, row, Half::sequence, 1);
  CHECK(sequence.key == &problem.key.stored[problem.key.place(2, 1, 0)]);
  CHECK(sequence.value == &problem.value.stored[problem.value.place(2, 1, 0)]);
  CHECK(sequence.key_stride == 2 * 12 && sequence.value_stride == 2 * 8);

  Block<float> block(a);
  block.lanes[block.count++] = lane_of(a, row, 1, 5);
  float* places[kBlock];
  block.rows(a.query, places);
  CHECK(places[0] == &problem.query.stored[problem.query.place(2, 3, 2)]);
}

}  // namespace

int main() {
  check_type<float>();
  check_type<double>();
  check_sources();
  return finish();
}
