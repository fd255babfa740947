#include "functions.h"

#include <algorithm>

#include "check.h"

using namespace prefixattn::PREFIXATTN_ISA;

namespace {

constexpr int kLane = kLanes<float>;

// The largest error, in units in the last place, over one float in 63 of [low, high] and their
// negatives. The exact value is libm's in double, wrong by 2^-28 of a float's unit at most.
template <class Function, class Exact>
double worst(float low, float high, Function function, Exact exact) {
  const uint32_t first = bits_as<uint32_t>(low), last = bits_as<uint32_t>(high);
  double worst = 0;
  for (uint32_t bits = first; bits <= last; bits += 63 * kLane / 2) {
    float numbers[kLane], results[kLane];
    for (int lane = 0; lane < kLane; ++lane) {
      const float size = bits_as<float>(std::min(bits + 63 * (lane / 2), last));
      numbers[lane] = lane % 2 ? -size : size;
    }
    store(results, function(load(numbers)));
    for (int lane = 0; lane < kLane; ++lane) {
      const double wanted = exact(double(numbers[lane]));
      const double unit = std::ldexp(1.0, std::max(std::ilogb(wanted), -126) - 23);
      worst = std::max(worst, std::abs(results[lane] - wanted) / unit);
    }
  }
  return worst;
}

float exp_of(float x) { return exp(broadcast(x))[kLane - 1]; }
float tanh_of(float x) { return tanh(broadcast(x))[kLane - 1]; }

void check_exp() {
  const auto vector = [](Vector<float> x) { return exp(x); };
  const auto exact = [](double x) { return std::exp(x); };
  const double error = worst(0x1p-40f, 87.3f, vector, exact);
  std::printf("exp: %.3f units in the last place\n", error);
  CHECK(error < 1.25);
  CHECK(worst(87.3f, 87.68f, vector, exact) < 1.25);
  for (float x = 87.68f; x <= 88; x = std::nextafter(x, 89.0f)) {
    CHECK(std::abs(exp_of(x) / std::exp(double(x)) - 1) < 0x1p-22);
    CHECK(exp_of(-x) >= 0 && exp_of(-x) <= 0x1p-126f);
  }
  for (const float x : {-87.7f, -88.0f, -88.1f, -1e30f, -INFINITY}) CHECK(exp_of(x) == 0);
  CHECK(exp_of(0) == 1 && exp_of(-0.0f) == 1);
  CHECK(exp_of(1e-45f) == 1 && exp_of(-1e-45f) == 1);
  CHECK(std::isnan(exp_of(NAN)));
}

// Another exponent, and the same digits.
void check_scaled_exp() {
  const auto scaled = [](float x) { return scaled_exp<-24>(broadcast(x))[kLane - 1]; };
  for (float x = -71; x < 80; x += 0.01f) CHECK(scaled(x) == std::ldexp(exp_of(x), -24));
  for (const float x : {-71.5f, -88.0f, -1e30f, -INFINITY}) CHECK(scaled(x) == 0);
  CHECK(std::isnan(scaled(NAN)));
  CHECK(scaled_exp<-24>(broadcast(-3.0))[0] == std::ldexp(std::exp(-3.0), -24));
}

void check_tanh() {
  const auto vector = [](Vector<float> x) { return tanh(x); };
  const auto exact = [](double x) { return std::tanh(x); };
  const double error = worst(0x1p-40f, 12.0f, vector, exact);
  std::printf("tanh: %.3f units in the last place\n", error);
  CHECK(error < 1.5);
  for (const float x : {9.1f, 10.0f, 88.0f, 1e30f, INFINITY}) {
    CHECK(tanh_of(x) == 1);
    CHECK(tanh_of(-x) == -1);
  }
  CHECK(tanh_of(0) == 0 && tanh_of(1e-45f) == 1e-45f);
  CHECK(std::isnan(tanh_of(NAN)));
}

void check_doubles() {
  for (double x = -800; x < 700; x += 0.37) {
    const auto e = exp(broadcast(x)), t = tanh(broadcast(x));
    for (int lane = 0; lane < kLanes<double>; ++lane)
      CHECK(e[lane] == std::exp(x) && t[lane] == std::tanh(x));
  }
}

// What 16 bits want: as above, or with half the instructions and some more error.
void check_for_halves() {
  const auto at_last = [](Vector<float> x) { return x[kLane - 1]; };
  double worst_exp = 0, worst_tanh = 0;
  for (float x = -60; x < 60; x += 0.00173f) {
    const double e = at_last(exp_for<Bfloat16, 0>(broadcast(x)));
    worst_exp = std::max(worst_exp, std::abs(e / std::exp(double(x)) - 1));
    for (const float small : {x, x / 100, x * 1e-20f}) {
      const double bent = at_last(tanh_for<Float16>(broadcast(small)));
      worst_tanh = std::max(worst_tanh, std::abs(bent / std::tanh(double(small)) - 1));
    }
    CHECK(at_last(exp_for<float, -24>(broadcast(x))) == at_last(scaled_exp<-24>(broadcast(x))));
    CHECK(at_last(tanh_for<float>(broadcast(x))) == tanh_of(x));
  }
  std::printf("for 16 bits: exp within %.1e of itself, tanh within %.1e\n", worst_exp, worst_tanh);
  CHECK(worst_exp < 1e-5 && worst_tanh < 7e-6);
  CHECK(at_last(exp_for<Bfloat16, -24>(broadcast(0.0f))) == 0x1p-24f);
  CHECK(at_last(exp_for<Bfloat16, -24>(broadcast(-INFINITY))) == 0);
  CHECK(std::isnan(at_last(exp_for<Bfloat16, -24>(broadcast(NAN)))));
  for (const float x : {0.0f, 1e30f, -1e30f, INFINITY, -INFINITY})
    CHECK(at_last(tanh_for<Bfloat16>(broadcast(x))) == std::tanh(x));
  CHECK(std::isnan(at_last(tanh_for<Bfloat16>(broadcast(NAN)))));
}

}  // namespace

int main() {
  check_for_halves();
  check_exp();
  check_scaled_exp();
  check_tanh();
  check_doubles();
  return check::finish();
}
