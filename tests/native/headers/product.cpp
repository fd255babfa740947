#include "product.h"

#include "check.h"

using namespace prefixattn::PREFIXATTN_ISA;

namespace {

// A unit that holds small whole numbers, and the product of two of them.
template <class Unit>
Unit unit_of(check::Random& random) {
  if constexpr (std::is_same_v<Unit, Pair>) {
    const Bfloat16 low = narrow<Bfloat16>(float(random.whole(-4, 4)));
    const Bfloat16 high = narrow<Bfloat16>(float(random.whole(-4, 4)));
    return {uint32_t(low.bits) | uint32_t(high.bits) << 16};
  } else {
    return Unit(random.whole(-4, 4));
  }
}

double product(double a, double b) { return a * b; }
[[maybe_unused]] double product(Pair a, Pair b) {
  const auto number = [](Pair pair, int i) {
    return widen(Bfloat16{uint16_t(pair.bits >> 16 * i)});
  };
  return number(a, 0) * number(b, 0) + number(a, 1) * number(b, 1);
}

struct Shape {
  int64_t rows, vectors, depth;
};

template <class Sum, class Unit>
void check_multiply(check::Random& random, Shape shape, Start start, bool transposed) {
  const auto [rows, vectors, depth] = shape;
  const int64_t columns = vectors * kLanes<Sum>, gap = 3;
  const int64_t c_stride = columns + gap, b_stride = columns + 1;
  std::vector<Unit> left(size_t(rows * depth)), right(size_t(depth * b_stride));
  for (Unit& unit : left) unit = unit_of<Unit>(random);
  for (Unit& unit : right) unit = unit_of<Unit>(random);
  const auto before = check::small_wholes<Sum>(random, rows * c_stride);
  const auto factors = check::small_wholes<Sum>(random, columns);
  const int64_t row_stride = transposed ? 1 : depth, depth_stride = transposed ? rows : 1;

  auto sums = before;
  multiply(sums.data(), c_stride, Left<Unit>{left.data(), row_stride, depth_stride}, right.data(),
           b_stride, rows, vectors, depth, start,
           start == Start::scaled ? factors.data() : nullptr);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < c_stride; ++j) {
      const double old = before[size_t(i * c_stride + j)];
      double wanted = start == Start::zero ? 0 : old;
      if (j >= columns) {
        CHECK(sums[size_t(i * c_stride + j)] == old);
        continue;
      }
      if (start == Start::scaled) wanted *= factors[size_t(j)];
      for (int64_t k = 0; k < depth; ++k)
        wanted += product(left[size_t(i * row_stride + k * depth_stride)],
                          right[size_t(k * b_stride + j)]);
      CHECK(sums[size_t(i * c_stride + j)] == wanted);
    }
}

template <class Sum, class Unit>
void check_multiply_lanes(check::Random& random) {
  Unit a[kLanes<Sum>], b[kLanes<Sum>];
  for (Unit* units : {a, b})
    for (int lane = 0; lane < kLanes<Sum>; ++lane) units[lane] = unit_of<Unit>(random);
  const Vector<Sum> sums = multiply_lanes(broadcast(Sum(3)), a, b);
  for (int lane = 0; lane < kLanes<Sum>; ++lane) CHECK(sums[lane] == 3 + product(a[lane], b[lane]));
}

template <class Sum, class Unit>
void check_type() {
  check::Random random(1);
  check_multiply_lanes<Sum, Unit>(random);
  for (int64_t rows = 0; rows <= 15; ++rows)
    for (int64_t vectors = 1; vectors <= 7; ++vectors)
      for (const int64_t depth : {0, 1, 2, 7})
        for (const Start start : {Start::zero, Start::sum, Start::scaled})
          check_multiply<Sum, Unit>(random, {rows, vectors, depth}, start, depth == 7);
  for (const int64_t rows : {16, 33, 47})  // whole tiles, and what is left over
    for (const int64_t vectors : {1, 2, 3})
      for (const int64_t depth : {16, 24, 40})
        for (const Start start : {Start::zero, Start::sum, Start::scaled})
          check_multiply<Sum, Unit>(random, {rows, vectors, depth}, start, false);
}

}  // namespace

int main() {
  [[maybe_unused]] prefixattn::PREFIXATTN_ISA::Tiles tiles;
  static_assert(units<float>(5) == 5 && units<Pair>(5) == 3 && units<Pair>(0) == 0);
  check_type<float, float>();
  check_type<double, double>();
#if defined(PREFIXATTN_PAIRS)
  check_type<float, Pair>();
#endif
  return check::finish();
}
