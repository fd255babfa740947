#include "tuning.h"

#include "check.h"

using namespace prefixattn::PREFIXATTN_ISA;

// What other headers take for granted.
int main() {
  CHECK(kBlock % 32 == 0);  // whole vectors, and whole steps of a product over lanes
  CHECK(kTile % 32 == 0);
  CHECK(int(kTile * kBlock * sizeof(float)) <= 32 * 1024);  // with room in the first cache
  CHECK(kFewPairs <= kFewNumbers && kFewNumbers <= kBlock);
  CHECK(kPanelVectors == 2 || kPanelVectors == 4);
  return check::finish();
}
