#include "by_rows.h"

#include "ways.h"

int main() {
  check::check_types<prefixattn::PREFIXATTN_ISA::ByRows>(6, 96, 64, 32);
  check::check_types<prefixattn::PREFIXATTN_ISA::ByRows>(5, 41, 17, 35);
  check::check_types<prefixattn::PREFIXATTN_ISA::ByRows>(1, 1, 1, 1);
  return check::finish();
}
