#include "prefix_attention.h"

#include "problem.h"

using namespace check;

namespace {

// Whatever finishes a block's queries is compared at those alone.
template <class T>
bool block_is_right(const Problem<T>& problem, const Block<T>& block) {
  std::vector<T> got;
  std::vector<double> wanted;
  for (int64_t lane = 0; lane < block.count; ++lane) {
    const Lane& at = block.lanes[lane];
    const size_t place = problem.out.place(at.row.batch, at.head, at.query);
    for (int64_t i = 0; i < problem.n.value_dim; ++i) {
      got.push_back(problem.out.stored[place + size_t(i)]);
      wanted.push_back(problem.out.wanted[place + size_t(i)]);
    }
  }
  return near(got, wanted, unit_of(T{}));
}

// One block of `count` queries takes in both halves, each in two pieces and in either order.
template <class T>
void check_block(const Sizes& sizes, int64_t count, bool prefix_last) {
  Problem<T> problem(sizes);
  const Arguments a = problem.arguments();
  std::atomic<bool> failed{false};
  Forward<T> forward(a, failed);
  CHECK(forward.ready() && !failed);
  const Row row = row_of(a, 1);
  Block<T>& block = forward.block();
  for (block.count = 0; block.count < count; ++block.count)
    block.lanes[block.count] = lane_of(a, row, 1, block.count);
  forward.begin();
  for (int half = 0; half < 2; ++half)
    if ((half == 0) != prefix_last) {
      if (row.prefix_tokens == 0) continue;
      const auto source = source_of<T>(a, row, Half::prefix, 1);
      forward.attend(Half::prefix, source, {0, 2});
      forward.attend(Half::prefix, source, {2, row.prefix_tokens});
    } else {
      const auto source = source_of<T>(a, row, Half::sequence, 1);
      forward.attend(Half::sequence, source, {0, row.keys / 2});
      forward.attend(Half::sequence, source, {row.keys / 2, row.keys});
    }
  forward.finish();
  CHECK(block_is_right(problem, block));
}

// What is kept of a block is its state: sums over total, and peak + log total.
void check_keep() {
  Problem<float> problem(Sizes{});
  const Arguments a = problem.arguments();
  std::atomic<bool> failed{false};
  Forward<float> forward(a, failed);
  const Row row = row_of(a, 0);
  forward.block().lanes[0] = lane_of(a, row, 0, 3);
  forward.block().count = 1;
  forward.begin();
  forward.attend(Half::prefix, source_of<float>(a, row, Half::prefix, 0), {0, row.prefix_tokens});
  forward.attend(Half::sequence, source_of<float>(a, row, Half::sequence, 0), {0, row.keys});
  const size_t places = problem.lse.size();
  std::vector<float> peaks(places), totals(places), values(places * size_t(a.value_dim));
  forward.keep(peaks.data(), totals.data(), values.data());
  const size_t place = size_t(place_of(a, forward.block().lanes[0]));
  const double total = double(totals[place] / kOne<float>);
  CHECK(std::abs(peaks[place] + std::log(total) - problem.lse_wanted[place]) < 1e-5);
  for (int64_t i = 0; i < a.value_dim; ++i)
    CHECK(std::abs(values[place * size_t(a.value_dim) + size_t(i)] / totals[place] -
                   problem.out.want(0, forward.block().lanes[0].head, 1, i)) < 1e-5);
}

// Many keys of about the same weight, and values that are all the same: that value must come out,
// and the log of the keys' number. One float for all of them would lose a part of each.
void check_long_row(int64_t count) {
  constexpr int64_t kKeys = 40 * kTile * kTilesInRun + 5;
  Problem<float> problem({.rows = 1, .queries = 32, .keys = 1, .prefix_tokens = 0});
  Arguments a = problem.arguments();
  std::vector<float> keys(size_t(kKeys * a.head_dim)), values(size_t(kKeys * a.value_dim), 0.1f);
  const int64_t stop = kKeys;
  a.keys = kKeys, a.is_causal = 0, a.key_start = nullptr, a.key_length = &stop, a.window = -1;
  a.key = {keys.data(), 0, 0, a.head_dim}, a.value = {values.data(), 0, 0, a.value_dim};
  std::atomic<bool> failed{false};
  Forward<float> forward(a, failed);
  Block<float>& block = forward.block();
  for (block.count = 0; block.count < count; ++block.count)
    block.lanes[block.count] = lane_of(a, row_of(a, 0), 0, block.count);
  forward.begin();
  forward.attend(Half::sequence, source_of<float>(a, row_of(a, 0), Half::sequence, 0), {0, kKeys});
  forward.finish();
  for (int64_t lane = 0; lane < count; ++lane) {
    const Lane& at = block.lanes[lane];
    const float* out = &problem.out.stored[problem.out.place(at.row.batch, at.head, at.query)];
    for (int64_t i = 0; i < a.value_dim; ++i) CHECK(std::abs(out[i] / 0.1f - 1) < 1e-6);
    CHECK(std::abs(problem.lse[size_t(place_of(a, at))] - std::log(double(kKeys))) < 2e-6);
  }
}

template <class T>
void check_type() {
  for (const int64_t count : {1, 5, 14, 64})
    for (const bool prefix_last : {false, true}) {
      check_block<T>({.queries = 32, .keys = 130, .prefix_tokens = 101}, count, prefix_last);
      check_block<T>({.queries = 32,
                      .keys = 40,
                      .bank = 2,
                      .positions = true,
                      .padded = true,
                      .masked = true,
                      .biased = true,
                      .sinks = true,
                      .alibi = true,
                      .window = 9,
                      .softcap = 2},
                     count, prefix_last);
    }
}

}  // namespace

int main() {
  check_type<float>();
  check_type<double>();
  check_type<Float16>();
  check_type<Bfloat16>();
  check_keep();
  for (const int64_t count : {1, 5, 64}) check_long_row(count);
  return finish();
}
