#include "variant.h"

#include "problem.h"

using namespace check;

namespace {

constexpr int64_t kFirst = 2, kKeys = 37;  // the tile's slots: some whole vectors, and more
constexpr int64_t kSlots = 43;             // of a half

// Lanes of two heads of one row that starts late, and a tile of products for them.
template <class Sum>
struct Scene {
  Arguments a{};
  Lane lanes[kBlock];
  int64_t count = 4;
  std::vector<Sum> tile;
  int64_t start = 1, tokens = 41;
  double slopes[2] = {0.5, 0.125};

  Scene() : tile(kKeys * kBlock) {
    a.rows = a.bank = a.key_heads = 1, a.heads = 2, a.queries = 4, a.keys = kSlots;
    a.prefix_tokens = kSlots, a.window = -1, a.scale = 0.5;
    a.key_start = &start, a.prefix_lengths = &tokens;
    for (int64_t lane = 0; lane < count; ++lane) lanes[lane] = lane_of(a, row_of(a, 0), 0, lane);
    Random random(5);
    for (Sum& number : tile) number = Sum(4 * random.number());
  }
  std::vector<Sum> scored(const Variant& variant, Sum* slopes = nullptr) {
    std::vector<Sum> scores = tile;
    variant.template score<Sum>(scores.data(), slopes, lanes, count, kFirst, kKeys);
    return scores;
  }
  // Compares scores with what `wanted(product * scale, lane, slot)` makes of the products.
  template <class Wanted>
  void check(const std::vector<Sum>& scores, Wanted wanted) {
    for (int64_t key = 0; key < kKeys; ++key)
      for (int64_t lane = 0; lane < count; ++lane) {
        const size_t at = size_t(key * kBlock + lane);
        const double right = wanted(double(tile[at]) * a.scale, lanes[lane], kFirst + key);
        CHECK(scores[at] == right || std::abs(double(scores[at]) - right) < 16 * unit_of(Sum{}));
      }
  }
};

template <class Sum>
void check_softcap() {
  Scene<Sum> scene;
  CHECK((Variant{scene.a, Half::sequence}.plain()));
  scene.a.softcap = 1.5;
  const Variant variant{scene.a, Half::sequence};
  CHECK(!variant.plain() && variant.capped());
  std::vector<Sum> slopes(scene.tile.size());
  scene.check(scene.scored(variant, slopes.data()),
              [](double product, const Lane&, int64_t) { return 1.5 * std::tanh(product / 1.5); });
  scene.check(slopes, [](double product, const Lane&, int64_t) {
    return 1 - std::pow(std::tanh(product / 1.5), 2);
  });
}

template <class Sum>
void check_alibi() {
  Scene<Sum> scene;
  scene.a.alibi_slopes = scene.slopes;
  CHECK((Variant{scene.a, Half::prefix}.plain()));  // it has no position
  for (const Half half : {Half::prefix, Half::sequence}) {
    scene.a.windowed_prefix = half == Half::prefix;
    const Variant variant{scene.a, half};
    CHECK(!variant.plain());
    scene.check(scene.scored(variant), [&](double product, const Lane& lane, int64_t slot) {
      const int64_t position = half == Half::prefix ? scene.start + slot - scene.tokens : slot;
      const int64_t own = scene.a.keys - scene.a.queries + lane.query;
      return product - scene.slopes[lane.head] * double(std::abs(own - position));
    });
  }
}

template <class Sum, class T>
void check_bias(int64_t kind) {
  Scene<Sum> scene;
  Random random(6);
  std::vector<T> numbers(size_t(2 * 4 * kSlots));
  for (T& number : numbers) number = narrow<T>(SumOf<T>(random.whole(-8, 8)) / 4);
  scene.a.attn_mask = {numbers.data(), kind, 0, 4 * kSlots, kSlots, 1};
  const Variant variant{scene.a, Half::sequence};
  CHECK(!variant.plain() && (Variant{scene.a, Half::prefix}.plain()));
  // And one whose numbers have gaps between them.
  std::vector<T> apart(2 * numbers.size());
  for (size_t i = 0; i < numbers.size(); ++i) apart[2 * i] = numbers[i];
  Arguments b = scene.a;
  b.attn_mask = {apart.data(), kind, 0, 8 * kSlots, 2 * kSlots, 2};
  CHECK(scene.scored({b, Half::sequence}) == scene.scored(variant));
  scene.check(scene.scored(variant), [&](double product, const Lane& lane, int64_t slot) {
    return product + double(widen(numbers[size_t((lane.head * 4 + lane.query) * kSlots + slot)]));
  });
}

template <class Sum>
void check_mask() {
  Scene<Sum> scene;
  bool seen[kSlots];
  for (int slot = 0; slot < kSlots; ++slot) seen[slot] = slot % 2 == 0;
  scene.a.attn_mask = {seen, kBool, 0, 0, 0, 1};  // one for all queries
  scene.tile[3 * kBlock] = NAN;                   // at slot 5, which is hidden
  scene.check(
      scene.scored({scene.a, Half::sequence}),
      [&](double product, const Lane&, int64_t slot) { return seen[slot] ? product : -INFINITY; });
}

// What is kept is decided by one random word for each weight, and makes up for what is not.
template <class Sum>
void check_dropout() {
  Scene<Sum> scene;
  const int64_t seed[] = {int64_t(0x123456789abcdef), 7};
  CHECK(!(Variant{scene.a, Half::prefix}.dropped()));
  scene.a.dropout = 0.375, scene.a.dropout_seed = seed;
  for (const Half half : {Half::prefix, Half::sequence}) {
    const Variant variant{scene.a, half};
    std::vector<Sum> weights = scene.tile;
    variant.drop(weights.data(), scene.lanes, scene.count, kFirst, kKeys);
    scene.a.scale = 1;
    scene.check(weights, [&](double weight, const Lane& lane, int64_t slot) {
      const uint32_t column = uint32_t(slot + (half == Half::sequence ? kSlots : 0));
      const uint32_t word =
          random_word(uint64_t(seed[0]), column, uint32_t(lane.query), uint32_t(lane.head), 7);
      return word >= 0.375 * 0x1p32 ? weight / 0.625 : 0;
    });
  }
}

template <class Sum>
void check_type() {
  check_softcap<Sum>();
  check_alibi<Sum>();
  check_bias<Sum, float>(kFloat32);
  check_bias<Sum, double>(kFloat64);
  check_bias<Sum, Float16>(kFloat16);
  check_bias<Sum, Bfloat16>(kBfloat16);
  check_mask<Sum>();
  check_dropout<Sum>();
}

}  // namespace

int main() {
  check_type<float>();
  check_type<double>();
  return finish();
}
