#include "rows.h"

#include "check.h"

using namespace prefixattn;
using namespace prefixattn::PREFIXATTN_ISA;

namespace {

// Whether a query sees a slot, by the rules of `prefix_attention`.
bool sees(const Arguments& a, const Row& row, Half half, int64_t query, int64_t slot) {
  const int64_t own = row.offset + query;
  if (half == Half::prefix) {
    const int64_t position = row.start + slot - row.prefix_tokens;
    return slot >= 0 && slot < row.prefix_tokens &&
           (!a.windowed_prefix || a.window < 0 || position > own - a.window);
  }
  return slot >= row.start && slot < row.stop && (!a.is_causal || slot <= own) &&
         (a.window < 0 || slot > own - a.window);
}

void check_seen(const Arguments& a, const Row& row) {
  for (const Half half : {Half::prefix, Half::sequence})
    for (int64_t query = 0; query < row.queries; ++query) {
      const Interval seen = seen_by(a, row, half, query);
      for (int64_t slot = -2; slot < 20; ++slot)
        CHECK((slot >= seen.first && slot < seen.last) == sees(a, row, half, query, slot));
    }
}

void check_intervals() {
  check::Random random(3);
  for (int i = 0; i < 3000; ++i) {
    Arguments a{};
    a.rows = a.bank = 1, a.heads = a.key_heads = 1;
    a.queries = random.whole(1, 9), a.keys = random.whole(0, 12);
    a.prefix_tokens = random.whole(0, 6);
    a.is_causal = random.whole(0, 1), a.windowed_prefix = random.whole(0, 1);
    a.window = random.whole(0, 1) ? random.whole(1, 8) : -1;
    a.has_offset = random.whole(0, 1), a.offset = random.whole(-5, 15);
    const int64_t start = random.whole(0, a.keys), length = random.whole(0, a.keys);
    const int64_t tokens = random.whole(0, a.prefix_tokens);
    if (random.whole(0, 1)) a.key_start = &start;
    if (random.whole(0, 1)) a.key_length = &length;
    if (random.whole(0, 1)) a.prefix_lengths = &tokens;
    const Row row = row_of(a, 0);
    CHECK(row.offset == (a.has_offset ? a.offset : a.keys - a.queries));
    CHECK(row.start == (a.key_start ? start : 0) && row.stop == (a.key_length ? length : a.keys));
    CHECK(row.prefix_tokens == (a.prefix_lengths ? tokens : a.prefix_tokens));
    check_seen(a, row);
  }
}

void check_far_positions() {
  Arguments a{};
  a.rows = a.bank = a.heads = a.key_heads = 1, a.queries = 2, a.keys = 5, a.prefix_tokens = 3;
  a.windowed_prefix = a.is_causal = a.has_offset = 1;
  for (const int64_t far : {INT64_MIN, INT64_MAX})
    for (const int64_t window : {int64_t(1), (int64_t(1) << 62) - 1}) {
      a.offset = far, a.window = window;
      const Row row = row_of(a, 0);
      for (int64_t slot = 0; slot < 5; ++slot) {
        const Interval seen = seen_by(a, row, Half::sequence, 1);
        // The offset is held to more than the widest window reaches back.
        CHECK(slot < seen.first || slot >= seen.last);
      }
    }
}

void check_packed() {
  const int64_t bounds_q[] = {0, 3, 3, 7}, bounds_k[] = {0, 2, 6, 7}, index[] = {1, -1, 0};
  const int64_t lengths[] = {4, 2}, offsets[] = {5, 6, 7};
  Arguments a{};
  a.rows = 3, a.heads = 4, a.key_heads = 2, a.queries = 7, a.keys = 7, a.bank = 2;
  a.prefix_tokens = 5, a.bounds_q = bounds_q, a.bounds_k = bounds_k;
  a.prefix_index = index, a.prefix_lengths = lengths, a.is_causal = 1, a.window = -1;
  for (int64_t number = 0; number < 3; ++number) {
    const Row row = row_of(a, number);
    CHECK(row.number == number && row.batch == 0);
    CHECK(row.first_query == bounds_q[number] && row.first_key == bounds_k[number]);
    CHECK(row.queries == bounds_q[number + 1] - bounds_q[number]);
    CHECK(row.keys == bounds_k[number + 1] - bounds_k[number] && row.stop == row.keys);
    CHECK(row.offset == row.keys - row.queries && row.entry == index[number]);
    CHECK(row.prefix_tokens == (number == 0 ? 2 : number == 1 ? 0 : 4));
    check_seen(a, row);
  }
  a.offsets = offsets;
  CHECK(row_of(a, 2).offset == 7);
  const Lane lane = lane_of(a, row_of(a, 2), 1, 7);
  CHECK(lane.head == 3 && lane.query == 3);
  CHECK(place_of(a, lane) == 3 * 7 + 3 + 3);
  float numbers[200];
  const Tensor tensor{numbers, 100, 20, 2};
  CHECK(at<float>(tensor, lane) == numbers + 3 * 20 + 6 * 2);
  CHECK(at<float>(tensor, 1, 2, 3) == numbers + 146);
}

void check_entries() {
  Arguments a{};
  a.rows = 3, a.heads = a.key_heads = 1, a.queries = a.keys = 1, a.prefix_tokens = 2;
  a.bank = 1;
  CHECK(row_of(a, 2).entry == 0);  // shared
  a.bank = 3;
  CHECK(row_of(a, 2).entry == 2);  // one each
  a.bank = 0;
  CHECK(row_of(a, 0).prefix_tokens == 0);
}

}  // namespace

int main() {
  check_intervals();
  check_far_positions();
  check_packed();
  check_entries();
  return check::finish();
}
