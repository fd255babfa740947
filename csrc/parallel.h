// Work for several threads: the caller's OpenMP runtime where there is one (torch's own, so that
// two pools of threads never fight for the cores), plain threads otherwise.
#pragma once

#include <atomic>
#include <cstdint>

namespace prefixattn {

// Runs `job(context)` on up to `threads` threads at once and returns when all are done. Inside a
// parallel region of OpenMP the caller's thread does it all.
void run_on_threads(int threads, void (*job)(void*), void* context);

// Numbers from 0 to `count`, each handed to one thread.
struct Queue {
  int64_t count;
  std::atomic<int64_t> next{0};

  bool take(int64_t& task) {
    task = next.fetch_add(1, std::memory_order_relaxed);
    return task < count;
  }
};

constexpr int64_t kAlignment = 64;  // of a vector
constexpr int kMostArrays = 24;     // in one workspace

// The workspace of one thread or one call. `failed` is set where there was no memory.
class Arena {
 public:
  explicit Arena(std::atomic<bool>& failed) : failed_(failed) {}
  Arena(const Arena&) = delete;
  ~Arena();

  // Announces an array; after the last one, `reserve`.
  template <class T>
  __attribute__((always_inline)) void plan(T** array, int64_t count) {
    plan_bytes(reinterpret_cast<void**>(array), count * int64_t(sizeof(T)));
  }

  // Gives every announced array its place, aligned for vectors and not initialised. A small arena
  // is memory that the thread keeps from call to call.
  bool reserve();

 private:
  void plan_bytes(void** array, int64_t bytes);

  struct Slot {
    void** array;
    int64_t offset;
  };
  std::atomic<bool>& failed_;
  Slot slots_[kMostArrays];
  int used_ = 0;
  int64_t size_ = 0;
  char* start_ = nullptr;
};

}  // namespace prefixattn
