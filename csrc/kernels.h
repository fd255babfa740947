// The kernels of every instruction set; each is compiled from kernels.cpp.
#pragma once

#include <atomic>

#include "schedule.h"

namespace prefixattn {

struct Kernels {
  void (*forward)(const Arguments&, const Schedule&, std::atomic<bool>& failed);
  void (*backward)(const Arguments&, const Schedule&, std::atomic<bool>& failed);
};

namespace plain {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512bf16 {
extern const Kernels kKernels;
}
namespace amx {
extern const Kernels kKernels;
}
namespace amx_emulated {
extern const Kernels kKernels;
}
namespace neon_bf16 {
extern const Kernels kKernels;
}

}  // namespace prefixattn
