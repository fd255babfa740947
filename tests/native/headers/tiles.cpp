#include "tiles.h"

#include <cmath>

#include "check.h"

using namespace prefixattn::PREFIXATTN_ISA;

#if defined(PREFIXATTN_TILES)

namespace {

uint16_t bits_of(float x) { return narrow<Bfloat16>(x).bits; }

// Rows of 64 bytes with a gap between them.
template <class T>
struct Rows {
  static constexpr int kWidth = kTileBytes / int(sizeof(T)), kStride = kWidth + 4;
  T numbers[kTileRows * kStride] = {};

  T& at(int row, int column) { return numbers[row * kStride + column]; }
  static constexpr int64_t bytes() { return kStride * int64_t(sizeof(T)); }
};

// C + A B by the rule of the instruction: products of even places and of odd ones are summed apart.
float product(Rows<uint16_t>& a, Rows<uint16_t>& b, float c, int row, int column) {
  float sums[2] = {0, 0};
  for (int pair = 0; pair < kTilePairs; ++pair)
    for (int number = 0; number < 2; ++number)
      sums[number] = std::fma(widen(Bfloat16{a.at(row, 2 * pair + number)}),
                              widen(Bfloat16{b.at(pair, 2 * column + number)}), sums[number]);
  return c + (sums[0] + sums[1]);
}

void check_product(check::Random& random) {
  Rows<uint16_t> a, b;
  Rows<float> c, sums, copy;
  for (int row = 0; row < kTileRows; ++row)
    for (int i = 0; i < 2 * kTilePairs; ++i) {
      a.at(row, i) = bits_of(float(random.number()));
      b.at(row, i) = bits_of(float(random.number()));
      if (i < kTileRows) c.at(row, i) = 100 * float(random.number());
    }
  tile_load<2>(c.numbers, c.bytes());
  tile_load<5>(a.numbers, a.bytes());
  tile_load_once<7>(b.numbers, b.bytes());
  tile_multiply<2, 5, 7>();
  tile_store<2>(sums.numbers, sums.bytes());
  tile_zero<3>();
  tile_store<3>(copy.numbers, copy.bytes());
  for (int row = 0; row < kTileRows; ++row) {
    for (int column = 0; column < kTileRows; ++column) {
      CHECK(sums.at(row, column) == product(a, b, c.at(row, column), row, column));
      CHECK(copy.at(row, column) == 0);
    }
    CHECK(sums.at(row, kTileRows) == 0);  // the gap
  }
}

// A subnormal number counts as 0, and what is no number stays none.
void check_special() {
  Rows<uint16_t> a, b;
  Rows<float> c;
  a.at(0, 0) = 1, b.at(0, 0) = bits_of(1);
  a.at(1, 1) = bits_of(INFINITY), b.at(0, 3) = bits_of(-2);
  a.at(2, 0) = bits_of(NAN);
  tile_zero<0>();
  tile_load<1>(a.numbers, a.bytes());
  tile_load<2>(b.numbers, b.bytes());
  tile_multiply<0, 1, 2>();
  tile_store<0>(c.numbers, c.bytes());
  CHECK(c.at(0, 0) == 0);
  CHECK(c.at(1, 1) == -INFINITY && std::isnan(c.at(1, 0)));  // an infinity times 0
  CHECK(std::isnan(c.at(2, 0)) && c.at(3, 0) == 0);
}

}  // namespace

int main() {
  for (int task = 0; task < 2; ++task) {  // configured anew for each
    const Tiles tiles;
    check::Random random(uint64_t(task + 1));
    for (int i = 0; i < 50; ++i) check_product(random);
    check_special();
  }
  return check::finish();
}

#else

int main() { return check::finish(); }

#endif
