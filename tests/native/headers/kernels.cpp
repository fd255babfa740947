// The whole library as another program would use it: each instruction set that runs here, in all
// four dtypes, by several callers at once. Its path is the argument; with a second one, "names", it
// only says which sets those are.
#include "kernels.h"

#include <dlfcn.h>

#include <cstring>
#include <thread>

#include "problem.h"

using namespace check;

namespace {

// Each better than those before it, of one kind of processor.
constexpr const char* kNames[] = {"plain", "avx2", "avx512", "avx512bf16", "amx", "neon_bf16"};
// Intel's processors have it, and are faster without.
constexpr const char* kNotAlwaysTaken = "avx512bf16";

struct Library {
  int (*forward)(const Arguments*);
  int (*backward)(const Arguments*);
  int (*arguments_size)();
  const char* (*instructions)();
  int (*use_instructions)(const char*);
};

template <class Function>
void find(void* handle, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(handle, name));
  CHECK(function);
}

template <class T>
void check_call(const Library& library, const Sizes& sizes, int threads, bool fixed_order) {
  Problem<T> problem(sizes);
  const Arguments a = problem.arguments(threads, fixed_order);
  CHECK(library.forward(&a) == 0 && problem.forward_is_right());
  CHECK(library.backward(&a) == 0 && problem.backward_is_right());
}

template <class T>
void check_type(const Library& library) {
  for (const int threads : {1, 3})
    for (const bool fixed_order : {false, true}) {
      check_call<T>(library,
                    {.bank = 2,
                     .positions = true,
                     .padded = true,
                     .masked = true,
                     .biased = true,
                     .sinks = true,
                     .alibi = true,
                     .window = 4,
                     .softcap = 2},
                    threads, fixed_order);
      check_call<T>(library, {.queries = 33, .keys = 110, .prefix_tokens = 103}, threads,
                    fixed_order);
      check_call<T>(library,
                    {.rows = 1,
                     .heads = 2,
                     .key_heads = 1,
                     .queries = 1,
                     .keys = 500,
                     .prefix_tokens = 400,
                     .head_dim = 65,
                     .padded = true},
                    threads, fixed_order);
    }
}

void check_types(const Library& library) {
  check_type<float>(library);
  check_type<double>(library);
  check_type<Float16>(library);
  check_type<Bfloat16>(library);
}

// The sets that run here, of which the library must have chosen the best one.
std::vector<const char*> sets(const Library& library) {
  const char* const chosen = library.instructions();
  bool better = false, found = false;  // than the chosen one, which was found
  std::vector<const char*> running;
  for (const char* name : kNames) {
    const char* const before = library.instructions();
    const bool runs = library.use_instructions(name) == 0;
    CHECK(std::strcmp(library.instructions(), runs ? name : before) == 0);
    if (runs) running.push_back(name);
    CHECK(!(runs && better) || std::strcmp(name, kNotAlwaysTaken) == 0);
    if (std::strcmp(name, chosen) == 0) CHECK(runs), better = found = true;
  }
  CHECK(found && std::strcmp(running[0], "plain") == 0);
  CHECK(library.use_instructions("none such") == 2);
  for (const char* name : running)
    std::printf("%s%s\n", name, std::strcmp(name, chosen) ? "" : ", chosen");
  return running;
}

}  // namespace

int main(int count, char** arguments) {
  void* handle = dlopen(count >= 2 ? arguments[1] : "", RTLD_NOW);
  if (!CHECK(handle)) return std::printf("%s\n", dlerror()), 1;
  Library library;
  find(handle, "prefixattn_forward", library.forward);
  find(handle, "prefixattn_backward", library.backward);
  find(handle, "prefixattn_arguments_size", library.arguments_size);
  find(handle, "prefixattn_instructions", library.instructions);
  find(handle, "prefixattn_use_instructions", library.use_instructions);
  CHECK(library.arguments_size() == int(sizeof(Arguments)));

  const std::vector<const char*> running = sets(library);
  if (count == 3 && std::strcmp(arguments[2], "names") == 0) return finish();
  for (const char* name : running) {
    CHECK(library.use_instructions(name) == 0);
    check_types(library);
    std::vector<std::thread> callers;
    for (int i = 0; i < 3; ++i)
      callers.emplace_back([&] { check_call<float>(library, {.queries = 70}, 2, false); });
    for (std::thread& caller : callers) caller.join();
  }
  return finish();
}
