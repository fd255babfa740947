// All that these programs share: CHECK says where something is wrong, `finish` is main's result.
#pragma once

#include <cstdint>
#include <cstdio>
#include <vector>

namespace check {

inline int faults = 0;

inline bool fault(const char* file, int line, const char* what) {
  if (++faults <= 20) std::printf("%s:%d: %s\n", file, line, what);
  return false;
}

inline int finish() {
  if (faults) std::printf("%d checks failed\n", faults);
  return faults ? 1 : 0;
}

// Random numbers, the same on every machine (Steele et al., "Fast splittable pseudorandom number
// generators", 2014).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  // A whole number from `low` to `high`, both included.
  int64_t whole(int64_t low, int64_t high) {
    return low + int64_t(bits() % uint64_t(high - low + 1));
  }
  // A number of [-1, 1).
  double number() { return double(int64_t(bits())) * 0x1p-63; }

 private:
  uint64_t state_;
};

// Numbers that a product sums without rounding, in any order and in any storage type.
template <class T>
std::vector<T> small_wholes(Random& random, int64_t count) {
  std::vector<T> numbers(size_t(count), T(0));
  for (T& number : numbers) number = T(random.whole(-4, 4));
  return numbers;
}

}  // namespace check

#define CHECK(condition) ((condition) || check::fault(__FILE__, __LINE__, #condition))
