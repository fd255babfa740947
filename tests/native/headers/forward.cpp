#include "forward.h"

#include "problem.h"

using namespace check;

namespace {

void check_chunks() {
  for (const int64_t slots : {0, 1, 95, 96, 97, 500, 1000})
    for (int64_t chunks = 1; chunks < 12; ++chunks) {
      int64_t next = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const Interval range = chunk_of(slots, chunk, chunks);
        if (range.first >= range.last) continue;
        CHECK(range.first == next);
        next = range.last;
      }
      CHECK(next == slots);
    }
}

void check_fill() {
  Problem<float> problem({.queries = 50});
  const Arguments a = problem.arguments();
  Block<float> block(a);
  fill(block, row_of(a, 1), 1, kBlock);
  CHECK(block.count == 2 * 50 - kBlock);
  for (int64_t lane = 0; lane < block.count; ++lane) {
    const int64_t number = kBlock + lane;
    CHECK(block.lanes[lane].head == 2 + number % 2 && block.lanes[lane].query == number / 2);
    CHECK(block.lanes[lane].row.number == 1);
  }
  fill(block, row_of(a, 1), 1, 2 * kBlock);
  CHECK(block.count == 0);
}

// Whole, and split into chunks of both halves.
template <class T>
void check_forward(const Sizes& sizes, int threads) {
  for (const bool split : {false, true}) {
    Problem<T> problem(sizes);
    const Arguments a = problem.arguments(threads);
    Schedule s = backward_schedule(a);  // which groups the rows
    s.split = split;
    s.prefix_blocks = ceil_div(a.rows * a.queries * (a.heads / a.key_heads), kBlock);
    s.prefix_chunks = 2, s.sequence_chunks = 3;
    std::atomic<bool> failed{false};
    forward<T>(a, s, failed);
    CHECK(!failed && problem.forward_is_right());
  }
}

template <class T>
void check_type() {
  check_forward<T>({}, 1);
  check_forward<T>(
      {.rows = 2, .queries = 40, .keys = 211, .bank = 2, .prefix_tokens = 197, .padded = true}, 3);
  check_forward<T>({.queries = 1, .keys = 100, .bank = 2, .window = 3}, 1);
  check_forward<T>({.bank = 2,
                    .positions = true,
                    .padded = true,
                    .masked = true,
                    .biased = true,
                    .sinks = true,
                    .alibi = true,
                    .window = 4,
                    .softcap = 2},
                   2);
  check_forward<T>({.queries = 9, .keys = 4, .prefix_tokens = 0}, 1);
  check_forward<T>({.keys = 0, .prefix_tokens = 0}, 1);
}

void check_without_lse() {
  Problem<float> problem(Sizes{});
  Arguments a = problem.arguments();
  a.lse = nullptr;
  std::atomic<bool> failed{false};
  forward<float>(a, forward_schedule(a), failed);
  CHECK(near(problem.out));
}

void check_without_memory() {
  Problem<float> problem(Sizes{});
  Arguments a = problem.arguments();
  a.head_dim = int64_t(1) << 50;
  std::atomic<bool> failed{false};
  forward<float>(a, forward_schedule(a), failed);
  CHECK(failed);
}

}  // namespace

int main() {
  check_chunks();
  check_fill();
  check_type<float>();
  check_type<double>();
  check_type<Float16>();
  check_type<Bfloat16>();
  check_without_lse();
  check_without_memory();
  return finish();
}
