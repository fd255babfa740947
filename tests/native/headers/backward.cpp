#include "backward.h"

#include "problem.h"

using namespace check;

namespace {

struct Cut {
  int64_t slices, parts;
};

// Gradients for a cut into slices of rows and parts of blocks, from the kernels' own forward.
template <class T>
void check_gradients(const Sizes& sizes, int threads, Cut cut) {
  Problem<T> problem(sizes);
  const Arguments a = problem.arguments(threads);
  std::atomic<bool> failed{false};
  forward<T>(a, forward_schedule(a), failed);
  Schedule s = backward_schedule(a);
  s.slices = cut.slices, s.parts = cut.parts;
  backward<T>(a, s, failed);
  CHECK(!failed && problem.backward_is_right());
}

template <class T>
void check_type() {
  for (const Cut cut : {Cut{1, 1}, Cut{3, 1}, Cut{2, 2}}) {
    check_gradients<T>({}, 1, cut);
    check_gradients<T>({.queries = 70,
                        .keys = 110,
                        .bank = 2,
                        .prefix_tokens = 103,
                        .head_dim = 20,
                        .value_dim = 9,
                        .padded = true},
                       3, cut);
    check_gradients<T>({.bank = 2,
                        .positions = true,
                        .padded = true,
                        .masked = true,
                        .biased = true,
                        .sinks = true,
                        .alibi = true,
                        .window = 4,
                        .softcap = 2},
                       2, cut);
    check_gradients<T>({.queries = 9, .keys = 4, .prefix_tokens = 0}, 1, cut);
  }
  check_gradients<T>({.keys = 0, .prefix_tokens = 0}, 1, {1, 1});
}

// What nobody asked for is not touched, and what is left comes out the same.
void check_wanted() {
  Problem<float> problem({.biased = true});
  Arguments a = problem.arguments();
  std::atomic<bool> failed{false};
  forward<float>(a, forward_schedule(a), failed);
  a.dquery.data = a.dkey.data = a.dprefix_value.data = a.dprefix_bias.data = nullptr;
  backward<float>(a, backward_schedule(a), failed);
  CHECK(near(problem.dvalue) && near(problem.dprefix_key));
  CHECK(std::isnan(problem.dquery.stored[0]) && std::isnan(problem.dkey.stored[0]));
  CHECK(problem.dprefix_value.stored[0] == 0 && problem.dbias[0] == 0);
}

void check_without_memory() {
  Problem<float> problem(Sizes{});
  Arguments a = problem.arguments();
  a.head_dim = int64_t(1) << 50;
  std::atomic<bool> failed{false};
  backward<float>(a, backward_schedule(a), failed);
  CHECK(failed);
}

}  // namespace

int main() {
  check_type<float>();
  check_type<double>();
  check_type<Float16>();
  check_type<Bfloat16>();
  check_wanted();
  check_without_memory();
  return finish();
}
