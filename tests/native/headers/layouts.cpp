#include "layouts.h"

#include "check.h"

using namespace prefixattn;
using namespace prefixattn::PREFIXATTN_ISA;

namespace {

// Number `i` of a unit.
double number(float unit, int) { return unit; }
double number(double unit, int) { return unit; }
[[maybe_unused]] double number(Pair unit, int i) {
  return widen(Bfloat16{uint16_t(unit.bits >> 16 * i)});
}

// Rows of small whole numbers, each in memory of its own, so that a sanitizer sees what is read
// past a row's end.
template <class T>
struct Rows {
  std::vector<std::vector<T>> rows;

  Rows(check::Random& random, int64_t count, int64_t width) : rows(size_t(count)) {
    for (std::vector<T>& row : rows)
      for (int64_t i = 0; i < width; ++i) row.push_back(narrow<T>(SumOf<T>(random.whole(-99, 99))));
  }
  double at(int64_t row, int64_t i) const {
    const bool inside = row < int64_t(rows.size()) && i < int64_t(rows[size_t(row)].size());
    return inside ? double(widen(rows[size_t(row)][size_t(i)])) : 0;
  }
};

template <class T>
void check_pack_rows(check::Random& random, int64_t count, int64_t width) {
  using Unit = UnitOf<T>;
  const int64_t stride = width + 3, depth = depth_of<Unit>(width);
  const Rows<T> one(random, 1, (count - 1) * stride + width);
  std::vector<Unit> packed(size_t(count * depth));
  pack_rows(packed.data(), one.rows[0].data(), stride, count, width);
  for (int64_t row = 0; row < count; ++row)
    for (int64_t i = 0; i < depth * kPerUnit<Unit>; ++i)
      CHECK(number(packed[size_t(row * depth + i / kPerUnit<Unit>)], i % kPerUnit<Unit>) ==
            (i < width ? one.at(0, row * stride + i) : 0));
}

template <class T>
void check_pack_columns(check::Random& random, int64_t count, int64_t width) {
  using Unit = UnitOf<T>;
  const Rows<T> from(random, count, width);
  const int64_t stride = round_up(width, kLanes<Unit>);
  std::vector<Unit> packed(size_t(units<Unit>(count) * stride));
  pack_columns(
      packed.data(), stride, [&](int64_t row) { return from.rows[size_t(row)].data(); }, count,
      width);
  for (int64_t row = 0; row < units<Unit>(count) * kPerUnit<Unit>; ++row)
    for (int64_t i = 0; i < stride; ++i)
      CHECK(number(packed[size_t(row / kPerUnit<Unit> * stride + i)], row % kPerUnit<Unit>) ==
            from.at(row, i));
}

template <class T>
void check_lanes(check::Random& random, int64_t count, int64_t width) {
  using Unit = UnitOf<T>;
  using Sum = SumOf<T>;
  Rows<T> from(random, count, width), to(random, count, width);
  std::vector<T*> places, targets;
  for (auto& row : from.rows) places.push_back(row.data());
  for (auto& row : to.rows) targets.push_back(row.data());
  std::vector<Unit> packed(size_t(depth_of<Unit>(width) * kBlock));
  pack_lanes(packed.data(), kBlock, [&](int64_t row) { return places[size_t(row)]; }, count, width);
  for (int64_t i = 0; i < depth_of<Unit>(width) * kPerUnit<Unit>; ++i)
    for (int64_t lane = 0; lane < round_up(count, kWholeLanes<Sum>); ++lane)
      CHECK(number(packed[size_t(i / kPerUnit<Unit> * kBlock + lane)], i % kPerUnit<Unit>) ==
            from.at(lane, i));

  std::vector<Sum> sums(size_t(width * kBlock)), factors(kBlock);
  for (int64_t lane = 0; lane < count; ++lane) {
    factors[size_t(lane)] = Sum(lane % 2 ? 2 : -0.5);
    for (int64_t i = 0; i < width; ++i) sums[size_t(i * kBlock + lane)] = Sum(from.at(lane, i));
  }
  unpack_lanes(targets.data(), sums.data(), kBlock, factors.data(), count, width);
  for (int64_t lane = 0; lane < count; ++lane)
    for (int64_t i = 0; i < width; ++i)
      CHECK(to.at(lane, i) == from.at(lane, i) * double(factors[size_t(lane)]));
}

// Rows as the left side of a product that sums over them, and of one that sums along them.
template <class T>
void check_left_sides(check::Random& random, int64_t count, int64_t width) {
  using Unit = UnitOf<T>;
  const Rows<T> from(random, count, width);
  std::vector<Unit> room(size_t(room_over_rows<Unit>(width)));
  const Left<Unit> columns = over_rows(
      room.data(), [&](int64_t row) { return from.rows[size_t(row)].data(); }, count, width);
  for (int64_t column = 0; column < width; ++column)
    for (int64_t row = 0; row < depth_of<Unit>(count) * kPerUnit<Unit>; ++row)
      CHECK(number(columns.data[column * columns.row_stride +
                                row / kPerUnit<Unit> * columns.depth_stride],
                   row % kPerUnit<Unit>) == from.at(row, column));

  for (const int64_t gap : {0, 1, 64}) {  // of which some strides are no whole units
    const Rows<T> one(random, 1, (count - 1) * (width + gap) + width);
    std::vector<Unit> packed(size_t(count * depth_of<Unit>(width)));
    const Left<Unit> rows =
        along_rows(one.rows[0].data(), width + gap, count, width, packed.data());
    for (int64_t row = 0; row < count; ++row)
      for (int64_t i = 0; i < width; ++i)
        CHECK(number(rows.data[row * rows.row_stride + i / kPerUnit<Unit> * rows.depth_stride],
                     i % kPerUnit<Unit>) == one.at(0, row * (width + gap) + i));
  }
}

// Tiles of weights as operands: over keys, and over queries.
template <class T>
void check_operands(check::Random& random, int64_t keys) {
  using Unit = UnitOf<T>;
  using Sum = SumOf<T>;
  const auto tile = check::small_wholes<Sum>(random, keys * kBlock);
  std::vector<Unit> room(size_t(units<Unit>(kTile * kBlock)));
  const auto wanted = [&](int64_t key, int64_t lane) {
    return key < keys ? double(tile[size_t(key * kBlock + lane)]) : 0;
  };
  const int64_t vectors = kBlock / kLanes<Sum>;
  const Unit* columns = over_keys(room.data(), tile.data(), keys, vectors);
  for (int64_t key = 0; key < depth_of<Unit>(keys) * kPerUnit<Unit>; ++key)
    for (int64_t lane = 0; lane < kBlock; ++lane)
      CHECK(number(columns[key / kPerUnit<Unit> * kBlock + lane], key % kPerUnit<Unit>) ==
            wanted(key, lane));
  const Left<Unit> rows = over_queries(room.data(), tile.data(), keys);
  for (int64_t key = 0; key < keys; ++key)
    for (int64_t lane = 0; lane < kBlock; ++lane)
      CHECK(number(rows.data[key * rows.row_stride + lane / kPerUnit<Unit> * rows.depth_stride],
                   lane % kPerUnit<Unit>) == wanted(key, lane));
}

template <class T>
void check_type() {
  check::Random random(2);
  for (const int64_t width : {1, 2, 7, 16, 31, 33, 64, 65})
    for (const int64_t count : {1, 2, 5, 16, 17, 63, 64}) {
      check_pack_rows<T>(random, count, width);
      check_pack_columns<T>(random, count, width);
      check_lanes<T>(random, count, width);
      check_left_sides<T>(random, count, width);
    }
  for (int64_t keys = 1; keys <= 5; ++keys) check_operands<T>(random, keys);
}

}  // namespace

int main() {
  check_type<float>();
  check_type<double>();
  check_type<Float16>();
  check_type<Bfloat16>();
  return check::finish();
}
