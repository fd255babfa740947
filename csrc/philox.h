// Philox4x32-10, counter-based random bits (Salmon et al., "Parallel Random Numbers: As Easy as 1,
// 2, 3", SC 2011), as `prefixattn/philox.py` defines dropout by them.
#pragma once

#include <cstdint>

namespace prefixattn::PREFIXATTN_ISA {

// The first output word for the key `seed` and the counter (column, query, head, row).
inline uint32_t random_word(uint64_t seed, uint32_t column, uint32_t query, uint32_t head,
                            uint32_t row) {
  uint32_t c0 = column, c1 = query, c2 = head, c3 = row;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(c0) * 0xD2511F53u, b = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0, c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1, c3 = uint32_t(a);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return c0;
}

}  // namespace prefixattn::PREFIXATTN_ISA
