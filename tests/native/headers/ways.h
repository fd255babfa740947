// A check for both ways of a block's two products, `ByLanes` and `ByRows`, against plain loops.
#pragma once

#include "block.h"
#include "problem.h"

namespace check {

// The weights of one lane's key: any numbers do, in storage's precision.
template <class T>
std::vector<SumOf<T>> weights_of(Random& random, int64_t keys) {
  std::vector<SumOf<T>> tile(size_t(keys * kBlock));
  for (SumOf<T>& weight : tile)
    weight = SumOf<T>(widen(narrow<T>(SumOf<T>(0.5 + random.number() / 2))));
  return tile;
}

// Scores of `count` queries and `keys` keys, then the mean of values under two tiles of weights.
template <class T, template <class> class Way>
void check_way(int64_t count, int64_t keys, int64_t head_dim, int64_t value_dim) {
  using Sum = SumOf<T>;
  Problem<T> problem(
      {.rows = 1, .queries = 40, .keys = keys, .head_dim = head_dim, .value_dim = value_dim});
  const Arguments a = problem.arguments();
  std::atomic<bool> failed{false};
  Arena arena(failed);
  Way<T> way;
  Block<T> block(a);
  Sum* tile;
  way.plan(arena, a);
  arena.plan(&tile, kTile * kBlock);
  CHECK(arena.reserve());
  for (; block.count < count; ++block.count)
    block.lanes[block.count] = lane_of(a, row_of(a, 0), 1, block.count);
  const Source<T> source = source_of<T>(a, row_of(a, 0), Half::sequence, 1);

  way.begin(block);
  way.score(block, source.key, source.key_stride, keys, tile);
  for (int64_t lane = 0; lane < count; ++lane)
    for (int64_t key = 0; key < keys; ++key) {
      double wanted = 0;
      for (int64_t i = 0; i < head_dim; ++i)
        wanted += problem.query.read(0, 2 + lane % 2, lane / 2, i) * problem.key.read(0, 1, key, i);
      CHECK(std::abs(double(tile[key * kBlock + lane]) - wanted) < 64 * unit_of(Sum{}));
    }

  Random random(8);
  alignas(64) Sum factors[kBlock];
  for (int lane = 0; lane < kBlock; ++lane) factors[lane] = Sum(lane % 4) / 2;
  const auto first = weights_of<T>(random, keys), second = weights_of<T>(random, keys);
  way.add(block, source.value, source.value_stride, keys, first.data(), factors);
  way.add(block, source.value, source.value_stride, keys, second.data(), factors);
  std::vector<std::vector<Sum>> results{size_t(count), std::vector<Sum>(size_t(value_dim))};
  std::vector<Sum*> places;
  for (auto& row : results) places.push_back(row.data());
  way.write(places.data(), factors, count);
  for (int64_t lane = 0; lane < count; ++lane)
    for (int64_t i = 0; i < value_dim; ++i) {
      double wanted = 0;
      const double factor = double(factors[lane]);
      for (int64_t key = 0; key < keys; ++key) {
        const size_t at = size_t(key * kBlock + lane);
        wanted +=
            (double(first[at]) * factor + double(second[at])) * problem.value.read(0, 1, key, i);
      }
      const double got = double(results[size_t(lane)][size_t(i)]);
      CHECK(std::abs(got - wanted * factor) < 1024 * unit_of(Sum{}));
    }

  way.begin(block);  // and no keys at all
  std::vector<std::vector<T>> none{size_t(count), std::vector<T>(size_t(value_dim))};
  std::vector<T*> targets;
  for (auto& row : none) targets.push_back(row.data());
  way.write(targets.data(), factors, count);
  for (const auto& row : none)
    for (const T number : row) CHECK(widen(number) == 0);
}

template <template <class> class Way>
void check_types(int64_t count, int64_t keys, int64_t head_dim, int64_t value_dim) {
  check_way<float, Way>(count, keys, head_dim, value_dim);
  check_way<double, Way>(count, keys, head_dim, value_dim);
  check_way<Float16, Way>(count, keys, head_dim, value_dim);
  check_way<Bfloat16, Way>(count, keys, head_dim, value_dim);
}

}  // namespace check
