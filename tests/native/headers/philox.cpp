#include "philox.h"

#include "check.h"

using namespace prefixattn::PREFIXATTN_ISA;

namespace {

// Vectors give what single words do.
void check_vectors() {
  check::Random random(1);
  for (int i = 0; i < 100; ++i) {
    const uint64_t seed = random.bits();
    Vector<uint32_t> counter[4];
    for (auto& words : counter)
      for (int lane = 0; lane < kLanes<uint32_t>; ++lane) words[lane] = uint32_t(random.bits());
    const auto words = random_words(seed, counter[0], counter[1], counter[2], counter[3]);
    for (int lane = 0; lane < kLanes<uint32_t>; ++lane)
      CHECK(words[lane] == random_word(seed, counter[0][lane], counter[1][lane], counter[2][lane],
                                       counter[3][lane]));
  }
}

}  // namespace

// The first words of the known answers for philox4x32-10 that Random123 is published with; the test
// of prefixattn/philox.py beside this one has the same.
int main() {
  CHECK(random_word(0, 0, 0, 0, 0) == 0x6627e8d5);
  CHECK(random_word(~uint64_t(0), ~0u, ~0u, ~0u, ~0u) == 0x408f276d);
  CHECK(random_word(0x299f31d0a4093822, 0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344) ==
        0xd16cfe09);
  check_vectors();
  return check::finish();
}
