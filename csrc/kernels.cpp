// Compiled once for each instruction set, which PREFIXATTN_ISA names.
#include "kernels.h"

#include "backward.h"
#include "forward.h"

namespace prefixattn::PREFIXATTN_ISA {
namespace {

#if defined(PREFIXATTN_TILES)

// Tiles multiply bfloat16 and nothing else: binding.cpp gives other calls to another set.
void run_forward(const Arguments& a, const Schedule& s, std::atomic<bool>& failed) {
  forward<Bfloat16>(a, s, failed);
}

void run_backward(const Arguments& a, const Schedule& s, std::atomic<bool>& failed) {
  backward<Bfloat16>(a, s, failed);
}

#else

template <class T>
struct As {
  using type = T;
};

// Calls `body` with the storage type that `dtype` names.
template <class Body>
void with_dtype(int64_t dtype, Body body) {
  switch (dtype) {
    case kFloat32: return body(As<float>{});
    case kFloat64: return body(As<double>{});
    case kFloat16: return body(As<Float16>{});
    case kBfloat16: return body(As<Bfloat16>{});
  }
}

void run_forward(const Arguments& a, const Schedule& s, std::atomic<bool>& failed) {
  with_dtype(a.dtype, [&](auto as) { forward<typename decltype(as)::type>(a, s, failed); });
}

void run_backward(const Arguments& a, const Schedule& s, std::atomic<bool>& failed) {
  with_dtype(a.dtype, [&](auto as) { backward<typename decltype(as)::type>(a, s, failed); });
}

#endif

}  // namespace

const Kernels kKernels{run_forward, run_backward};

}  // namespace prefixattn::PREFIXATTN_ISA
