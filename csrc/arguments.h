// What Python hands over: one call's tensors and numbers, in eight bytes each and in this order.
// `prefixattn/cpu.py` packs it; sizes and meaning are those of `prefixattn.prefix_attention`.
#pragma once

#include <cstdint>

namespace prefixattn {

// A tensor [rows, heads, tokens, width]; strides count numbers, the last one is 1.
struct Tensor {
  void* data;
  int64_t row, head, token;
};

// What is added to scores, broadcast to [rows, heads, queries, keys] by strides of 0; `kind` is a
// DType, or kBool for "may be seen".
struct Bias {
  void* data;
  int64_t kind, row, head, query, key;
};

enum DType : int64_t { kFloat32, kFloat64, kFloat16, kBfloat16, kBool };

struct Arguments {
  int64_t dtype, threads, fixed_order;
  int64_t rows, heads, key_heads, queries, keys, bank, prefix_tokens, head_dim, value_dim;
  int64_t is_causal, window, windowed_prefix, has_offset, offset;
  double scale, softcap, dropout;
  // int64: [rows] or [bank] or [rows + 1], null when absent
  const int64_t *prefix_index, *prefix_lengths, *key_start, *key_length, *bounds_q, *bounds_k,
      *offsets, *dropout_seed;
  const double *sinks, *alibi_slopes;  // [heads], null when absent
  Tensor query, key, value, prefix_key, prefix_value, out;
  void *lse, *lse_rest;  // [rows, heads, queries], float or double; a forward takes null for none
  Bias prefix_bias, attn_mask;
  // Backward only. A gradient that nobody asked for is null.
  Tensor dout, dquery, dkey, dvalue, dprefix_key, dprefix_value;
  const void* dlse;               // as lse, or null
  Bias dprefix_bias, dattn_mask;  // sums, as lse: float or double
};

}  // namespace prefixattn
