// The tile registers of AMX: eight of them, each 16 rows of 64 bytes.
//
// A tile holds 16 x 16 floats of C, 16 rows of 16 pairs of A, or 16 pairs of rows of B in 16
// columns; `tile_multiply` adds A B to C. It takes subnormal numbers as 0.
//
// There are two bodies. One is the instructions. The other computes the same bits in C++, so that
// every line above it can be tested, and looked at by sanitizers, where the processor has no tiles.
// The instructions are written out, since GCC's own words for them leave out that a load reads
// memory, which would let stores pass it.
#pragma once

#include "simd.h"

#if defined(__AMX_BF16__) || defined(PREFIXATTN_EMULATED_TILES)
#define PREFIXATTN_TILES

#if defined(PREFIXATTN_EMULATED_TILES)
#include <cstdlib>
#endif

namespace prefixattn::PREFIXATTN_ISA {

constexpr int kTileRows = 16;               // and columns of C
constexpr int kTileBytes = 64;              // of a row
constexpr int kTilePairs = kTileBytes / 4;  // of bfloat16, in a row

#if defined(__AMX_BF16__)

// Registers are named when the program is compiled.
template <int tile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int tile>
inline void tile_load(const void* from, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(tile) : "memory");
}
// The same for what is not read again soon: it leaves the nearest cache to other data.
template <int tile>
inline void tile_load_once(const void* from, int64_t row_bytes) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(tile) : "memory");
}
template <int tile>
inline void tile_store(void* to, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(tile) : "memory");
}
// sum += left * right
template <int sum, int left, int right>
inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(left), "i"(right));
}

// While it lives, the thread's tiles are configured and zero. Nothing may be computed with tiles
// without one, a thread has one at a time, and it ends with the thread's work: the system has more
// to save of a thread with live tiles whenever it switches to another.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int tile = 0; tile < 8; ++tile)
      shape.row_bytes[tile] = kTileBytes, shape.rows[tile] = kTileRows;
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
};

#else

struct TileFile {
  alignas(64) uint8_t tiles[8][kTileRows][kTileBytes];
  bool configured;
};
inline thread_local TileFile tile_file;

// The registers, which nobody may touch who has not configured them.
inline TileFile& configured() {
  if (!tile_file.configured) std::abort();
  return tile_file;
}

template <int tile>
inline void tile_zero() {
  std::memset(configured().tiles[tile], 0, sizeof tile_file.tiles[tile]);
}
template <int tile>
inline void tile_load(const void* from, int64_t row_bytes) {
  for (int row = 0; row < kTileRows; ++row)
    std::memcpy(configured().tiles[tile][row], static_cast<const char*>(from) + row * row_bytes,
                kTileBytes);
}
template <int tile>
inline void tile_load_once(const void* from, int64_t row_bytes) {
  tile_load<tile>(from, row_bytes);
}
template <int tile>
inline void tile_store(void* to, int64_t row_bytes) {
  for (int row = 0; row < kTileRows; ++row)
    std::memcpy(static_cast<char*>(to) + row * row_bytes, configured().tiles[tile][row],
                kTileBytes);
}

// What the instruction takes for a number: subnormal ones are 0.
inline Vector<float> normal(Vector<float> x) {
  return (x < 0 ? -x : x) < 0x1p-126f ? Vector<float>{} : x;
}

// Each number of C sums the products of even and of odd places apart, each fused and in order, and
// then takes the sum of both (found by comparing bits with the instruction's).
template <int sum, int left, int right>
inline void tile_multiply() {
  static_assert(kLanes<float> == kTileRows);
  const auto half = [](Vector<uint32_t> pairs, int number) {
    return normal(bits_as<Vector<float>>(number ? pairs & 0xffff0000u : pairs << 16));
  };
  auto& tiles = configured().tiles;
  const auto vector = [&](int tile, int row) {
    return load(reinterpret_cast<const uint32_t*>(tiles[tile][row]));
  };
  for (int row = 0; row < kTileRows; ++row) {
    const Vector<uint32_t> a = vector(left, row);
    Vector<float> sums[2] = {};
    for (int pair = 0; pair < kTilePairs; ++pair)
      for (int number = 0; number < 2; ++number)
        sums[number] = fused(half(broadcast(a[pair]), number), half(vector(right, pair), number),
                             sums[number]);
    const Vector<float> before = bits_as<Vector<float>>(vector(sum, row));
    store(reinterpret_cast<float*>(tiles[sum][row]), normal(before + (sums[0] + sums[1])));
  }
}

class Tiles {
 public:
  Tiles() {
    if (tile_file.configured) std::abort();
    tile_file.configured = true;
    std::memset(tile_file.tiles, 0, sizeof tile_file.tiles);
  }
  ~Tiles() { tile_file.configured = false; }
  Tiles(const Tiles&) = delete;
};

#endif

}  // namespace prefixattn::PREFIXATTN_ISA

#else

namespace prefixattn::PREFIXATTN_ISA {
struct Tiles {};  // there are none
}  // namespace prefixattn::PREFIXATTN_ISA

#endif
