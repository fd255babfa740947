#include "simd.h"

#include "check.h"

using namespace prefixattn::PREFIXATTN_ISA;

namespace {

template <class T>
constexpr int kMantissa = 7;
template <>
constexpr int kMantissa<Float16> = 10;

// What 16 bits mean, by the formats' definition.
template <class T>
double meaning(uint16_t bits) {
  constexpr int mantissa = kMantissa<T>, most = (1 << (15 - mantissa)) - 1, bias = most / 2;
  const int exponent = bits >> mantissa & most, rest = bits & ((1 << mantissa) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == most) return rest ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(rest, 1 - bias - mantissa);
  return sign * std::ldexp(rest + (1 << mantissa), exponent - bias - mantissa);
}

bool same(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

// `narrow` and `narrow_vector` of x give `wanted`, or some NaN.
template <class T>
void check_narrow(float x, uint16_t wanted) {
  T numbers[kLanes<float>];
  narrow_vector(numbers, broadcast(x));
  const T one = narrow<T>(x);
  if (std::isnan(x)) {
    CHECK(std::isnan(widen(one)) && std::isnan(widen(numbers[kLanes<float> - 1])));
    return;
  }
  CHECK(one.bits == wanted);
  CHECK(numbers[0].bits == wanted && numbers[kLanes<float> - 1].bits == wanted);
}

template <class T>
void check_storage() {
  constexpr uint16_t infinity = uint16_t(0x7fff >> kMantissa<T> << kMantissa<T>);
  for (uint32_t bits = 0; bits < 0x10000; bits += kLanes<float>) {
    T numbers[kLanes<float>];
    for (int lane = 0; lane < kLanes<float>; ++lane) numbers[lane] = {uint16_t(bits + lane)};
    const Vector<float> wide = widen_vector(numbers);
    for (int lane = 0; lane < kLanes<float>; ++lane) {
      const double wanted = meaning<T>(numbers[lane].bits);
      CHECK(same(widen(numbers[lane]), wanted) && same(wide[lane], wanted));
      check_narrow<T>(widen(numbers[lane]), numbers[lane].bits);
    }
  }
  // Halfway to the next number the even one is taken; a hair beside it the near one.
  for (uint16_t low = 0; low < infinity; ++low) {
    const uint16_t high = uint16_t(low + 1), even = low & 1 ? high : low;
    // Past the largest number it goes on as if there were a next one.
    const double next =
        high == infinity ? 2 * meaning<T>(low) - meaning<T>(uint16_t(low - 1)) : meaning<T>(high);
    const float middle = float((meaning<T>(low) + next) / 2);
    for (const uint16_t sign : {0, 0x8000}) {
      const float halfway = sign ? -middle : middle;
      check_narrow<T>(halfway, uint16_t(even | sign));
      check_narrow<T>(std::nextafter(halfway, 0.0f), uint16_t(low | sign));
      check_narrow<T>(std::nextafter(halfway, 2 * halfway), uint16_t(high | sign));
    }
  }
  for (const float x : {1e-45f, 0x1p-134f, 3e38f, INFINITY, NAN}) {
    const uint16_t of_small = 0, of_large = infinity;
    if (x != 3e38f || kMantissa<T> == 10) check_narrow<T>(x, x < 1 ? of_small : of_large);
  }
  for (const uint32_t nan : {0x7f800001u, 0xff800001u, 0x7fffffffu})
    check_narrow<T>(bits_as<float>(nan), 0);
}

template <class T>
void check_shuffles() {
  constexpr int lanes = kLanes<T>;
  constexpr auto sequence = std::make_integer_sequence<int, lanes>{};
  Vector<T> square[lanes], a, b;
  for (int i = 0; i < lanes; ++i) {
    a[i] = T(i), b[i] = T(100 + i);
    for (int j = 0; j < lanes; ++j) square[i][j] = T(100 * i + j);
  }
  const Vector<T> first = interleaved<false, T>(a, b, sequence);
  const Vector<T> second = interleaved<true, T>(a, b, sequence);
  for (int i = 0; i < lanes; ++i) {
    CHECK(first[i] == T(i / 2 + i % 2 * 100));
    CHECK(second[i] == T(lanes / 2 + i / 2 + i % 2 * 100));
  }
  transpose<T>(square);
  for (int i = 0; i < lanes; ++i)
    for (int j = 0; j < lanes; ++j) CHECK(square[i][j] == T(100 * j + i));
}

template <class T>
void check_numbers() {
  constexpr int lanes = kLanes<T>;
  CHECK(fused(broadcast(T(3)), broadcast(T(-5)), broadcast(T(4)))[lanes - 1] == -11);
  T unaligned[lanes + 1] = {};
  store(unaligned + 1, broadcast(T(3)));
  CHECK(unaligned[0] == 0 && unaligned[lanes] == 3 && load(unaligned + 1)[lanes - 1] == 3);
  CHECK(std::signbit(broadcast(T(-0.0))[0]));
  CHECK(maximum<T>(broadcast(T(1)), broadcast(T(2)))[0] == 2);
  CHECK(maximum<T>(broadcast(T(-1)), broadcast(T(-2)))[0] == -1);
  CHECK(std::isnan(maximum<T>(broadcast(T(NAN)), broadcast(T(2)))[0]));
  CHECK(widen_vector(unaligned)[0] == 0 && widen(unaligned[1]) == 3 && narrow<T>(T(3)) == 3);
}

}  // namespace

int main() {
  check_storage<Float16>();
  check_storage<Bfloat16>();
  check_shuffles<uint32_t>();
  check_shuffles<uint64_t>();
  check_numbers<float>();
  check_numbers<double>();
  return check::finish();
}
