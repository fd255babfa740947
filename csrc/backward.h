// The backward of one call: its tasks, on threads, and who owns which sum.
//
// A block owns its queries' gradient. A strand, the rows of one bank entry and a key head, owns
// those of the keys and values that it reads: one thread walks it, row after row, in order.
#pragma once

#include "forward.h"
#include "gradients.h"

namespace prefixattn::PREFIXATTN_ISA {

// Room for the sums of one half: `parts` of them for each owner, to be added up in their order.
// With one part they belong to the thread, which writes them when the owner's work is done.
template <class T>
struct Store {
  using Sum = SumOf<T>;

  const Tensor &dkey, &dvalue;
  int64_t slots, parts, key_width, value_width, head_dim, value_dim;
  Sum scale, *key = nullptr, *value = nullptr;

  Store(const Arguments& a, const Tensor& dkey, const Tensor& dvalue, int64_t slots, int64_t parts)
      : dkey(dkey), dvalue(dvalue), slots(slots), parts(parts),
        key_width(round_up(a.head_dim, kLanes<Sum>)),
        value_width(round_up(a.value_dim, kLanes<Sum>)), head_dim(a.head_dim),
        value_dim(a.value_dim), scale(Sum(a.scale)) {}

  bool whole() const { return parts == 1; }

  void plan(Arena& arena, int64_t owners) {
    if (dkey.data) arena.plan(&key, owners * parts * slots * key_width);
    if (dvalue.data) arena.plan(&value, owners * parts * slots * value_width);
  }

  // The sums of an owner's part; those of the thread if there is but one.
  Sums<Sum> of(int64_t owner, int64_t part) const {
    const int64_t place = whole() ? 0 : (owner * parts + part) * slots;
    return {key ? key + place * key_width : nullptr, value ? value + place * value_width : nullptr};
  }

  Sums<Sum> cleared(int64_t owner, int64_t part, int64_t used) const {
    const Sums<Sum> sums = of(owner, part);
    if (sums.key) std::memset(sums.key, 0, size_t(used * key_width) * sizeof(Sum));
    if (sums.value) std::memset(sums.value, 0, size_t(used * value_width) * sizeof(Sum));
    return sums;
  }

  // Adds the thread's sums to an owner's part.
  void add(int64_t owner, int64_t part, const Sums<Sum>& more, int64_t used) const {
    const Sums<Sum> sums = of(owner, part);
    for (int64_t i = 0; sums.key && i < used * key_width; ++i) sums.key[i] += more.key[i];
    for (int64_t i = 0; sums.value && i < used * value_width; ++i) sums.value[i] += more.value[i];
  }

  // Writes an owner's gradient: the first `used` slots, from token `first` of its tensors on.
  void write(int64_t owner, int64_t batch, int64_t head, int64_t first, int64_t used) const {
    const Sums<Sum> sums = of(owner, 0);
    for (int64_t slot = 0; slot < used; ++slot) {
      if (sums.key)
        write_row(at<T>(dkey, batch, head, first + slot), sums.key + slot * key_width,
                  slots * key_width, head_dim, scale);
      if (sums.value)
        write_row(at<T>(dvalue, batch, head, first + slot), sums.value + slot * value_width,
                  slots * value_width, value_dim, Sum(1));
    }
  }

 private:
  void write_row(T* to, const Sum* sums, int64_t step, int64_t width, Sum factor) const {
    for (int64_t i = 0; i < width; ++i) {
      Sum sum = sums[i];
      for (int64_t part = 1; part < parts; ++part) sum += sums[part * step + i];
      to[i] = narrow<T>(sum * factor);
    }
  }
};

// The gradients of queries, keys, values and prefixes. A task is a strand, or one slice of its rows
// and one part of their blocks.
template <class T>
class Strands {
 public:
  Strands(const Arguments& a, const Schedule& s, std::atomic<bool>& failed)
      : arguments_(a), schedule_(s), failed_(failed), shared_(failed),
        prefix_(a, a.dprefix_key, a.dprefix_value, a.prefix_tokens, s.slices * s.parts),
        run_(a, a.dprefix_key, a.dprefix_value, a.prefix_tokens, 1),
        rows_(a, a.dkey, a.dvalue, a.keys, s.parts),
        run_of_row_(a, a.dkey, a.dvalue, has_runs() ? a.keys : 0, 1) {
    if (!prefix_.whole()) prefix_.plan(shared_, strands());
    if (!rows_.whole()) rows_.plan(shared_, a.rows * a.key_heads);
  }

  void run() {
    if (!shared_.reserve()) return;
    Queue queue{strands() * schedule_.slices * schedule_.parts};
    on_threads(schedule_.threads, [&] {
      Arena arena(failed_);
      Worker worker{Backward<T>(arguments_, arena), prefix_, run_, rows_, run_of_row_, {}, 0};
      if (prefix_.whole()) worker.prefix.plan(arena, 1);
      worker.run.plan(arena, 1);
      if (rows_.whole()) worker.rows.plan(arena, 1);
      worker.run_of_row.plan(arena, 1);
      if (!arena.reserve()) return;
      for (int64_t task; !failed_ && queue.take(task);) walk(worker, task);
    });
    if (!failed_) add_up();
  }

 private:
  struct Worker {
    Backward<T> backward;
    Store<T> prefix, run, rows, run_of_row;
    Sums<SumOf<T>> prefix_sums;  // of the run at hand
    int64_t in_run;              // its blocks so far
  };

  // Blocks whose gradients are summed before they meet the sum of all: one sum over the queries of
  // a large batch, or of a long row, would err as their number, two err as its root.
  static constexpr int64_t kBlocksInRun = 32;

  // Whether a row has so many blocks that its own keys' gradients are summed in runs too.
  bool has_runs() const { return schedule_.blocks > kBlocksInRun * schedule_.parts; }

  int64_t strands() const { return int64_t(schedule_.sharers.size()) * arguments_.key_heads; }
  const Sharers& group(int64_t strand) const {
    return schedule_.sharers[size_t(strand / arguments_.key_heads)];
  }

  void walk(Worker& worker, int64_t task) const {
    const int64_t slices = schedule_.slices, parts = schedule_.parts, pieces = slices * parts;
    const int64_t piece = task % pieces, strand = task / pieces, slice = piece / parts;
    const int64_t key_head = strand % arguments_.key_heads;
    const Sharers& sharers = group(strand);
    const int64_t count = sharers.last - sharers.first;
    const int64_t tokens = arguments_.prefix_tokens, last = (slice + 1) * count / slices;
    worker.prefix.cleared(strand, piece, tokens);
    begin_run(worker);
    const auto end_run = [&] { worker.prefix.add(strand, piece, worker.prefix_sums, tokens); };
    for (int64_t i = slice * count / slices; i < last; ++i) {
      const Row row = row_of(arguments_, schedule_.order[size_t(sharers.first + i)]);
      walk_row(worker, row, key_head, piece % parts, end_run);
    }
    end_run();
    if (prefix_.whole()) write_prefix(worker.prefix, strand);
  }

  void begin_run(Worker& worker) const {
    worker.prefix_sums = worker.run.cleared(0, 0, arguments_.prefix_tokens);
    worker.in_run = 0;
  }

  template <class EndRun>
  void walk_row(Worker& worker, const Row& row, int64_t key_head, int64_t part,
                const EndRun& end_run) const {
    const int64_t owner = row.number * arguments_.key_heads + key_head;
    auto sums = worker.rows.cleared(owner, part, row.keys);
    if (has_runs()) sums = worker.run_of_row.cleared(0, 0, row.keys);
    Backward<T>& backward = worker.backward;
    for (int64_t block = part; block < schedule_.blocks; block += schedule_.parts) {
      fill(backward.block(), row, key_head, block * kBlock);
      if (backward.block().count == 0) break;
      if (worker.in_run == kBlocksInRun) {
        end_run();
        begin_run(worker);
        if (has_runs()) worker.rows.add(owner, part, sums, row.keys);
        if (has_runs()) sums = worker.run_of_row.cleared(0, 0, row.keys);
      }
      ++worker.in_run;
      backward.begin();
      if (row.prefix_tokens > 0)
        backward.attend(Half::prefix, source_of<T>(arguments_, row, Half::prefix, key_head),
                        {0, row.prefix_tokens}, worker.prefix_sums);
      backward.attend(Half::sequence, source_of<T>(arguments_, row, Half::sequence, key_head),
                      {0, row.keys}, sums);
      backward.finish();
    }
    if (has_runs()) worker.rows.add(owner, part, sums, row.keys);
    if (rows_.whole()) worker.rows.write(owner, row.batch, key_head, row.first_key, row.keys);
  }

  void write_prefix(const Store<T>& store, int64_t strand) const {
    const int64_t entry = group(strand).entry;
    if (entry >= 0)
      store.write(strand, entry, strand % arguments_.key_heads, 0, arguments_.prefix_tokens);
  }

  // Writes what is owned in several parts.
  void add_up() const {
    const int64_t heads = arguments_.key_heads, prefixes = prefix_.whole() ? 0 : strands();
    Queue queue{prefixes + (rows_.whole() ? 0 : arguments_.rows * heads)};
    on_threads(schedule_.threads, [&] {
      for (int64_t task; queue.take(task);) {
        if (task < prefixes) {
          write_prefix(prefix_, task);
          continue;
        }
        const int64_t owner = task - prefixes;
        const Row row = row_of(arguments_, owner / heads);
        rows_.write(owner, row.batch, owner % heads, row.first_key, row.keys);
      }
    });
  }

  const Arguments& arguments_;
  const Schedule& schedule_;
  std::atomic<bool>& failed_;
  Arena shared_;
  Store<T> prefix_, run_, rows_, run_of_row_;
};

// The gradient of one half's bias. It may be shared by any dimensions, so the tasks are tiles of
// keys, which alone divide it; a bias that is shared by all keys is summed by one thread.
template <class T>
void backward_bias(const Arguments& a, const Schedule& s, Half half, const Bias& bias,
                   std::atomic<bool>& failed) {
  if (!bias.data) return;
  const int64_t slots = half == Half::prefix ? a.prefix_tokens : a.keys;
  const int64_t size = bias.key ? kTile : slots ? slots : 1;
  Queue queue{ceil_div(slots, size)};
  on_threads(s.threads, [&] {
    Arena arena(failed);
    Backward<T> backward(a, arena);
    if (!arena.reserve()) return;
    for (int64_t task; queue.take(task);)
      for (int64_t strand = 0; strand < a.rows * a.key_heads; ++strand) {
        const int64_t key_head = strand % a.key_heads;
        const Row row = row_of(a, strand / a.key_heads);
        if (half == Half::prefix && row.prefix_tokens == 0) continue;
        // A segment's slots count from its own first key, the bias's from the batch's.
        const int64_t skip = half == Half::prefix ? 0 : row.first_key;
        const Interval range{task * size - skip, (task + 1) * size - skip};
        for (int64_t block = 0; block < s.blocks; ++block) {
          fill(backward.block(), row, key_head, block * kBlock);
          if (backward.block().count == 0) break;
          backward.begin();
          backward.add_to_bias(half, source_of<T>(a, row, half, key_head), range, bias);
        }
      }
  });
}

template <class T>
void backward(const Arguments& a, const Schedule& s, std::atomic<bool>& failed) {
  if (a.dquery.data || a.dkey.data || a.dvalue.data || a.dprefix_key.data || a.dprefix_value.data)
    Strands<T>(a, s, failed).run();
  backward_bias<T>(a, s, Half::prefix, a.dprefix_bias, failed);
  backward_bias<T>(a, s, Half::sequence, a.dattn_mask, failed);
}

}  // namespace prefixattn::PREFIXATTN_ISA
