// The operations that the worker calls, and a whole decoder layer made of them.
//
// Activations are float32 and contiguous; weights and KV are what their dtype says. Nothing here allocates
// what it does not reuse, and nothing throws but for lack of memory.
#include "attention.h"
#include "blocks.h"
#include "copy.h"

namespace {

constexpr int64_t WORTH_SHARING = 16 << 10;  // elements; below, waking the other threads costs more

template <class F> auto with_dtype(int32_t dtype, F f) {
    if (dtype == FLOAT16) return f(f16{});
    if (dtype == BFLOAT16) return f(bf16{});
    return f(float{});
}

const float* widened(const void* p, int n, int32_t dtype, std::vector<float>& room) {
    if (dtype == FLOAT32) return static_cast<const float*>(p);
    grow(room, n);
    with_dtype(dtype, [&](auto kind) {
        const auto* from = static_cast<const decltype(kind)*>(p);
        int i = 0;
        for (; i + W <= n; i += W) store(&room[i], load(from + i));
        if (i < n) store_part(&room[i], load_part(from + i, n - i), n - i);
    });
    return room.data();
}

// Whether activations are rounded to the kind of numbers that they are multiplied with (see `seallmd_set_rounding`).
bool rounding = true;

// x W^T with x rounded to the bfloat16 of W: what GPUs do too.
void rounded_matmul(const Linear& l, const float* x, int m, float* y) {
    static thread_local std::vector<bf16> room;
    const int64_t all = static_cast<int64_t>(m) * l.k;
    bf16* rounded = grow(room, all);
    share(all, WORTH_SHARING,
          [&](int64_t i, int64_t end) { narrow(x + i, end - i, rounded + i); });
    matmul(rounded, l.k, m, static_cast<const bf16*>(l.weight), l.k, l.n, l.k, y, l.n);
}

// x W^T of weights in blocks, with x rounded to blocks of 8 bits.
void blocks_matmul(const Linear& l, const float* x, int m, float* y) {
    const Panels weights = {static_cast<const uint8_t*>(l.weight), static_cast<const f16*>(l.scales), blocks_of(l.k)};
    if (rounding) block_matmul(round_groups(x, m, l.k), m, weights, l.n, y);
    else exact_block_matmul(x, m, l.k, weights, l.n, y);
}

// y = x W^T + bias
void linear(const Linear& l, const float* x, int m, float* y) {
    if (l.dtype == INT8) blocks_matmul(l, x, m, y);
    else if (PRODUCTS_OF_BF16 && rounding && l.dtype == BFLOAT16) rounded_matmul(l, x, m, y);
    else with_dtype(l.dtype, [&](auto kind) {
        matmul(x, l.k, m, static_cast<const decltype(kind)*>(l.weight), l.k, l.n, l.k, y, l.n);
    });
    if (l.bias) {
        static thread_local std::vector<float> room;
        const float* bias = widened(l.bias, l.n, l.bias_dtype, room);
        for (int i = 0; i < m; i++)
            for (int j = 0; j < l.n; j++) y[static_cast<int64_t>(i) * l.n + j] += bias[j];
    }
}

// Rows of n.n elements: y = x / rms(x) * (offset + weight); y may be x.
void norm(const Norm& l, const float* x, int64_t rows, float* y) {
    static thread_local std::vector<float> room;
    const float* weight = widened(l.weight, l.n, l.dtype, room);
    const int n = l.n;
    share(rows, WORTH_SHARING / n, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const float* from = x + row * n;
            float* to = y + row * n;
            V squares = {};
            int i = 0;
            for (; i + W <= n; i += W) squares += load(from + i) * load(from + i);
            if (i < n) squares += load_part(from + i, n - i) * load_part(from + i, n - i);
            const float scale = 1.0f / std::sqrt(sum(squares) / n + l.eps);
            for (i = 0; i + W <= n; i += W) store(to + i, load(from + i) * scale * (load(weight + i) + l.offset));
            for (; i < n; i++) to[i] = from[i] * scale * (weight[i] + l.offset);
        }
    });
}

V activated(V x, int32_t kind) {
    // gelu's tanh form is x * sigmoid(2u), since (1 + tanh u) / 2 = sigmoid(2u)
    V u = kind == SILU ? x : 1.5957691216057308f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exp(-u));
}

// gate = activation(gate) * up
void gated(float* gate, const float* up, int64_t n, int32_t kind) {
    share(n, WORTH_SHARING, [&](int64_t i, int64_t end) {
        for (; i + W <= end; i += W) store(gate + i, activated(load(gate + i), kind) * load(up + i));
        const int rest = static_cast<int>(end - i);
        store_part(gate + i, activated(load_part(gate + i, rest), kind) * load_part(up + i, rest), rest);
    });
}

// Rotate the first `width` elements of each head in halves (x0, x1 -> x0 c - x1 s, x1 c + x0 s), in place.
// x [tokens][heads][dim], cos and sin [tokens][width].
void rotate(float* x, int tokens, int heads, int dim, const float* cos, const float* sin, int width) {
    const int half = width / 2;
    share(tokens, WORTH_SHARING / (heads * dim), [&](int64_t t, int64_t end) {
        for (; t < end; t++) {
            const float *c = cos + t * width, *s = sin + t * width;
            for (int h = 0; h < heads; h++) {
                float *low = x + (t * heads + h) * dim, *high = low + half;
                for (int i = 0; i < half; i++) {
                    const float a = low[i], b = high[i];
                    low[i] = a * c[i] - b * s[i];
                    high[i] = b * c[i + half] + a * s[i + half];
                }
            }
        }
    });
}

void add(const float* x, const float* y, float* out, int64_t n) {
    share(n, WORTH_SHARING, [&](int64_t i, int64_t end) {
        for (; i < end; i++) out[i] = x[i] + y[i];
    });
}

void attention(const Attention& a, const Step& step, const float* q, const float* k, const float* v, float* out) {
    with_dtype(a.cache.dtype, [&](auto kind) {
        using T = decltype(kind);
        if constexpr (PRODUCTS_OF_BF16 && std::is_same_v<T, bf16>)
            if (rounding && a.cache.k_dim % 2 == 0) return attend<T, bf16>(a, step, q, k, v, out);
        attend<T, float>(a, step, q, k, v, out);
    });
}

// x [tokens][hidden] -> out, which may be x. cos and sin [tokens][width].
void layer(const Layer& l, const Step& step, const float* cos, const float* sin, int width, const float* x,
           float* out) {
    const Attention& a = l.attention;
    const int m = step.tokens, hidden = l.q.k, inner = l.gate.n;
    const int64_t all = static_cast<int64_t>(m) * hidden;
    static thread_local std::vector<float> rooms[7];
    const auto room = [&](int i, int64_t columns) { return grow(rooms[i], m * columns); };
    float *h = room(0, hidden), *q = room(1, l.q.n), *k = room(2, l.k.n), *v = room(3, l.v.n);
    float *mixed = room(4, l.o.k), *gate = room(5, inner), *up = room(6, inner);

    norm(l.before_attention, x, m, h);
    linear(l.q, h, m, q);
    linear(l.k, h, m, k);
    linear(l.v, h, m, v);
    if (l.q_norm.weight) norm(l.q_norm, q, static_cast<int64_t>(m) * a.heads, q);
    if (l.k_norm.weight) norm(l.k_norm, k, static_cast<int64_t>(m) * a.cache.kv_heads, k);
    rotate(q, m, a.heads, a.cache.k_dim, cos, sin, width);
    rotate(k, m, a.cache.kv_heads, a.cache.k_dim, cos, sin, width);
    attention(a, step, q, k, v, mixed);
    linear(l.o, mixed, m, h);
    if (l.after_attention.weight) norm(l.after_attention, h, m, h);
    add(x, h, out, all);

    norm(l.before_mlp, out, m, h);
    linear(l.gate, h, m, gate);
    linear(l.up, h, m, up);
    gated(gate, up, static_cast<int64_t>(m) * inner, l.activation);
    linear(l.down, gate, m, h);
    if (l.after_mlp.weight) norm(l.after_mlp, h, m, h);
    add(out, h, out, all);
}

// The largest element of each row, the first of equals.
void argmax(const float* x, int64_t rows, int n, int64_t* out) {
    share(rows, 1, [&](int64_t row, int64_t end) {
        for (; row < end; row++) {
            const float* from = x + row * n;
            V most = splat(-INFINITY);
            int i = 0;
            for (; i + W <= n; i += W) most = max(most, load(from + i));
            float largest = -INFINITY;
            for (int j = 0; j < W; j++) largest = std::max(largest, most[j]);
            for (; i < n; i++) largest = std::max(largest, from[i]);
            for (i = 0; i < n - 1 && from[i] != largest; i++) {}
            out[row] = i;
        }
    });
}

}  // namespace

extern "C" {

// Of every structure, so that Python can tell whether it means the same.
void seallmd_sizes(int32_t* out) {
    const size_t sizes[] = {sizeof(Linear), sizeof(Norm), sizeof(Cache), sizeof(Attention), sizeof(Span), sizeof(Step),
                            sizeof(Layer)};
    for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++) out[i] = static_cast<int32_t>(sizes[i]);
}

// The caller's thread included. Calls come from one thread at a time.
void seallmd_set_threads(int32_t threads) { pool.set_threads(threads); }

int32_t seallmd_vector_floats() { return W; }

// Whether activations are rounded: for weights in blocks to groups of 8 bits, for weights, keys and values of bfloat16
// to that, where the processor multiplies it. Returns whether the latter is so.
int32_t seallmd_set_rounding(int32_t on) {
    rounding = on;
    return PRODUCTS_OF_BF16 && on;
}

void seallmd_linear(const Linear* l, const float* x, int32_t m, float* y) { linear(*l, x, m, y); }

void seallmd_norm(const Norm* l, const float* x, int64_t rows, float* y) { norm(*l, x, rows, y); }

void seallmd_gated(float* gate, const float* up, int64_t n, int32_t kind) { gated(gate, up, n, kind); }

void seallmd_rotate(float* x, int32_t tokens, int32_t heads, int32_t dim, const float* cos, const float* sin,
                    int32_t width) {
    rotate(x, tokens, heads, dim, cos, sin, width);
}

void seallmd_attention(const Attention* a, const Step* step, const float* q, const float* k, const float* v,
                       float* out) {
    attention(*a, *step, q, k, v, out);
}

void seallmd_argmax(const float* x, int64_t rows, int32_t n, int64_t* out) { argmax(x, rows, n, out); }

void seallmd_layer(const Layer* l, const Step* step, const float* cos, const float* sin, int32_t width,
                   const float* x, float* out) {
    layer(*l, *step, cos, sin, width, x, out);
}

void seallmd_copy(char* to, const char* from, int64_t bytes) { copy_through(to, from, bytes); }

// `n` layers one after the other, each with its own cos and sin.
void seallmd_layers(const Layer* layers, int32_t n, const Step* step, const float* const* cos,
                    const float* const* sin, int32_t width, const float* x, float* out) {
    for (int i = 0; i < n; i++) layer(layers[i], *step, cos[i], sin[i], width, i ? out : x, out);
}

}  // extern "C"
