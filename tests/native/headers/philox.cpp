#include "philox.h"

#include "check.h"

using namespace prefixattn::PREFIXATTN_ISA;

namespace {

// Vectors give what single words do.
void check_vectors() {
  check::Random random(1);
  for (int i = 0; i < 100; ++i) {
    const uint64_t seed = random.bits();
    const uint32_t column = uint32_t(random.bits());
    Counters counters;
    for (auto* words : {counters.query, counters.head, counters.row})
      for (int half = 0; half < 2; ++half)
        for (int lane = 0; lane < kLanes<uint64_t>; ++lane)
          words[half][lane] = uint32_t(random.bits());
    uint32_t words[Counters::kWords];
    counters.words(words, RoundKeys(seed), column);
    for (int lane = 0; lane < Counters::kWords; ++lane) {
      const auto number = [&](const Vector<uint64_t>* of) {
        return uint32_t(of[lane / kLanes<uint64_t>][lane % kLanes<uint64_t>]);
      };
      CHECK(words[lane] == random_word(seed, column, number(counters.query), number(counters.head),
                                       number(counters.row)));
    }
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
