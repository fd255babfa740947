// A small attention problem of random numbers: its `Arguments`, and its results by loops in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "arguments.h"
#include "check.h"
#include "product.h"
#include "schedule.h"

namespace check {

using namespace prefixattn;
using namespace prefixattn::PREFIXATTN_ISA;

struct Sizes {
  int64_t rows = 3, heads = 4, key_heads = 2, queries = 7, keys = 9, bank = 1, prefix_tokens = 5,
          head_dim = 12, value_dim = 8;
  bool causal = true, positions = false, padded = false, masked = false, biased = false,
       sinks = false, alibi = false;
  int64_t window = -1;
  double softcap = 0;
};

inline int64_t dtype_of(float) { return kFloat32; }
inline int64_t dtype_of(double) { return kFloat64; }
inline int64_t dtype_of(Float16) { return kFloat16; }
inline int64_t dtype_of(Bfloat16) { return kBfloat16; }
// A unit in the last place of what is stored; of sums, with room for some hundred roundings.
inline double unit_of(float) { return 0x1p-21; }
inline double unit_of(double) { return 0x1p-44; }
inline double unit_of(Float16) { return 0x1p-10; }
inline double unit_of(Bfloat16) { return 0x1p-7; }

// A tensor [rows, heads, tokens, width] of the problem, and what is wanted in its place.
template <class T>
struct Numbers {
  int64_t heads, tokens, width;
  bool tokens_first;  // lies as [rows, tokens, heads, width], as a model's projections do
  std::vector<T> stored;
  std::vector<double> wanted;

  Numbers(int64_t rows, int64_t heads, int64_t tokens, int64_t width, bool tokens_first)
      : heads(heads), tokens(tokens), width(width), tokens_first(tokens_first),
        stored(size_t(rows * heads * tokens * width)), wanted(stored.size()) {}

  Tensor tensor() {
    const int64_t row = heads * tokens * width;
    return tokens_first ? Tensor{stored.data(), row, width, heads * width}
                        : Tensor{stored.data(), row, tokens * width, width};
  }
  size_t place(int64_t row, int64_t head, int64_t token) const {
    const int64_t line = tokens_first ? token * heads + head : head * tokens + token;
    return size_t((row * heads * tokens + line) * width);
  }
  void fill(Random& random) {
    for (T& number : stored) number = narrow<T>(SumOf<T>(2 * random.number()));
  }
  void fill(double with) {
    std::fill(stored.begin(), stored.end(), narrow<T>(SumOf<T>(with)));
    std::fill(wanted.begin(), wanted.end(), 0);
  }
  void poison(int64_t row, int64_t head, int64_t token) {
    std::fill_n(&stored[place(row, head, token)], width, narrow<T>(SumOf<T>(NAN)));
  }
  double read(int64_t row, int64_t head, int64_t token, int64_t i) const {
    return double(widen(stored[place(row, head, token) + size_t(i)]));
  }
  double& want(int64_t row, int64_t head, int64_t token, int64_t i) {
    return wanted[place(row, head, token) + size_t(i)];
  }
};

// Whether numbers are within a few units of the last place of the largest, none missing.
template <class T>
bool near(const std::vector<T>& got, const std::vector<double>& wanted, double unit) {
  double largest = 1, error = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double number = double(widen(got[i]));
    if (std::isinf(wanted[i]) && number == wanted[i]) continue;
    if (!std::isfinite(number)) return false;
    largest = std::max(largest, std::abs(wanted[i]));
    error = std::max(error, std::abs(number - wanted[i]));
  }
  return error <= 6 * unit * largest;
}

template <class T>
bool near(const Numbers<T>& numbers) {
  return near(numbers.stored, numbers.wanted, unit_of(T{}));
}

template <class T>
class Problem {
 public:
  using Sum = SumOf<T>;

  explicit Problem(const Sizes& sizes)
      : n(sizes), query(n.rows, n.heads, n.queries, n.head_dim, true),
        key(n.rows, n.key_heads, n.keys, n.head_dim, true),
        value(n.rows, n.key_heads, n.keys, n.value_dim, true),
        prefix_key(n.bank, n.key_heads, n.prefix_tokens, n.head_dim, false),
        prefix_value(n.bank, n.key_heads, n.prefix_tokens, n.value_dim, false),
        out(n.rows, n.heads, n.queries, n.value_dim, true), dout(out), dquery(query), dkey(key),
        dvalue(value), dprefix_key(prefix_key), dprefix_value(prefix_value),
        lse(size_t(n.rows * n.heads * n.queries), Sum(NAN)), lse_rest(lse.size()), dlse(lse),
        lse_wanted(lse.size()), bias(size_t(n.heads * n.prefix_tokens)), dbias(bias.size()),
        dbias_wanted(bias.size()), mask(size_t(n.rows * n.queries * n.keys)) {
    for (auto* numbers : {&query, &key, &value, &prefix_key, &prefix_value, &dout})
      numbers->fill(random_);
    for (auto* numbers : {&out, &dquery, &dkey, &dvalue}) numbers->fill(NAN);
    for (auto* numbers : {&dprefix_key, &dprefix_value}) numbers->fill(0);  // of unused entries too
    for (Sum& number : dlse) number = Sum(random_.number());
    for (float& number : bias) number = float(random_.number());
    for (uint8_t& seen : mask) seen = random_.whole(0, 3) > 0;
    for (int64_t head = 0; head < n.heads; ++head) {
      sinks.push_back(random_.number());
      slopes.push_back(0.25 / double(head + 1));
    }
    for (int64_t row = 0; row < n.rows; ++row) {
      index.push_back(n.bank == 1 ? 0 : row % (n.bank + 1) - 1);
      starts.push_back(n.padded ? random_.whole(0, n.keys / 2) : 0);
      stops.push_back(n.padded ? random_.whole(n.keys / 2, n.keys) : n.keys);
    }
    for (int64_t entry = 0; entry < n.bank; ++entry)
      lengths.push_back(n.padded ? random_.whole(0, n.prefix_tokens) : n.prefix_tokens);
    poison();
    solve();
  }

  // The arguments of a forward or a backward.
  Arguments arguments(int64_t threads = 1, bool fixed_order = false) {
    Arguments a{};
    a.dtype = dtype_of(T{}), a.threads = threads, a.fixed_order = fixed_order;
    a.rows = n.rows, a.heads = n.heads, a.key_heads = n.key_heads, a.queries = n.queries;
    a.keys = n.keys, a.bank = n.bank, a.prefix_tokens = n.prefix_tokens;
    a.head_dim = n.head_dim, a.value_dim = n.value_dim;
    a.is_causal = n.causal, a.window = n.window, a.windowed_prefix = n.positions;
    a.scale = kScale, a.softcap = n.softcap;
    a.prefix_index = index.data(), a.prefix_lengths = lengths.data();
    a.key_start = starts.data(), a.key_length = stops.data();
    if (n.sinks) a.sinks = sinks.data();
    if (n.alibi) a.alibi_slopes = slopes.data();
    a.query = query.tensor(), a.key = key.tensor(), a.value = value.tensor();
    a.prefix_key = prefix_key.tensor(), a.prefix_value = prefix_value.tensor();
    a.out = out.tensor(), a.lse = lse.data(), a.lse_rest = lse_rest.data();
    if (n.masked) a.attn_mask = {mask.data(), kBool, n.queries * n.keys, 0, n.keys, 1};
    if (n.biased) a.prefix_bias = {bias.data(), kFloat32, 0, n.prefix_tokens, 0, 1};
    a.dout = dout.tensor(), a.dlse = dlse.data();
    a.dquery = dquery.tensor(), a.dkey = dkey.tensor(), a.dvalue = dvalue.tensor();
    a.dprefix_key = dprefix_key.tensor(), a.dprefix_value = dprefix_value.tensor();
    if (n.biased) a.dprefix_bias = {dbias.data(), 0, 0, n.prefix_tokens, 0, 1};
    return a;
  }

  bool forward_is_right() const {
    return near(out) && near(lse, lse_wanted, std::max(unit_of(Sum{}), unit_of(T{}) / 8));
  }
  bool backward_is_right() const {
    for (const auto* numbers : {&dquery, &dkey, &dvalue, &dprefix_key, &dprefix_value})
      if (!near(*numbers)) return false;
    return near(dbias, dbias_wanted, unit_of(T{}));
  }

  static constexpr double kScale = 0.3;
  const Sizes n;
  Numbers<T> query, key, value, prefix_key, prefix_value;
  Numbers<T> out, dout, dquery, dkey, dvalue, dprefix_key, dprefix_value;
  std::vector<Sum> lse, lse_rest, dlse;
  std::vector<double> lse_wanted;
  std::vector<float> bias;  // [heads, prefix tokens]
  std::vector<Sum> dbias;
  std::vector<double> dbias_wanted;
  std::vector<uint8_t> mask;  // [rows, queries, keys]
  std::vector<double> sinks, slopes;
  std::vector<int64_t> index, lengths, starts, stops;

 private:
  // NaN wherever nobody may read.
  void poison() {
    for (int64_t head = 0; head < n.key_heads; ++head) {
      for (int64_t row = 0; row < n.rows; ++row)
        for (int64_t slot = 0; slot < n.keys; ++slot)
          if (slot < starts[size_t(row)] || slot >= stops[size_t(row)])
            key.poison(row, head, slot), value.poison(row, head, slot);
      for (int64_t entry = 0; entry < n.bank; ++entry)
        for (int64_t slot = lengths[size_t(entry)]; slot < n.prefix_tokens; ++slot)
          prefix_key.poison(entry, head, slot), prefix_value.poison(entry, head, slot);
    }
  }

  // Where a column (prefix tokens, then keys) of a row lies: in which tensors, row and slot.
  struct Column {
    bool prefix;
    int64_t row, slot;
  };
  Column column(int64_t row, int64_t number) const {
    if (number < n.prefix_tokens) return {true, index[size_t(row)], number};
    return {false, row, number - n.prefix_tokens};
  }

  // Where a column stands in the text, as far as it stands anywhere.
  int64_t position(int64_t row, const Column& at) const {
    if (!at.prefix) return at.slot;
    return starts[size_t(row)] + at.slot - lengths[size_t(at.row)];
  }

  bool sees(int64_t row, int64_t query, const Column& at) const {
    const int64_t own = n.keys - n.queries + query;
    const auto in_window = [&] { return n.window < 0 || position(row, at) > own - n.window; };
    if (at.prefix)
      return at.row >= 0 && at.slot < lengths[size_t(at.row)] && (!n.positions || in_window());
    const bool masked = n.masked && !mask[size_t((row * n.queries + query) * n.keys + at.slot)];
    return at.slot >= starts[size_t(row)] && at.slot < stops[size_t(row)] && !masked &&
           (!n.causal || at.slot <= own) && in_window();
  }

  static double dot(const Numbers<T>& a, int64_t row, int64_t head, int64_t token,
                    const Numbers<T>& b, int64_t other_row, int64_t other_head, int64_t slot) {
    double sum = 0;
    for (int64_t i = 0; i < a.width; ++i)
      sum += a.read(row, head, token, i) * b.read(other_row, other_head, slot, i);
    return sum;
  }

  // A column's score for one query, and its derivative by the scaled product.
  std::pair<double, double> score(int64_t row, int64_t head, int64_t query_,
                                  const Column& at) const {
    double score = kScale * dot(query, row, head, query_, at.prefix ? prefix_key : key, at.row,
                                head / (n.heads / n.key_heads), at.slot);
    double slope = 1;
    if (n.softcap > 0) {
      const double bent = std::tanh(score / n.softcap);
      score = bent * n.softcap, slope = 1 - bent * bent;
    }
    if (n.alibi && (!at.prefix || n.positions))
      score -=
          slopes[size_t(head)] * double(std::abs(n.keys - n.queries + query_ - position(row, at)));
    if (n.biased && at.prefix) score += double(bias[size_t(head * n.prefix_tokens + at.slot)]);
    return {score, slope};
  }

  void solve() {
    for (int64_t row = 0; row < n.rows; ++row)
      for (int64_t head = 0; head < n.heads; ++head)
        for (int64_t query = 0; query < n.queries; ++query) solve(row, head, query);
  }

  void solve(int64_t row, int64_t head, int64_t token) {
    const int64_t columns = n.prefix_tokens + n.keys, key_head = head / (n.heads / n.key_heads);
    const size_t place = size_t((row * n.heads + head) * n.queries + token);
    std::vector<std::pair<double, double>> scores;
    std::vector<Column> seen;
    double total = n.sinks ? std::exp(sinks[size_t(head)]) : 0;
    for (int64_t number = 0; number < columns; ++number) {
      const Column at = column(row, number);
      if (!sees(row, token, at)) continue;
      seen.push_back(at);
      scores.push_back(score(row, head, token, at));
      total += std::exp(scores.back().first);
    }
    lse_wanted[place] = std::log(total);
    double delta = -double(dlse[place]);
    for (size_t j = 0; j < seen.size(); ++j)
      for (int64_t i = 0; i < n.value_dim; ++i) {
        const double value_at =
            (seen[j].prefix ? prefix_value : value).read(seen[j].row, key_head, seen[j].slot, i);
        const double share = std::exp(scores[j].first) / total * value_at;
        out.want(row, head, token, i) += share;
        delta += share * dout.read(row, head, token, i);
      }
    for (size_t j = 0; j < seen.size(); ++j)
      give_back(row, head, token, seen[j], std::exp(scores[j].first) / total, scores[j].second,
                delta);
  }

  // Adds one weight's share to the wanted gradients.
  void give_back(int64_t row, int64_t head, int64_t token, const Column& at, double weight,
                 double slope, double delta) {
    const int64_t key_head = head / (n.heads / n.key_heads);
    Numbers<T>&keys = at.prefix ? prefix_key : key, &dkeys = at.prefix ? dprefix_key : dkey;
    Numbers<T>& dvalues = at.prefix ? dprefix_value : dvalue;
    const double gradient = weight * (dot(dout, row, head, token, at.prefix ? prefix_value : value,
                                          at.row, key_head, at.slot) -
                                      delta);
    if (at.prefix)
      dbias_wanted[size_t(head * n.prefix_tokens + at.slot)] += n.biased ? gradient : 0;
    for (int64_t i = 0; i < n.head_dim; ++i) {
      const double of_product = kScale * slope * gradient;
      dquery.want(row, head, token, i) += of_product * keys.read(at.row, key_head, at.slot, i);
      dkeys.want(at.row, key_head, at.slot, i) += of_product * query.read(row, head, token, i);
    }
    for (int64_t i = 0; i < n.value_dim; ++i)
      dvalues.want(at.row, key_head, at.slot, i) += weight * dout.read(row, head, token, i);
  }

  Random random_{uint64_t(0)};
};

}  // namespace check
