// What Python hands over. Field for field the structures of `native.py`.
#pragma once

#include <cstdint>

enum Dtype : int32_t { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2, INT8 = 3 };
enum Activation : int32_t { SILU = 0, GELU_TANH = 1 };

// A weight matrix [n][k]: contiguous rows, or of INT8 the blocks of blocks.h with their scales. bias [n] or null.
struct Linear {
    const void* weight;
    const void* scales;
    const void* bias;
    int32_t n, k, dtype, bias_dtype;
};

// y = x / rms(x) * (offset + weight). weight null: there is no such norm.
struct Norm {
    const void* weight;
    int32_t n, dtype;
    float eps, offset;
};

// How one layer's K and V lie in the arena: [block][token][head][dim], strides in elements. A table is a list
// of pages of page_blocks blocks, which hold page_tokens tokens; block_of_page holds this layer.
struct Cache {
    void* key;
    void* value;
    int64_t block_stride;
    int32_t kv_heads, k_dim, v_dim, page_tokens, page_blocks, block_of_page, dtype, pad;
};

// One layer's attention. window 0: none. softcap 0: none. sinks [heads] or null.
struct Attention {
    Cache cache;
    const float* sinks;
    int32_t heads, window;
    float scale, softcap;
};

struct Span {
    int32_t first, tokens, context, table;  // table: where its blocks begin in Step.tables
};

// The packed tokens of one step.
struct Step {
    const Span* spans;
    const int32_t* tables;
    int32_t n_spans, tokens;
};

struct Layer {
    Norm before_attention, q_norm, k_norm, after_attention, before_mlp, after_mlp;
    Linear q, k, v, o, gate, up, down;
    Attention attention;
    int32_t activation, pad;
};
