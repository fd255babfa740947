// The numbers that were found by measuring, in one place. None of them changes a result by more
// than the rounding of its sums; `python -m benchmarks.tune_cpu` measures them again.
#pragma once

#include "tiles.h"

namespace prefixattn::PREFIXATTN_ISA {

// Queries in one block: the lanes of its vectors, and columns of its tiles. On Zen 4 calls take 2 %
// longer with 32, and 1 % with 128, by geometric mean.
constexpr int kBlock = 64;

// Keys in one tile, whose scores [key][query] stay in the first cache: 24 KiB of the 32 of Zen 4,
// and of the 48 KiB of an Intel core with AMX as many as fill its own tiles. On Zen 4 64, 128 and
// 160 are within 1 % of it by geometric mean.
#if defined(PREFIXATTN_TILES)
constexpr int kTile = 128;
#else
constexpr int kTile = 96;
#endif

#if defined(PREFIXATTN_TILES)
// Strips of 32 queries that share what is packed of the keys, and keys in a group: 512 of them, and
// their transposed values, stay in 2 MiB of second cache beside the strips' own 384 KiB (Granite
// Rapids, prototypes/amx).
constexpr int kStripsOfTask = 16;
constexpr int kKeysOfGroup = 512;
#endif

// The block of a product that stays in registers: as many as there are, less some for operands.
#if defined(__aarch64__)
constexpr int kPanelRows = 5;  // at 6 GCC 12 keeps some sums in memory
#else
constexpr int kPanelRows = 6;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kPanelVectors = 4;
#else
constexpr int kPanelVectors = 2;
#endif

// From so many queries on a block's lanes are the faster way: sooner where a unit holds two
// numbers, which the other way has to widen first (Zen 4, D = 64 and 128).
constexpr int kFewNumbers = 12;
constexpr int kFewPairs = 7;

// Waking other threads costs more than so many multiplications.
constexpr double kWorthThreads = 1e6;
// Tasks for each thread, so that a slow one does not keep the others waiting. On Zen 4 a training
// step takes up to a fifth longer with 1, and as long with 4.
constexpr int kTasksEach = 2;

}  // namespace prefixattn::PREFIXATTN_ISA
