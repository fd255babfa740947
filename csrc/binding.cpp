// The library's C interface, and the choice of the instruction set when it runs.
#include <cstring>
#include <new>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace prefixattn {
namespace {

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
  bool (*runs_here)();
  bool (*preferred)();  // where it runs: whether it is faster than the sets after it
  int64_t only = kAnyDType;

  static constexpr int64_t kAnyDType = -1;
};

bool always() { return true; }

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
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Whether the processor has AMX's tiles, and products of bfloat16 in them.
bool has_tiles() {
  constexpr unsigned kTilesAndBfloat16 = 1u << 24 | 1u << 22;  // cpuid 7.0, EDX
  unsigned a, b, c, d;
  return has_avx512bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
         (d & kTilesAndBfloat16) == kTilesAndBfloat16;
}

// Whether this process may use them: the system has to save their 8 KiB for each thread, and Linux,
// from 5.16 on, wants to be asked. A sandbox, or an older system, refuses.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr unsigned kStateOfTiles = 1u << 17 | 1u << 18;  // XCR0
  constexpr int kAskForState = 0x1023, kDataOfTiles = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  if (!has_tiles()) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & kStateOfTiles) != kStateOfTiles) return false;
  static const bool granted = syscall(SYS_arch_prctl, kAskForState, kDataOfTiles) == 0;
  return granted;
#else
  return false;
#endif
}
#endif

#if defined(__aarch64__)
// Every processor of this kind has NEON, which "plain" is compiled to; these are the instructions
// for products and conversions of bfloat16.
bool has_neon_bf16() {
#if defined(__linux__)
  constexpr unsigned long kBfloat16Products = 1ul << 14;  // HWCAP2_BF16: older headers lack it
  return (getauxval(AT_HWCAP2) & kBfloat16Products) != 0;
#else
  return false;
#endif
}
#endif

// Best first. The build says which of them it compiled.
const InstructionSet kSets[] = {
#if defined(PREFIXATTN_HAS_AMX)
    {"amx", &amx::kKernels, may_use_tiles, always, kBfloat16},
#endif
#if defined(PREFIXATTN_HAS_AMX_EMULATED)
    {"amx_emulated", &amx_emulated::kKernels, has_avx512bf16, [] { return false; }, kBfloat16},
#endif
#if defined(PREFIXATTN_HAS_AVX512BF16)
    // Its product of pairs takes AMD's cores as long as one of floats, and Intel's four times as
    // long: there the set without it is 1.3 to 1.55 times as fast (Granite Rapids).
    {"avx512bf16", &avx512bf16::kKernels, has_avx512bf16,
     [] { return !__builtin_cpu_is("intel"); }},
#endif
#if defined(PREFIXATTN_HAS_AVX512)
    {"avx512", &avx512::kKernels, has_avx512, always},
#endif
#if defined(PREFIXATTN_HAS_AVX2)
    {"avx2", &avx2::kKernels, has_avx2, always},
#endif
#if defined(PREFIXATTN_HAS_NEON_BF16)
    {"neon_bf16", &neon_bf16::kKernels, has_neon_bf16, always},
#endif
    {"plain", &plain::kKernels, always, always},
};

const InstructionSet* best_set(bool for_any_dtype) {
  for (const InstructionSet& set : kSets) {
    if (for_any_dtype && set.only != InstructionSet::kAnyDType) continue;
    if (set.runs_here() && set.preferred()) return &set;
  }
  return nullptr;
}

const InstructionSet* const any_dtype_set = best_set(true);
std::atomic<const InstructionSet*> chosen_set{best_set(false)};

const Kernels& kernels_for(int64_t dtype) {
  const InstructionSet* const set = chosen_set.load();
  const bool takes_it = set->only == InstructionSet::kAnyDType || set->only == dtype;
  return *(takes_it ? set : any_dtype_set)->kernels;
}

enum Status { kDone = 0, kNoMemory = 1 };

int run(const Arguments& a, Schedule (*schedule)(const Arguments&),
        void (*Kernels::*kernel)(const Arguments&, const Schedule&, std::atomic<bool>&)) {
  try {
    std::atomic<bool> failed{false};
    (kernels_for(a.dtype).*kernel)(a, schedule(a), failed);
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

// Whether the processor has AMX and this process is not allowed to use it.
PREFIXATTN_API int prefixattn_tiles_refused() {
#if defined(__x86_64__)
  return has_tiles() && !may_use_tiles();
#else
  return 0;
#endif
}

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
