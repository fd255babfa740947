// The forward of one call: its tasks, on threads.
#pragma once

#include "by_tiles.h"
#include "prefix_attention.h"

namespace prefixattn::PREFIXATTN_ISA {

template <class Body>
void on_threads(int threads, Body body) {
  run_on_threads(threads, [](void* context) { (*static_cast<Body*>(context))(); }, &body);
}

// The chunk's share of some slots, cut at whole tiles.
inline Interval chunk_of(int64_t slots, int64_t chunk, int64_t chunks) {
  const int64_t size = round_up(ceil_div(slots, chunks), kTile);
  return overlap({chunk * size, (chunk + 1) * size}, {0, slots});
}

// Fills a block with the row's queries of one key head from number `first` on.
template <class T>
void fill(Block<T>& block, const Row& row, int64_t key_head, int64_t first) {
  const Arguments& a = block.arguments;
  const Interval numbers =
      overlap({first, first + kBlock}, {0, row.queries * (a.heads / a.key_heads)});
  block.count = 0;
  for (int64_t number = numbers.first; number < numbers.last; ++number)
    block.lanes[block.count++] = lane_of(a, row, key_head, number);
}

// Every block of queries takes in both halves and is finished. Of a causal row the last blocks come
// first: they see most.
template <class T>
void forward_whole(const Arguments& a, const Schedule& s, std::atomic<bool>& failed) {
  Queue queue{a.rows * a.key_heads * s.blocks};
  on_threads(s.threads, [&] {
    Forward<T> forward(a, failed);
    for (int64_t task; forward.ready() && queue.take(task);) {
      const int64_t strand = task / s.blocks, key_head = strand % a.key_heads;
      const Row row = row_of(a, strand / a.key_heads);
      fill(forward.block(), row, key_head, (s.blocks - 1 - task % s.blocks) * kBlock);
      if (forward.block().count == 0) continue;
      forward.begin();
      if (row.prefix_tokens > 0)
        forward.attend(Half::prefix, source_of<T>(a, row, Half::prefix, key_head),
                       {0, row.prefix_tokens});
      forward.attend(Half::sequence, source_of<T>(a, row, Half::sequence, key_head), {0, row.keys});
      forward.finish();
    }
  });
}

// Unfinished states, one for each chunk of keys and each query: [chunk][place].
template <class T>
struct Partial {
  using Sum = SumOf<T>;

  Sum *peaks, *totals, *values;
  int64_t places, value_dim;

  void keep(Forward<T>& forward, int64_t chunk) const {
    forward.keep(peaks + chunk * places, totals + chunk * places,
                 values + chunk * places * value_dim);
  }

  // The finished output and lse of one query.
  void merge(const Arguments& a, const Lane& lane, int64_t chunks) const {
    const int64_t place = place_of(a, lane);
    SoftmaxState<Sum> state;
    state.peak[0] = peaks[place], state.total[0] = totals[place];
    Sum* sums = values + place * value_dim;
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const int64_t other = chunk * places + place;
      const auto [mine, others] = state.merge(0, peaks[other], totals[other]);
      for (int64_t i = 0; i < value_dim; ++i)
        sums[i] = sums[i] * mine + values[other * value_dim + i] * others;
    }
    const Sum factor = state.normalise(0, a.sinks ? a.sinks + lane.head : nullptr);
    T* out = at<T>(a.out, lane);
    for (int64_t i = 0; i < value_dim; ++i) out[i] = narrow<T>(sums[i] * factor);
    write_log_sum(a, lane, state, 0);
  }
};

// Chunks of each half on their own, then a merge. A chunk of a prefix takes the queries of all rows
// that share it at once: it is read once for all of them.
template <class T>
void forward_split(const Arguments& a, const Schedule& s, std::atomic<bool>& failed) {
  const int64_t chunks = s.prefix_chunks + s.sequence_chunks, heads = a.key_heads;
  const int64_t lanes = a.queries * (a.heads / heads);
  Partial<T> partial;
  partial.places = a.rows * a.heads * a.queries, partial.value_dim = a.value_dim;
  Arena arena(failed);
  arena.plan(&partial.peaks, chunks * partial.places);
  arena.plan(&partial.totals, chunks * partial.places);
  arena.plan(&partial.values, chunks * partial.places * a.value_dim);
  if (!arena.reserve()) return;

  const int64_t prefix_tasks =
      int64_t(s.sharers.size()) * heads * s.prefix_blocks * s.prefix_chunks;
  Queue queue{prefix_tasks + a.rows * heads * s.blocks * s.sequence_chunks};
  const auto prefix = [&](Forward<T>& forward, int64_t task) {
    const int64_t chunk = task % s.prefix_chunks, block = task / s.prefix_chunks % s.prefix_blocks;
    const int64_t strand = task / s.prefix_chunks / s.prefix_blocks, key_head = strand % heads;
    const Sharers& group = s.sharers[size_t(strand / heads)];
    const Interval numbers =
        overlap({block * kBlock, (block + 1) * kBlock}, {0, (group.last - group.first) * lanes});
    Block<T>& mine = forward.block();
    mine.count = 0;
    for (int64_t number = numbers.first; number < numbers.last; ++number)
      mine.lanes[mine.count++] = lane_of(
          a, row_of(a, s.order[size_t(group.first + number / lanes)]), key_head, number % lanes);
    if (mine.count == 0) return;
    const Row& row = mine.lanes[0].row;
    forward.begin();
    if (row.prefix_tokens > 0)
      forward.attend(Half::prefix, source_of<T>(a, row, Half::prefix, key_head),
                     chunk_of(row.prefix_tokens, chunk, s.prefix_chunks));
    partial.keep(forward, chunk);
  };
  const auto sequence = [&](Forward<T>& forward, int64_t task) {
    const int64_t chunk = task % s.sequence_chunks, block = task / s.sequence_chunks % s.blocks;
    const int64_t strand = task / s.sequence_chunks / s.blocks, key_head = strand % heads;
    const Row row = row_of(a, strand / heads);
    fill(forward.block(), row, key_head, block * kBlock);
    forward.begin();
    forward.attend(Half::sequence, source_of<T>(a, row, Half::sequence, key_head),
                   chunk_of(row.keys, chunk, s.sequence_chunks));
    partial.keep(forward, s.prefix_chunks + chunk);
  };
  on_threads(s.threads, [&] {
    Forward<T> forward(a, failed);
    for (int64_t task; forward.ready() && queue.take(task);)
      task < prefix_tasks ? prefix(forward, task) : sequence(forward, task - prefix_tasks);
  });

  Queue rows{a.rows * heads};
  on_threads(s.threads, [&] {
    for (int64_t task; !failed && rows.take(task);)
      for (int64_t number = 0; number < lanes; ++number)
        partial.merge(a, lane_of(a, row_of(a, task / heads), task % heads, number), chunks);
  });
}

#if defined(PREFIXATTN_TILES)
// Strips of queries take in both halves. Each strip's result is the same however many share a task.
inline void forward_tiles(const Arguments& a, const Schedule& s, std::atomic<bool>& failed) {
  const int64_t strips = s.blocks * (kBlock / kStrip), strands = a.rows * a.key_heads;
  const int64_t each = ceil_div(strips * strands, kTasksEach * s.threads);
  const int64_t together = each < kStripsOfTask ? each : kStripsOfTask;
  const int64_t tasks = ceil_div(strips, together);
  Queue queue{strands * tasks};
  on_threads(s.threads, [&] {
    ByTiles forward(a, failed);
    for (int64_t task; forward.ready() && queue.take(task);) {
      const int64_t strand = task / tasks, key_head = strand % a.key_heads;
      const Row row = row_of(a, strand / a.key_heads);
      const int64_t first = (tasks - 1 - task % tasks) * together * kStrip;
      if (!forward.begin(row, key_head, first, together)) continue;
      if (row.prefix_tokens > 0)
        forward.attend(Half::prefix, source_of<Bfloat16>(a, row, Half::prefix, key_head));
      forward.attend(Half::sequence, source_of<Bfloat16>(a, row, Half::sequence, key_head));
      forward.finish();
    }
  });
}
#endif

template <class T>
void forward(const Arguments& a, const Schedule& s, std::atomic<bool>& failed) {
#if defined(PREFIXATTN_TILES)
  if constexpr (std::is_same_v<T, Bfloat16>)
    if (!s.split && ByTiles::takes(a)) return forward_tiles(a, s, failed);
#endif
  s.split ? forward_split<T>(a, s, failed) : forward_whole<T>(a, s, failed);
}

}  // namespace prefixattn::PREFIXATTN_ISA
