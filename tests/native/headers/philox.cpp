#include "philox.h"

#include "check.h"

using prefixattn::PREFIXATTN_ISA::random_word;

// The first words of the known answers for philox4x32-10 that Random123 is published with; the test
// of prefixattn/philox.py beside this one has the same.
int main() {
  CHECK(random_word(0, 0, 0, 0, 0) == 0x6627e8d5);
  CHECK(random_word(~uint64_t(0), ~0u, ~0u, ~0u, ~0u) == 0x408f276d);
  CHECK(random_word(0x299f31d0a4093822, 0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344) ==
        0xd16cfe09);
  return check::finish();
}
