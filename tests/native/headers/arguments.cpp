#include "arguments.h"

#include <cstddef>
#include <type_traits>

#include "check.h"

using namespace prefixattn;

// Where `RECORD` of prefixattn/cpu.py puts what it packs, eight bytes each.
constexpr size_t kPlace = 8;
static_assert(std::is_standard_layout_v<Arguments> && std::is_trivial_v<Arguments>);
static_assert(sizeof(Tensor) == 4 * kPlace && sizeof(Bias) == 6 * kPlace);
static_assert(offsetof(Arguments, scale) == 17 * kPlace);
static_assert(offsetof(Arguments, prefix_index) == 20 * kPlace);
static_assert(offsetof(Arguments, sinks) == 28 * kPlace);
static_assert(offsetof(Arguments, query) == 30 * kPlace);
static_assert(offsetof(Arguments, lse) == 54 * kPlace);
static_assert(offsetof(Arguments, prefix_bias) == 56 * kPlace);
static_assert(offsetof(Arguments, dout) == 68 * kPlace);
static_assert(offsetof(Arguments, dlse) == 92 * kPlace);
static_assert(offsetof(Arguments, dattn_mask) == 99 * kPlace);
static_assert(sizeof(Arguments) == 105 * kPlace);

int main() {
  // The numbers of `DTYPES` in prefixattn/cpu.py.
  CHECK(kFloat32 == 0 && kFloat64 == 1 && kFloat16 == 2 && kBfloat16 == 3 && kBool == 4);
  return check::finish();
}
