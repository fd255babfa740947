#include "gradients.h"

#include "problem.h"

using namespace check;

namespace {

// One row whose queries all lie in one block for each key head.
template <class T>
struct Scene {
  using Sum = SumOf<T>;

  Problem<T> problem;
  const Arguments a;
  std::atomic<bool> failed{false};
  Arena arena{failed};
  Backward<T> backward{a, arena};
  std::vector<Sum> key, value;  // sums of one half's slots

  explicit Scene(const Sizes& sizes) : problem(sizes), a(problem.arguments()) {
    CHECK(arena.reserve());
    for (size_t i = 0; i < problem.lse.size(); ++i) problem.lse[i] = Sum(problem.lse_wanted[i]);
    for (size_t i = 0; i < problem.out.stored.size(); ++i)
      problem.out.stored[i] = narrow<T>(Sum(problem.out.wanted[i]));
  }
  Row row() const { return row_of(a, 0); }
  void begin(int64_t key_head) {
    Block<T>& block = backward.block();
    const int64_t count = a.queries * (a.heads / a.key_heads);
    for (block.count = 0; block.count < count; ++block.count)
      block.lanes[block.count] = lane_of(a, row(), key_head, block.count);
    backward.begin();
  }
  // Takes in a half in two pieces.
  void attend(Half half, int64_t key_head, int64_t slots) {
    key.assign(size_t(slots * backward.key_width()), 0);
    value.assign(size_t(slots * backward.value_width()), 0);
    const auto source = source_of<T>(a, row(), half, key_head);
    const Sums<Sum> sums{key.data(), value.data()};
    backward.attend(half, source, {0, slots / 2}, sums);
    backward.attend(half, source, {slots / 2, slots}, sums);
  }
  // Compares the sums, times `scale`, with the gradients that are wanted of one key head.
  bool sums_are_right(const std::vector<Sum>& sums, int64_t stride, double scale,
                      Numbers<T>& gradient, int64_t key_head) const {
    std::vector<Sum> got;
    std::vector<double> wanted;
    for (int64_t slot = 0; slot < gradient.tokens; ++slot)
      for (int64_t i = 0; i < gradient.width; ++i) {
        got.push_back(sums[size_t(slot * stride + i)] * Sum(scale));
        wanted.push_back(gradient.want(0, key_head, slot, i));
      }
    return near(got, wanted, unit_of(T{}));
  }
};

template <class T>
void check_block(const Sizes& sizes) {
  Scene<T> scene(sizes);
  Problem<T>& problem = scene.problem;
  const double scale = Problem<T>::kScale;
  for (int64_t key_head = 0; key_head < sizes.key_heads; ++key_head) {
    scene.begin(key_head);
    const int64_t key_width = scene.backward.key_width(), width = scene.backward.value_width();
    scene.attend(Half::prefix, key_head, sizes.prefix_tokens);
    CHECK(scene.sums_are_right(scene.key, key_width, scale, problem.dprefix_key, key_head));
    CHECK(scene.sums_are_right(scene.value, width, 1, problem.dprefix_value, key_head));
    scene.attend(Half::sequence, key_head, sizes.keys);
    CHECK(scene.sums_are_right(scene.key, key_width, scale, problem.dkey, key_head));
    CHECK(scene.sums_are_right(scene.value, width, 1, problem.dvalue, key_head));
    scene.backward.finish();
    if (sizes.biased)
      scene.backward.add_to_bias(Half::prefix,
                                 source_of<T>(scene.a, scene.row(), Half::prefix, key_head),
                                 {0, sizes.prefix_tokens}, scene.a.dprefix_bias);
  }
  CHECK(near(problem.dquery) && near(problem.dbias, problem.dbias_wanted, unit_of(T{})));
}

template <class T>
void check_type() {
  check_block<T>({.rows = 1});
  check_block<T>({.rows = 1, .queries = 32, .keys = 120, .prefix_tokens = 101, .head_dim = 33});
  check_block<T>({.rows = 1, .queries = 9, .keys = 4, .prefix_tokens = 0});  // some see nothing
  check_block<T>({.rows = 1,
                  .queries = 5,
                  .positions = true,
                  .masked = true,
                  .biased = true,
                  .sinks = true,
                  .alibi = true,
                  .window = 6,
                  .softcap = 2});
}

}  // namespace

int main() {
  check_type<float>();
  check_type<double>();
  check_type<Float16>();
  check_type<Bfloat16>();
  return finish();
}
