// The library's C interface, and the choice of the instruction set when it runs.
#include <cstring>
#include <new>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace prefixattn {
namespace {

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
  bool (*runs_here)();
};

#if defined(__x86_64__)
// Older compilers' __builtin_cpu_supports has no word for it.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// Best first. The build says which of them it compiled.
const InstructionSet kSets[] = {
#if defined(PREFIXATTN_HAS_AVX512BF16)
    {"avx512bf16", &avx512bf16::kKernels,
     [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }},
#endif
#if defined(PREFIXATTN_HAS_AVX512)
    {"avx512", &avx512::kKernels, has_avx512},
#endif
#if defined(PREFIXATTN_HAS_AVX2)
    {"avx2", &avx2::kKernels, has_avx2},
#endif
    {"plain", &plain::kKernels, [] { return true; }},
};

const InstructionSet* best_set() {
  for (const InstructionSet& set : kSets)
    if (set.runs_here()) return &set;
  return nullptr;
}

std::atomic<const InstructionSet*> chosen_set{best_set()};

enum Status { kDone = 0, kNoMemory = 1 };

int run(const Arguments& a, Schedule (*schedule)(const Arguments&),
        void (*Kernels::*kernel)(const Arguments&, const Schedule&, std::atomic<bool>&)) {
  try {
    std::atomic<bool> failed{false};
    (chosen_set.load()->kernels->*kernel)(a, schedule(a), failed);
    return failed ? kNoMemory : kDone;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

}  // namespace
}  // namespace prefixattn

#define PREFIXATTN_API extern "C" __attribute__((visibility("default")))

using namespace prefixattn;

PREFIXATTN_API int prefixattn_forward(const Arguments* arguments) {
  return run(*arguments, forward_schedule, &Kernels::forward);
}

PREFIXATTN_API int prefixattn_backward(const Arguments* arguments) {
  return run(*arguments, backward_schedule, &Kernels::backward);
}

// Bytes of `Arguments`, by which Python knows that both sides mean the same.
PREFIXATTN_API int prefixattn_arguments_size() { return int(sizeof(Arguments)); }

// The instruction set in use.
PREFIXATTN_API const char* prefixattn_instructions() { return chosen_set.load()->name; }

// Takes another instruction set. Returns 0; 1 if this processor lacks it, 2 if there is none such.
PREFIXATTN_API int prefixattn_use_instructions(const char* name) {
  for (const InstructionSet& set : kSets) {
    if (std::strcmp(set.name, name) != 0) continue;
    if (!set.runs_here()) return 1;
    chosen_set = &set;
    return 0;
  }
  return 2;
}
