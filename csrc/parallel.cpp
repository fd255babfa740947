#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <cstdlib>
#include <system_error>
#include <thread>
#include <vector>

namespace prefixattn {
namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using InParallel = int (*)();

template <class Function>
Function find(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}

// A forked child inherits an OpenMP runtime without its threads: waiting for them would never end.
std::atomic<bool> forked{false};
const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// A workspace that a thread keeps: giving it back to the system costs a page fault for each page of
// the next call's.
class Kept {
 public:
  ~Kept() { std::free(start_); }

  void* take(int64_t bytes) {
    if (busy_ || bytes > kMost) return nullptr;
    if (bytes > size_) {
      std::free(start_);
      start_ = std::aligned_alloc(kAlignment, size_t(bytes));
      size_ = start_ ? bytes : 0;
    }
    busy_ = start_ != nullptr;
    return start_;
  }

  bool give_back(void* memory) {
    if (!busy_ || memory != start_) return false;
    busy_ = false;
    return true;
  }

 private:
  static constexpr int64_t kMost = 1 << 20;
  void* start_ = nullptr;
  int64_t size_ = 0;
  bool busy_ = false;
};

thread_local Kept kept[2];  // a call's, and the thread's own for its blocks

}  // namespace

void Arena::plan_bytes(void** array, int64_t bytes) {
  if (used_ == kMostArrays) std::abort();  // a mistake of this library, which every test would meet
  slots_[used_++] = {array, size_};
  size_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

bool Arena::reserve() {
  if (size_ == 0) size_ = kAlignment;
  for (Kept& memory : kept)
    if (!start_) start_ = static_cast<char*>(memory.take(size_));
  if (!start_) start_ = static_cast<char*>(std::aligned_alloc(kAlignment, size_t(size_)));
  if (!start_) {
    failed_ = true;
    return false;
  }
  for (int i = 0; i < used_; ++i) *slots_[i].array = start_ + slots_[i].offset;
  return true;
}

Arena::~Arena() {
  if (!kept[0].give_back(start_) && !kept[1].give_back(start_)) std::free(start_);
}

void run_on_threads(int threads, void (*job)(void*), void* context) {
  static const auto in_parallel = find<InParallel>("omp_in_parallel");
  static const auto parallel = find<Parallel>("GOMP_parallel");
  if (threads <= 1 || (in_parallel && in_parallel())) return job(context);
  if (parallel && !forked) return parallel(job, context, unsigned(threads), 0);
  std::vector<std::thread> helpers;
  helpers.reserve(size_t(threads));
  for (int i = 1; i < threads; ++i) {
    try {
      helpers.emplace_back(job, context);
    } catch (const std::system_error&) {
      break;  // no more threads to be had: the queue is emptied by those there are
    }
  }
  job(context);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace prefixattn
