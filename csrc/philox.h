// Philox4x32-10, counter-based random bits (Salmon et al., "Parallel Random Numbers: As Easy as 1,
// 2, 3", SC 2011), as `prefixattn/philox.py` defines dropout by them.
#pragma once

#include "simd.h"

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

// 32 x 32 bit products of the low words of vectors. What lies in the high words does not matter.
inline Vector<uint64_t> low_products(Vector<uint64_t> words, uint32_t by) {
#if defined(__AVX512F__)
  return (Vector<uint64_t>)_mm512_mul_epu32((__m512i)words, _mm512_set1_epi64(by));
#elif defined(__AVX2__)
  return (Vector<uint64_t>)_mm256_mul_epu32((__m256i)words, _mm256_set1_epi64x(by));
#else
  return (words & 0xffffffffu) * by;
#endif
}

// What is the same in all words of a seed: the keys of each round.
struct RoundKeys {
  uint64_t first[10], second[10];

  explicit RoundKeys(uint64_t seed) {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      first[round] = k0, second[round] = k1;
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
  }
};

// `random_word` of a vector's lanes of float, whose counters lie in the low words of two vectors,
// of which each round multiplies some. They are kept apart so that nothing has to be moved there.
struct Counters {
  static constexpr int kWords = kLanes<uint32_t>;
  Vector<uint64_t> query[2], head[2], row[2];

  void words(uint32_t* to, const RoundKeys& keys, uint32_t column) const {
    for (int half = 0; half < 2; ++half) {
      Vector<uint64_t> c0 = broadcast(uint64_t(column)), c1 = query[half], c2 = head[half],
                       c3 = row[half];
#pragma GCC unroll 10
      for (int round = 0; round < 10; ++round) {
        const Vector<uint64_t> a = low_products(c0, 0xD2511F53u);
        const Vector<uint64_t> b = low_products(c2, 0xCD9E8D57u);
        c0 = b >> 32 ^ c1 ^ keys.first[round], c1 = b;
        c2 = a >> 32 ^ c3 ^ keys.second[round], c3 = a;
      }
      typedef uint32_t Low __attribute__((vector_size(kVectorBytes / 2)));
      const Low low = __builtin_convertvector(c0, Low);
      std::memcpy(to + half * kLanes<uint64_t>, &low, sizeof low);
    }
  }
};

}  // namespace prefixattn::PREFIXATTN_ISA
