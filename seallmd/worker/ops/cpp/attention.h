// Attention of a step's packed tokens over the K and V blocks of the arena, read where they lie.
//
// One work item is a few query tokens of one request with all query heads that share a KV head. Softmax is
// computed online over segments of keys (Milakov and Gimelshein 2018; FlashAttention). Segments begin at fixed
// positions, whatever blocks they lie in, so a token's result depends neither on the batch, nor on how a prompt
// was chunked, nor on blocks and their layout.
#pragma once

#include <cmath>
#include <vector>

#include "linear.h"
#include "types.h"

constexpr int SEGMENT = 64;     // keys
constexpr int ITEM_QUERIES = 24;  // query tokens times heads of one work item, if there is a choice

// Values, and those that will be in use after them, as many, if any.
template <class T> struct Values {
    const T *const *rows, *const *next;
    const T* operator[](int t) const { return rows[t]; }
    template <int N> void ask(int t, int at) const {
        if (next)
#pragma GCC unroll 8
            for (int i = 0; i < N; i += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(next[t] + at + i);
    }
};

// out[b] += sum over t of p[b][t] v[t], for NV vectors of the value dimension, from element `at` on.
template <class T, int B, int NV>
inline void mix_tile(const float* p, int keys, const Values<T>& v, int at, float* out, ptrdiff_t os) {
    V acc[B][NV];
    for (int b = 0; b < B; b++)
        for (int j = 0; j < NV; j++) acc[b][j] = load(out + b * os + j * W);
    for (int t = 0; t < keys; t++) {
        V value[NV];
        for (int j = 0; j < NV; j++) value[j] = load(v[t] + at + j * W);
        v.template ask<NV * W>(t, at);
        for (int b = 0; b < B; b++) {
            V weight = splat(p[b * SEGMENT + t]);
            for (int j = 0; j < NV; j++) acc[b][j] += weight * value[j];
        }
    }
    for (int b = 0; b < B; b++)
        for (int j = 0; j < NV; j++) store(out + b * os + j * W, acc[b][j]);
}

// The n elements at the end of a row that is no whole vector; `out` is padded.
template <class T>
inline void mix_tail(const float* p, int m, int keys, const Values<T>& v, int at, int n, float* out, ptrdiff_t os) {
    for (int b = 0; b < m; b++) {
        V acc = load(out + b * os);
        for (int t = 0; t < keys; t++) acc += splat(p[b * SEGMENT + t]) * load_part(v[t] + at, n);
        store(out + b * os, acc);
    }
}

template <class T, int B>
inline void mix_rows(const float* p, int keys, const Values<T>& v, int dim, float* out, ptrdiff_t os) {
    int j = 0;
    for (; j + 4 * W <= dim; j += 4 * W) mix_tile<T, B, 4>(p, keys, v, j, out + j, os);
    for (; j + W <= dim; j += W) mix_tile<T, B, 1>(p, keys, v, j, out + j, os);
    if (j < dim) mix_tail(p, B, keys, v, j, dim - j, out + j, os);
}

template <class T>
inline void mix(const float* p, int m, int keys, Values<T> v, int dim, float* out, ptrdiff_t os) {
    constexpr int B = W == 16 ? 6 : 2;
    int b = 0;
    for (; b + B <= m; b += B, v.next = nullptr) mix_rows<T, B>(p + b * SEGMENT, keys, v, dim, out + b * os, os);
    p += b * SEGMENT;
    out += b * os;
    switch (m - b) {
        case 1: mix_rows<T, 1>(p, keys, v, dim, out, os); break;
#if defined(__AVX512F__)
        case 2: mix_rows<T, 2>(p, keys, v, dim, out, os); break;
        case 3: mix_rows<T, 3>(p, keys, v, dim, out, os); break;
        case 4: mix_rows<T, 4>(p, keys, v, dim, out, os); break;
        case 5: mix_rows<T, 5>(p, keys, v, dim, out, os); break;
#endif
    }
}

// Turn a row of scores into weights; returns their sum. Keys outside [from, to) weigh 0.
// most: the largest score so far, updated; shrink: what earlier sums have to be multiplied by.
inline float soften(float* s, int keys, int from, int to, float scale, float softcap, float& most, float& shrink) {
    for (int t = 0; t < keys; t += W) {
        V v = load(s + t) * scale;
        if (softcap > 0) v = softcap * (1.0f - 2.0f / (exp(v * (2.0f / softcap)) + 1.0f));
        store(s + t, v);
    }
    for (int t = 0; t < from; t++) s[t] = -INFINITY;
    for (int t = to; t < (keys + W - 1) / W * W; t++) s[t] = -INFINITY;
    V largest = splat(most);
    for (int t = 0; t < keys; t += W) largest = max(largest, load(s + t));
    float now = most;
    for (int i = 0; i < W; i++) now = std::max(now, largest[i]);
    shrink = std::exp(most - now);
    most = now;
    V total = {};
    for (int t = 0; t < keys; t += W) {
        V score = load(s + t), weight = exp(score - now);
        weight = score < -3e38f ? V{} : weight;
        store(s + t, weight);
        total += weight;
    }
    return sum(total);
}

// The element at which the block begins that holds a position's K and V.
inline int64_t block_of(const Cache& c, const int32_t* table, int position) {
    return table[position / c.page_tokens * c.page_blocks + c.block_of_page] * c.block_stride;
}

struct Item {
    int span, kv_head, first, tokens;  // query tokens, counted from the span's first
};

struct Scratch {
    std::vector<float> query, score, out, most, total;
};

// Where the K and V of a segment's keys lie.
template <class T> struct Segment {
    const T *keys[SEGMENT], *values[SEGMENT];

    // Keys [from, to) of those from `position` on; the last one stands for those that follow.
    void find(const Cache& c, const int32_t* table, int kv_head, int position, int from, int to) {
        const ptrdiff_t ks = static_cast<ptrdiff_t>(c.kv_heads) * c.k_dim;
        const ptrdiff_t vs = static_cast<ptrdiff_t>(c.kv_heads) * c.v_dim;
        for (int t = from; t < to;) {
            const int token = (position + t) % c.page_tokens, stop = std::min(to, t + c.page_tokens - token);
            const int64_t block = block_of(c, table, position + t);
            const T* k = static_cast<const T*>(c.key) + block + token * ks + kv_head * c.k_dim;
            const T* v = static_cast<const T*>(c.value) + block + token * vs + kv_head * c.v_dim;
            for (; t < stop; t++, k += ks, v += vs) keys[t] = k, values[t] = v;
        }
        std::fill(keys + to, keys + SEGMENT, keys[to - 1]);
        std::fill(values + to, values + SEGMENT, values[to - 1]);
    }
};

template <class T>
void attend_item(const Attention& a, const Step& step, const Item& item, const float* q, float* out, Scratch& at) {
    const Cache& c = a.cache;
    const Span& span = step.spans[item.span];
    const int32_t* table = step.tables + span.table;
    const int group = a.heads / c.kv_heads, m = item.tokens * group;
    const int start = span.context - span.tokens + item.first;  // position of the first query
    const int os = (c.v_dim + W - 1) / W * W;
    grow(at.query, m * c.k_dim);
    grow(at.score, m * SEGMENT);
    at.out.assign(m * os, 0.0f);
    at.most.assign(m, -INFINITY);
    at.total.assign(m, 0.0f);
    for (int t = 0; t < item.tokens; t++) {
        int64_t row = static_cast<int64_t>(span.first + item.first + t) * a.heads + item.kv_head * group;
        std::memcpy(&at.query[t * group * c.k_dim], q + row * c.k_dim, group * c.k_dim * sizeof(float));
    }
    const int end = start + item.tokens;
    const int first_key = a.window ? std::max(0, start - a.window + 1) : 0;
    Segment<T> segments[2];
    const auto find = [&](int position) {
        if (position < end)
            segments[position / SEGMENT % 2].find(c, table, item.kv_head, position, std::max(0, first_key - position),
                                                  std::min(SEGMENT, end - position));
    };
    find(first_key / SEGMENT * SEGMENT);
    for (int position = first_key / SEGMENT * SEGMENT; position < end; position += SEGMENT) {
        const int keys = std::min(SEGMENT, end - position), skipped = std::max(0, first_key - position);
        const Segment<T>& at_hand = segments[position / SEGMENT % 2];
        // What comes next is asked for key by key, so that memory is read while this is computed.
        const Segment<T>* next = position + SEGMENT < end ? &segments[(position / SEGMENT + 1) % 2] : nullptr;
        find(position + SEGMENT);
        dot_block(Scattered<T>{at_hand.keys + skipped, next ? next->keys + skipped : nullptr}, keys - skipped, at.query.data(), c.k_dim, m, c.k_dim,
                  at.score.data() + skipped, SEGMENT);
        for (int i = 0; i < m; i++) {
            const int own = start + i / group - position;  // its own key, seen from this segment
            const int from = a.window ? std::max(0, own - a.window + 1) : 0, to = std::min(keys, own + 1);
            float* s = &at.score[i * SEGMENT];
            if (to <= from) {
                std::fill(s, s + keys, 0.0f);
                continue;
            }
            float shrink;
            const float added = soften(s, keys, from, to, a.scale, a.softcap, at.most[i], shrink);
            at.total[i] = at.total[i] * shrink + added;
            if (shrink != 1.0f)
                for (int j = 0; j < os; j += W) store(&at.out[i * os + j], load(&at.out[i * os + j]) * shrink);
        }
        const Values<T> values = {at_hand.values + skipped, next ? next->values + skipped : nullptr};
        mix(at.score.data() + skipped, m, keys - skipped, values, c.v_dim, at.out.data(), os);
    }
    for (int i = 0; i < m; i++) {
        const int head = item.kv_head * group + i % group;
        float scale = 1.0f / at.total[i];
        if (a.sinks) {  // a logit without a value
            const float most = std::max(at.most[i], a.sinks[head]), shrink = std::exp(at.most[i] - most);
            scale = shrink / (at.total[i] * shrink + std::exp(a.sinks[head] - most));
        }
        const int64_t row = static_cast<int64_t>(span.first + item.first + i / group) * a.heads + head;
        for (int j = 0; j < c.v_dim; j++) out[row * c.v_dim + j] = at.out[i * os + j] * scale;
    }
}

// Store K and V [tokens][kv_heads][dim] where their positions belong.
template <class T> void write(const Cache& c, const Step& step, const float* key, const float* value) {
    const int64_t k = c.kv_heads * c.k_dim, v = c.kv_heads * c.v_dim;
    for (const Span* span = step.spans; span < step.spans + step.n_spans; span++)
        for (int t = 0; t < span->tokens; t++) {
            const int position = span->context - span->tokens + t;
            const int64_t block = block_of(c, step.tables + span->table, position), offset = position % c.page_tokens;
            const int64_t row = span->first + t;
            T* keys = static_cast<T*>(c.key) + block + offset * k;
            T* values = static_cast<T*>(c.value) + block + offset * v;
            for (int i = 0; i < k; i++) narrow(key[row * k + i], keys + i);
            for (int i = 0; i < v; i++) narrow(value[row * v + i], values + i);
        }
}

// q [tokens][heads][k_dim] -> out [tokens][heads][v_dim]; K and V of these tokens are written first.
template <class T>
void attend(const Attention& a, const Step& step, const float* q, const float* k, const float* v, float* out) {
    write<T>(a.cache, step, k, v);
    const int group = a.heads / a.cache.kv_heads, most = std::max(1, ITEM_QUERIES / group);
    std::vector<Item> items;
    for (int s = 0; s < step.n_spans; s++)
        for (int first = 0; first < step.spans[s].tokens; first += most)
            for (int head = 0; head < a.cache.kv_heads; head++)
                items.push_back({s, head, first, std::min(most, step.spans[s].tokens - first)});
    const int n = static_cast<int>(items.size());
    pool.run(n, [&](int i) {
        static thread_local Scratch scratch;
        attend_item<T>(a, step, items[n - 1 - i], q, out, scratch);  // the longest of a chunk first
    });
}
