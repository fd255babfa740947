// The backward: blocks of queries walk over the tiles once more, and every sum has one owner.
//
// With weights w = exp(score - lse) and d = sum(dout * out) - dlse, the gradient of a score is
// w (dout . value - d) (Dao et al., "FlashAttention", 2022, appendix B.2). A block owns its queries'
// gradient; the strand of one entry and key head owns those of the keys and values that it reads.
#pragma once

#include "forward.h"

namespace prefixattn::PREFIXATTN_ISA {

// Sums of gradients of one head's keys and values, [keys][width]; null where nobody asked.
template <class Sum>
struct KeyGradients {
  Sum *key, *value;
};

// One thread's backward of one block after another.
template <class T>
class Backward {
 public:
  using Unit = UnitOf<T>;
  using Sum = SumOf<T>;

  Backward(const Arguments& a, Arena& arena) : arguments_(a), block_(a) {
    arena.plan(&query_, units<Unit>(a.head_dim) * kBlock);
    arena.plan(&dout_, units<Unit>(a.value_dim) * kBlock);
    arena.plan(&out_, units<Unit>(a.value_dim) * kBlock);
    arena.plan(&query_columns_, units<Unit>(kBlock) * key_width());
    arena.plan(&dout_columns_, units<Unit>(kBlock) * value_width());
    arena.plan(&packed_, kTile * units<Unit>(a.head_dim > a.value_dim ? a.head_dim : a.value_dim));
    arena.plan(&key_columns_, units<Unit>(kTile) * key_width());
    arena.plan(&operand_, units<Unit>(kTile * kBlock));
    arena.plan(&weights_, kTile * kBlock);
    arena.plan(&gradients_, kTile * kBlock);
    arena.plan(&slopes_, a.softcap > 0 ? kTile * kBlock : 0);
    arena.plan(&dquery_, a.head_dim * kBlock);
  }

  // Numbers from one key's sums to the next.
  int64_t key_width() const { return round_up(arguments_.head_dim, kLanes<Sum>); }
  int64_t value_width() const { return round_up(arguments_.value_dim, kLanes<Sum>); }

  Block<T>& block() { return block_; }

  // Packs the block that was filled in, and what comes from upstream at its queries.
  void begin() {
    const Arguments& a = arguments_;
    const T *queries[kBlock], *douts[kBlock], *outs[kBlock];
    for (int64_t lane = 0; lane < kBlock; ++lane) {
      const bool real = lane < block_.count;
      const Lane& at_lane = block_.lanes[real ? lane : 0];
      queries[lane] = at<T>(a.query, at_lane);
      douts[lane] = at<T>(a.dout, at_lane);
      const Sum lse = static_cast<const Sum*>(a.lse)[place_of(a, at_lane)];
      // Queries that see nothing, and lanes without one, get weights of exp(-inf).
      lse_[lane] = !real || lse == -Sum(INFINITY) ? Sum(INFINITY) : lse;
      outs[lane] = at<T>(a.out, at_lane);
    }
    pack_lanes(query_, queries, block_.count, a.head_dim);
    pack_lanes(dout_, douts, block_.count, a.value_dim);
    sum_delta(outs);
    pack_columns(query_columns_, key_width(), [&](int64_t lane) { return queries[lane]; },
                 lanes(), a.head_dim);
    pack_columns(dout_columns_, value_width(), [&](int64_t lane) { return douts[lane]; }, lanes(),
                 a.value_dim);
    std::memset(dquery_, 0, size_t(a.head_dim * kBlock) * sizeof(Sum));
  }

  // Adds what the slots in `range` give to the queries' gradient and to `sums`.
  void attend(Half half, const Source<T>& source, Interval range, KeyGradients<Sum> sums) {
    Interval seen[kBlock];
    const Interval span = block_.span(half, range, seen);
    for (int64_t first = span.first; first < span.last; first += kTile) {
      const int64_t keys = common({first, first + kTile}, span).last - first;
      differentiate(half, source, seen, first, keys);
      if (sums.value) add_to_values(sums.value + first * value_width(), half, first, keys);
      if (capped()) bend(keys);
      if (sums.key)
        multiply(sums.key + first * key_width(), key_width(),
                 over_queries(operand_, gradients_, keys), query_columns_, key_width(), keys,
                 key_width() / kLanes<Sum>, units<Unit>(lanes()), Start::sum);
      if (arguments_.dquery.data) add_to_queries(source, first, keys);
    }
  }

  // Writes the gradient of the block's queries.
  void finish() {
    if (!arguments_.dquery.data) return;
    alignas(64) Sum scale[kBlock];
    T* rows[kBlock];
    block_.rows(arguments_.dquery, rows);
    for (int64_t lane = 0; lane < kBlock; ++lane) scale[lane] = Sum(arguments_.scale);
    unpack_lanes(rows, dquery_, scale, block_.count, arguments_.head_dim);
  }

  // Adds the gradients of the scores of some slots to that of their half's bias.
  void add_to_bias(Half half, const Source<T>& source, Interval range, const Bias& bias) {
    Interval seen[kBlock];
    const Interval span = block_.span(half, range, seen);
    const Variant variant{arguments_, half};
    for (int64_t first = span.first; first < span.last; first += kTile) {
      const int64_t keys = common({first, first + kTile}, span).last - first;
      differentiate(half, source, seen, first, keys);
      for (int64_t lane = 0; lane < block_.count; ++lane) {
        Sum* sums =
            static_cast<Sum*>(bias.data) + variant.place(bias, block_.lanes[lane]) + first * bias.key;
        for (int64_t key = 0; key < keys; ++key)
          sums[key * bias.key] += gradients_[key * kBlock + lane];
      }
    }
  }

 private:
  int64_t lanes() const { return block_.vectors() * kLanes<Sum>; }
  bool capped() const { return arguments_.softcap > 0; }

  // sum(dout * out) - dlse at each query, in the order in which `products` sums dout . value: of a
  // query that sees one key both are the same number, and the gradient is 0.
  void sum_delta(const T* const* outs) {
    const Sum* dlse = static_cast<const Sum*>(arguments_.dlse);
    pack_lanes(out_, outs, block_.count, arguments_.value_dim);
    for (int64_t lane = 0; lane < lanes(); lane += kLanes<Sum>) {
      Vector<Sum> sums{};
      for (int64_t unit = 0; unit < units<Unit>(arguments_.value_dim); ++unit)
        sums = multiply_lanes(sums, out_ + unit * kBlock + lane, dout_ + unit * kBlock + lane);
      store(delta_ + lane, sums);
    }
    for (int64_t lane = 0; dlse && lane < block_.count; ++lane)
      delta_[lane] -= dlse[place_of(arguments_, block_.lanes[lane])];
  }

  // Weights (before dropout) and gradients of the scores of one tile.
  void differentiate(Half half, const Source<T>& source, const Interval* seen, int64_t first,
                     int64_t keys) {
    const Arguments& a = arguments_;
    const Variant variant{a, half};
    products(weights_, source.key + first * source.key_stride, source.key_stride, keys, a.head_dim,
             query_, block_.vectors(), packed_);
    products(gradients_, source.value + first * source.value_stride, source.value_stride, keys,
             a.value_dim, dout_, block_.vectors(), packed_);
    Sum scale = Sum(a.scale);
    if (!variant.plain()) {
      variant.score(weights_, capped() ? slopes_ : nullptr, block_.lanes, block_.count, first, keys);
      scale = 1;
    }
    if (variant.dropped()) variant.drop(gradients_, block_.lanes, block_.count, first, keys);
    Limits<Sum> room;
    const Limits<Sum>* limits = block_.limit(seen, first, keys, room);
    for (int64_t lane = 0; lane < lanes(); lane += kLanes<Sum>) {
      const Vector<Sum> lse = load(lse_ + lane), delta = load(delta_ + lane);
      for (int64_t key = 0; key < keys; ++key) {
        const int64_t at = key * kBlock + lane;
        Vector<Sum> scores = load(weights_ + at) * scale;
        if (limits) scores = hide(scores, *limits, lane, key);
        const Vector<Sum> weights = exp(scores - lse);
        store(weights_ + at, weights);
        store(gradients_ + at, weights * (load(gradients_ + at) - delta));
      }
    }
  }

  // Through the soft cap, to the gradients of scaled products.
  void bend(int64_t keys) {
    for (int64_t key = 0; key < keys; ++key)
      for (int64_t lane = 0; lane < lanes(); lane += kLanes<Sum>) {
        const int64_t at = key * kBlock + lane;
        store(gradients_ + at, load(gradients_ + at) * load(slopes_ + at));
      }
  }

  void add_to_values(Sum* sums, Half half, int64_t first, int64_t keys) {
    const Variant variant{arguments_, half};
    if (variant.dropped()) variant.drop(weights_, block_.lanes, block_.count, first, keys);
    multiply(sums, value_width(), over_queries(operand_, weights_, keys), dout_columns_,
             value_width(), keys, value_width() / kLanes<Sum>, units<Unit>(lanes()), Start::sum);
  }

  void add_to_queries(const Source<T>& source, int64_t first, int64_t keys) {
    const T* from = source.key + first * source.key_stride;
    const auto row = [&](int64_t key) { return from + key * source.key_stride; };
    pack_columns(key_columns_, key_width(), row, keys, arguments_.head_dim);
    multiply(dquery_, kBlock, Left<Unit>{key_columns_, 1, key_width()},
             over_keys(operand_, gradients_, keys, block_.vectors()), kBlock, arguments_.head_dim,
             block_.vectors(), units<Unit>(keys), Start::sum);
  }

  const Arguments& arguments_;
  Block<T> block_;
  alignas(64) Sum lse_[kBlock], delta_[kBlock];
  Unit *query_, *dout_, *out_, *query_columns_, *dout_columns_, *packed_, *key_columns_, *operand_;
  Sum *weights_, *gradients_, *slopes_, *dquery_;
};

// Writes scale * (sums[0] + sums[step] + ...), `parts` of them, as the gradient of one head's rows.
template <class T, class Sum>
void write_rows(const Tensor& tensor, int64_t batch, int64_t head, int64_t first, const Sum* sums,
                int64_t stride, int64_t rows, int64_t width, Sum scale, int64_t parts,
                int64_t step) {
  for (int64_t row = 0; row < rows; ++row, sums += stride) {
    T* to = at<T>(tensor, batch, head, first + row);
    for (int64_t i = 0; i < width; ++i) {
      Sum sum = sums[i];
      for (int64_t part = 1; part < parts; ++part) sum += sums[part * step + i];
      to[i] = narrow<T>(sum * scale);
    }
  }
}

// Sums of one half's keys and values for `owners` strands, `parts` sums for each: adding them up in
// the order of the parts gives the same bits whichever thread was first.
template <class Sum>
struct Sums {
  Sum *key = nullptr, *value = nullptr;
  int64_t slots = 0, key_width = 0, value_width = 0, parts = 1;

  void plan(Arena& arena, const Tensor& dkey, const Tensor& dvalue, int64_t owners) {
    if (dkey.data) arena.plan(&key, owners * parts * slots * key_width);
    if (dvalue.data) arena.plan(&value, owners * parts * slots * value_width);
  }

  KeyGradients<Sum> of(int64_t owner, int64_t part) const {
    const int64_t place = (owner * parts + part) * slots;
    return {key ? key + place * key_width : nullptr, value ? value + place * value_width : nullptr};
  }

  void clear(KeyGradients<Sum> sums, int64_t used) const {
    if (sums.key) std::memset(sums.key, 0, size_t(used * key_width) * sizeof(Sum));
    if (sums.value) std::memset(sums.value, 0, size_t(used * value_width) * sizeof(Sum));
  }

  template <class T>
  void write(const Arguments& a, const Tensor& dkey, const Tensor& dvalue, int64_t owner,
             int64_t batch, int64_t head, int64_t first, int64_t used) const {
    const auto [keys, values] = of(owner, 0);
    if (keys)
      write_rows<T>(dkey, batch, head, first, keys, key_width, used, a.head_dim, Sum(a.scale), parts,
                    slots * key_width);
    if (values)
      write_rows<T>(dvalue, batch, head, first, values, value_width, used, a.value_dim, Sum(1),
                    parts, slots * value_width);
  }
};

// The gradients of queries, keys, values and prefixes. A task is one strand (the rows of an entry,
// and a key head), or one slice of its rows and one part of their blocks.
template <class T>
void backward_main(const Arguments& a, const Schedule& s, std::atomic<bool>& failed) {
  using Sum = SumOf<T>;
  const int64_t groups = int64_t(s.sharers.size()), heads = a.key_heads;
  const int64_t pieces = s.slices * s.parts;
  const bool whole_prefix = pieces == 1, whole_rows = s.parts == 1;
  Sums<Sum> prefix, rows;
  prefix.slots = a.prefix_tokens, rows.slots = a.keys;
  prefix.parts = pieces, rows.parts = s.parts;
  prefix.key_width = rows.key_width = round_up(a.head_dim, kLanes<Sum>);
  prefix.value_width = rows.value_width = round_up(a.value_dim, kLanes<Sum>);
  Arena shared(failed);
  if (!whole_prefix) prefix.plan(shared, a.dprefix_key, a.dprefix_value, groups * heads);
  if (!whole_rows) rows.plan(shared, a.dkey, a.dvalue, a.rows * heads);
  if (!shared.reserve()) return;

  Queue queue{groups * heads * pieces};
  on_threads(s.threads, [&] {
    Arena arena(failed);
    Backward<T> backward(a, arena);
    Sums<Sum> own_prefix = prefix, own_rows = rows;
    if (whole_prefix) own_prefix.plan(arena, a.dprefix_key, a.dprefix_value, 1);
    if (whole_rows) own_rows.plan(arena, a.dkey, a.dvalue, 1);
    if (!arena.reserve()) return;
    for (int64_t task; !failed && queue.take(task);) {
      const int64_t piece = task % pieces, strand = task / pieces, key_head = strand % heads;
      const Sharers& group = s.sharers[size_t(strand / heads)];
      const int64_t slice = piece / s.parts, part = piece % s.parts, rows_of = group.last - group.first;
      const auto prefix_sums = own_prefix.of(whole_prefix ? 0 : strand, whole_prefix ? 0 : piece);
      own_prefix.clear(prefix_sums, a.prefix_tokens);
      for (int64_t i = slice * rows_of / s.slices; i < (slice + 1) * rows_of / s.slices; ++i) {
        const Row row = row_of(a, s.order[size_t(group.first + i)]);
        const auto sums = own_rows.of(whole_rows ? 0 : row.number * heads + key_head, part);
        own_rows.clear(sums, row.keys);
        for (int64_t block = part; block < s.blocks; block += s.parts) {
          fill(backward.block(), row, key_head, block * kBlock);
          if (backward.block().count == 0) break;
          backward.begin();
          if (row.prefix_tokens > 0)
            backward.attend(Half::prefix, source_of<T>(a, row, Half::prefix, key_head),
                            {0, row.prefix_tokens}, prefix_sums);
          backward.attend(Half::sequence, source_of<T>(a, row, Half::sequence, key_head),
                          {0, row.keys}, sums);
          backward.finish();
        }
        if (whole_rows)
          own_rows.template write<T>(a, a.dkey, a.dvalue, 0, row.batch, key_head, row.first_key,
                                     row.keys);
      }
      if (whole_prefix && group.entry >= 0)
        own_prefix.template write<T>(a, a.dprefix_key, a.dprefix_value, 0, group.entry, key_head, 0,
                                     a.prefix_tokens);
    }
  });

  Queue reductions{(whole_prefix ? 0 : groups * heads) + (whole_rows ? 0 : a.rows * heads)};
  on_threads(s.threads, [&] {
    for (int64_t task; !failed && reductions.take(task);) {
      const int64_t row_task = task - (whole_prefix ? 0 : groups * heads);
      if (row_task < 0) {
        const int64_t entry = s.sharers[size_t(task / heads)].entry;
        if (entry >= 0)
          prefix.template write<T>(a, a.dprefix_key, a.dprefix_value, task, entry, task % heads, 0,
                                   a.prefix_tokens);
      } else {
        const Row row = row_of(a, row_task / heads);
        rows.template write<T>(a, a.dkey, a.dvalue, row_task, row.batch, row_task % heads,
                               row.first_key, row.keys);
      }
    }
  });
}

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
    backward_main<T>(a, s, failed);
  backward_bias<T>(a, s, Half::prefix, a.dprefix_bias, failed);
  backward_bias<T>(a, s, Half::sequence, a.dattn_mask, failed);
}

}  // namespace prefixattn::PREFIXATTN_ISA
