#include "parallel.h"

#include <thread>

#include "check.h"

using namespace prefixattn;

namespace {

template <class Body>
void on_threads(int threads, Body body) {
  run_on_threads(threads, [](void* context) { (*static_cast<Body*>(context))(); }, &body);
}

// Every task of a queue is done once, however many threads there are.
void check_tasks(int threads) {
  std::vector<int> done(20000, 0);
  std::atomic<int> jobs{0};
  Queue queue{int64_t(done.size())};
  on_threads(threads, [&] {
    ++jobs;
    for (int64_t task; queue.take(task);) ++done[size_t(task)];
  });
  for (const int times : done) CHECK(times == 1);
  CHECK(jobs >= 1 && jobs <= threads);
}

void check_nested() {
  std::atomic<int64_t> sum{0};
  on_threads(3, [&] {
    Queue queue{10};
    on_threads(3, [&] {
      for (int64_t task; queue.take(task);) sum += task;
    });
  });
  CHECK(sum % 45 == 0 && sum >= 45 && sum <= 3 * 45);
}

void check_several_callers() {
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i)
    callers.emplace_back([] {
      for (int round = 0; round < 20; ++round) check_tasks(2);
    });
  for (std::thread& caller : callers) caller.join();
}

// Places are aligned, apart from each other, and can be written.
void check_arena(int64_t size) {
  std::atomic<bool> failed{false};
  Arena arena(failed);
  char* bytes;
  double *numbers, *none;
  arena.plan(&bytes, size);
  arena.plan(&none, 0);
  arena.plan(&numbers, size);
  CHECK(arena.reserve() && !failed);
  CHECK(reinterpret_cast<uintptr_t>(bytes) % kAlignment == 0);
  CHECK(reinterpret_cast<uintptr_t>(numbers) % kAlignment == 0);
  CHECK(reinterpret_cast<char*>(numbers) >= bytes + size);
  for (int64_t i = 0; i < size; ++i) bytes[i] = char(i), numbers[i] = double(i);
  for (int64_t i = 0; i < size; ++i) CHECK(bytes[i] == char(i) && numbers[i] == double(i));
  if (size > 1) check_arena(size / 2);  // while this one is in use
  for (int64_t i = 0; i < size; ++i) CHECK(numbers[i] == double(i));
}

void check_no_memory() {
  std::atomic<bool> failed{false};
  Arena arena(failed);
  double* numbers;
  arena.plan(&numbers, int64_t(1) << 58);
  CHECK(!arena.reserve() && failed);
}

}  // namespace

int main() {
  for (const int threads : {1, 2, 5}) check_tasks(threads);
  check_nested();
  check_several_callers();
  for (const int64_t size : {0, 1, 100, 100000, 300000, 10}) check_arena(size);
  on_threads(3, [] { check_arena(1000); });
  check_no_memory();
  return check::finish();
}
