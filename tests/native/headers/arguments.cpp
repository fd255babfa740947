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
static_assert(offsetof(Arguments, prefix_bias) == 55 * kPlace);
static_assert(offsetof(Arguments, dout) == 67 * kPlace);
static_assert(offsetof(Arguments, dlse) == 91 * kPlace);
static_assert(offsetof(Arguments, dattn_mask) == 98 * kPlace);
static_assert(sizeof(Arguments) == 104 * kPlace);

int main() {
  // The numbers of `DTYPES` in prefixattn/cpu.py.
  CHECK(kFloat32 == 0 && kFloat64 == 1 && kFloat16 == 2 && kBfloat16 == 3 && kBool == 4);
  return check::finish();
}
