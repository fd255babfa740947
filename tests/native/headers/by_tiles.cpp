#include "by_tiles.h"

#include "problem.h"

using namespace check;

#if defined(PREFIXATTN_TILES)

namespace {

// The whole forward of a problem, `strips` strips of queries at a time.
void check_forward(const Sizes& sizes, int64_t strips) {
  Problem<Bfloat16> problem(sizes);
  const Arguments a = problem.arguments();
  CHECK(ByTiles::takes(a));
  std::atomic<bool> failed{false};
  ByTiles forward(a, failed);
  for (int64_t number = 0; number < a.rows; ++number)
    for (int64_t key_head = 0; key_head < a.key_heads; ++key_head) {
      const Row row = row_of(a, number);
      const auto attend = [&](Half half) {
        forward.attend(half, source_of<Bfloat16>(a, row, half, key_head));
      };
      for (int64_t first = 0; forward.begin(row, key_head, first, strips);
           first += strips * kStrip) {
        if (row.prefix_tokens > 0) attend(Half::prefix);
        attend(Half::sequence);
        forward.finish();
      }
    }
  CHECK(!failed && problem.forward_is_right());
}

// Squares of C, one after another: each is complete when the next but one is begun.
void check_squares() {
  const Tiles tiles;
  Random random(3);
  constexpr int64_t kSteps = 3, kRow = 40 * 2;
  std::vector<uint16_t> left(size_t(kSteps * 32 * 40)), right(size_t(kSteps * 32 * kStrip));
  for (auto* numbers : {&left, &right})
    for (uint16_t& number : *numbers) number = narrow<Bfloat16>(float(random.whole(-4, 4))).bits;
  const auto a = [&](int64_t row, int64_t k) {
    return widen(Bfloat16{left[size_t((k / 32 * 32 + row) * 40 + k % 32)]});
  };
  const auto b = [&](int64_t k, int64_t column) {
    return widen(Bfloat16{right[size_t((k / 2 * kStrip + column) * 2 + k % 2)]});
  };
  std::vector<float> sums(size_t(2 * 32 * kStrip), 7.0f);
  Squares squares;
  int between = 0;
  for (int square = 0; square < 2; ++square)
    squares.multiply(sums.data() + square * 32 * kStrip, square == 0,
                     reinterpret_cast<const char*>(left.data()), kRow, 32 * kRow,
                     reinterpret_cast<const Pair*>(right.data()), kSteps, [&] { ++between; });
  squares.flush();
  CHECK(between == 2 * 4 * kSteps);
  for (int64_t square = 0; square < 2; ++square)
    for (int64_t row = 0; row < 32; ++row)
      for (int64_t column = 0; column < kStrip; ++column) {
        float wanted = square == 0 ? 0.0f : 7.0f;
        for (int64_t k = 0; k < 32 * kSteps; ++k) wanted += a(row, k) * b(k, column);
        CHECK(sums[size_t((square * 32 + row) * kStrip + column)] == wanted);
      }
}

void check_what_it_takes() {
  for (const auto& change : {+[](Arguments& a) { a.softcap = 2; },
                             +[](Arguments& a) {
                               static int64_t seed[2];
                               a.dropout_seed = seed;
                             },
                             +[](Arguments& a) {
                               static bool mask;
                               a.attn_mask.data = &mask;
                             }}) {
    Problem<Bfloat16> problem(Sizes{});
    Arguments a = problem.arguments();
    change(a);
    CHECK(!ByTiles::takes(a));
  }
}

}  // namespace

int main() {
  check_squares();
  check_what_it_takes();
  for (const int64_t head_dim : {12, 32, 64, 96, 128, 160})
    check_forward({.queries = 30, .keys = 100, .head_dim = head_dim, .value_dim = 32}, 1);
  for (const int64_t value_dim : {8, 64, 72, 128})
    check_forward({.queries = 50, .keys = 600, .prefix_tokens = 97, .value_dim = value_dim}, 2);
  check_forward(
      {.rows = 2, .queries = 40, .keys = 211, .bank = 2, .prefix_tokens = 197, .padded = true}, 16);
  check_forward({.queries = 90, .keys = 100, .bank = 2, .window = 3}, 3);
  check_forward({.queries = 9, .keys = 4, .prefix_tokens = 0}, 1);
  check_forward({.queries = 40, .keys = 0, .prefix_tokens = 0}, 1);
  check_forward({.queries = 20, .keys = 20, .sinks = true}, 1);
  return check::finish();
}

#else

int main() { return check::finish(); }

#endif
