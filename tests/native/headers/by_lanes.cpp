#include "by_lanes.h"

#include "ways.h"

int main() {
  [[maybe_unused]] prefixattn::PREFIXATTN_ISA::Tiles tiles;
  check::check_types<prefixattn::PREFIXATTN_ISA::ByLanes>(64, 96, 64, 32);
  check::check_types<prefixattn::PREFIXATTN_ISA::ByLanes>(33, 41, 17, 35);
  check::check_types<prefixattn::PREFIXATTN_ISA::ByLanes>(12, 1, 1, 1);
  return check::finish();
}
