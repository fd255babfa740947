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

// The high and the low words of 32 x 32 bit products.
struct Words {
  Vector<uint32_t> high, low;
};

inline Words multiplied(Vector<uint32_t> words, uint32_t by) {
#if defined(__AVX512BW__)
  // One instruction multiplies the words at even places; those at odd ones are moved there.
  const __m512i even = _mm512_mul_epu32((__m512i)words, _mm512_set1_epi32(int(by)));
  const __m512i odd =
      _mm512_mul_epu32(_mm512_srli_epi64((__m512i)words, 32), _mm512_set1_epi32(int(by)));
  constexpr __mmask16 kOdd = 0xAAAA;
  return {(Vector<uint32_t>)_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), kOdd, odd),
          (Vector<uint32_t>)_mm512_mask_mov_epi32(even, kOdd, _mm512_slli_epi64(odd, 32))};
#elif defined(__AVX2__)
  const __m256i even = _mm256_mul_epu32((__m256i)words, _mm256_set1_epi32(int(by)));
  const __m256i odd =
      _mm256_mul_epu32(_mm256_srli_epi64((__m256i)words, 32), _mm256_set1_epi32(int(by)));
  constexpr int kOdd = 0xAA;
  return {(Vector<uint32_t>)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, kOdd),
          (Vector<uint32_t>)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), kOdd)};
#else
  Words words_of{};
  for (int i = 0; i < kLanes<uint32_t>; ++i) {
    const uint64_t product = uint64_t(words[i]) * by;
    words_of.high[i] = uint32_t(product >> 32), words_of.low[i] = uint32_t(product);
  }
  return words_of;
#endif
}

// `random_word` of a vector of counters.
inline Vector<uint32_t> random_words(uint64_t seed, Vector<uint32_t> column, Vector<uint32_t> query,
                                     Vector<uint32_t> head, Vector<uint32_t> row) {
  Vector<uint32_t> c0 = column, c1 = query, c2 = head, c3 = row;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Words a = multiplied(c0, 0xD2511F53u), b = multiplied(c2, 0xCD9E8D57u);
    c0 = b.high ^ c1 ^ k0, c1 = b.low;
    c2 = a.high ^ c3 ^ k1, c3 = a.low;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return c0;
}

}  // namespace prefixattn::PREFIXATTN_ISA
