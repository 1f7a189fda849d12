// Attention of a step's packed tokens over the K and V blocks of the arena, read where they lie.
//
// One work item is a few query tokens of one request with all query heads of a KV head, or of several: K and V of a
// token's heads lie side by side, and memory is fastest when it is asked for in order. Softmax is computed online
// over segments of keys (Milakov and Gimelshein 2018; FlashAttention). Segments begin at fixed positions, whatever
// blocks they lie in, so a token's result depends neither on the batch, nor on how a prompt was chunked, nor on blocks
// and their layout.
#pragma once

#include <cmath>
#include <type_traits>
#include <vector>

#include "score.h"
#include "types.h"

constexpr int SEGMENT_BYTES = 128 << 10;  // of an item, if there is a choice: two are in the second-level cache
constexpr int ITEM_QUERIES = 24;  // query tokens times heads of one work item, if there is a choice

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

// Query tokens, counted from the span's first, with the query heads of some KV heads.
struct Item {
    int span, kv_head, kv_heads, first, tokens;
};

struct Scratch {
    std::vector<float> query, score, out, most, total;
    std::vector<bf16> rounded_query, rounded_weight;
    std::vector<const void*> next_keys, next_values;
};

// Where the K and V of a segment's keys lie, of an item's first KV head. Of the keys from `position` on, [from, to).
template <class T> struct Segment {
    const T *keys[SEGMENT], *values[SEGMENT];
    int position = 0, from = 0, to = 0;

    // The segment that begins at `position`, of those that an item needs.
    void find(const Attention& a, const Step& step, const Item& item, int begins) {
        const Cache& c = a.cache;
        const Span& span = step.spans[item.span];
        const int32_t* table = step.tables + span.table;
        const int start = span.context - span.tokens + item.first;
        position = begins;
        // Even, so that keys are the same pairs for every query, wherever its item begins.
        from = a.window ? std::max(0, start - a.window + 1 - position) & ~1 : 0;
        to = std::min(SEGMENT, start + item.tokens - position);
        const ptrdiff_t ks = static_cast<ptrdiff_t>(c.kv_heads) * c.k_dim;
        const ptrdiff_t vs = static_cast<ptrdiff_t>(c.kv_heads) * c.v_dim;
        for (int t = from; t < to;) {
            const int token = (position + t) % c.page_tokens, stop = std::min(to, t + c.page_tokens - token);
            const int64_t block = block_of(c, table, position + t);
            const T* k = static_cast<const T*>(c.key) + block + token * ks + item.kv_head * c.k_dim;
            const T* v = static_cast<const T*>(c.value) + block + token * vs + item.kv_head * c.v_dim;
            for (; t < stop; t++, k += ks, v += vs) keys[t] = k, values[t] = v;
        }
    }

    // The first one.
    void begin(const Attention& a, const Step& step, const Item& item) {
        const Span& span = step.spans[item.span];
        const int start = span.context - span.tokens + item.first;
        find(a, step, item, a.window ? std::max(0, start - a.window + 1) / SEGMENT * SEGMENT : 0);
    }
};

// `heads` neighbouring pieces of `dim` elements of each of the rows [from, to), in the order in which they lie in
// memory: `n` of them, the last one standing for those that are missing.
template <class T>
const T* const* in_order(const T* const* rows, int from, int to, int heads, int dim, int n,
                         std::vector<const void*>& room) {
    auto pieces = reinterpret_cast<const T**>(grow(room, n));
    int p = 0;
    for (int t = from; t < to; t++)
        for (int h = 0; h < heads && p < n; h++) pieces[p++] = rows[t] + h * dim;
    std::fill(pieces + p, pieces + n, pieces[p - 1]);
    return pieces;
}

// The queries of an item: m for each KV head, one after the other, the sums of each in `stride` floats.
struct Queries {
    const Attention& a;
    const Item& item;
    int first_row, start, group, m, stride;  // start: the position of the first

    Queries(const Attention& a, const Step& step, const Item& item)
        : a(a), item(item), first_row(step.spans[item.span].first + item.first),
          start(step.spans[item.span].context - step.spans[item.span].tokens + item.first),
          group(a.heads / a.cache.kv_heads), m(item.tokens * group), stride((a.cache.v_dim + W - 1) / W * W) {}

    int count() const { return item.kv_heads * m; }

    int head(int n) const { return (item.kv_head + n / m) * group + n % group; }

    int64_t row(int n) const { return static_cast<int64_t>(first_row + n % m / group) * a.heads + head(n); }

    // Room for all, nothing summed.
    void begin(const float* q, Scratch& at) const {
        const int dim = a.cache.k_dim;
        grow(at.query, count() * dim);
        grow(at.score, m * SEGMENT + W);
        at.out.assign(count() * stride, 0.0f);
        at.most.assign(count(), -INFINITY);
        at.total.assign(count(), 0.0f);
        for (int n = 0; n < count(); n += group)
            std::memcpy(&at.query[n * dim], q + row(n) * dim, group * dim * sizeof(float));
    }

    // Scores of the m queries from the n-th on become weights, and their sums so far are scaled to these.
    template <class T> void weigh(const Segment<T>& keys, int n, Scratch& at) const {
        for (int i = 0; i < m; i++, n++) {
            const int own = start + i / group - keys.position;  // its own key, seen from this segment
            const int from = a.window ? std::max(0, own - a.window + 1) : 0, to = std::min(keys.to, own + 1);
            float* s = &at.score[i * SEGMENT];
            if (to <= from) {
                std::fill(s, s + SEGMENT, 0.0f);
                continue;
            }
            float shrink;
            const float added = soften(s, keys.to, from, to, a.scale, a.softcap, at.most[n], shrink);
            at.total[n] = at.total[n] * shrink + added;
            float* sums = &at.out[n * stride];
            if (shrink != 1.0f)
                for (int j = 0; j < stride; j += W) store(sums + j, load(sums + j) * shrink);
        }
    }

    void end(float* out, const Scratch& at) const {
        for (int n = 0; n < count(); n++) {
            float scale = 1.0f / at.total[n];
            if (a.sinks) {  // a logit without a value
                const float sink = a.sinks[head(n)], most = std::max(at.most[n], sink);
                const float shrink = std::exp(at.most[n] - most);
                scale = shrink / (at.total[n] * shrink + std::exp(sink - most));
            }
            float* sums = out + row(n) * a.cache.v_dim;
            for (int j = 0; j < a.cache.v_dim; j++) sums[j] = at.out[n * stride + j] * scale;
        }
    }
};

// Numbers as they are multiplied: as they are, or rounded to bfloat16.
template <class X> const X* factors(const float* x, int64_t n, std::vector<bf16>& room) {
    if constexpr (std::is_same_v<X, float>) return x;
    else {
        bf16* rounded = grow(room, n);
        narrow(x, n, rounded);
        return rounded;
    }
}

// X: what queries and weights are rounded to. after: what is done next here, if anything: its first keys and values are
// asked for.
template <class T, class X>
void attend_item(const Attention& a, const Step& step, const Item& item, const Item* after, const float* q, float* out,
                 Scratch& at) {
    const int k_dim = a.cache.k_dim, v_dim = a.cache.v_dim;
    const Queries queries(a, step, item);
    queries.begin(q, at);
    const X* query = factors<X>(at.query.data(), queries.count() * k_dim, at.rounded_query);
    Segment<T> segments[2];
    segments[0].begin(a, step, item);
    bool last = false;
    for (int turn = 0; !last; turn ^= 1) {
        Segment<T>&here = segments[turn], &next = segments[turn ^ 1];
        const int from = here.from, keys = here.to - from, pieces = keys * item.kv_heads;
        last = here.position + SEGMENT >= queries.start + item.tokens;
        // What comes next is asked for piece by piece, so that memory is read while this is computed.
        const T *const *next_keys = nullptr, *const *next_values = nullptr;
        if (!last) next.find(a, step, item, here.position + SEGMENT);
        else if (after) next.begin(a, step, *after);
        if (!last || after) {
            const int heads = last ? after->kv_heads : item.kv_heads;
            next_keys = in_order(next.keys, next.from, next.to, heads, k_dim, pieces, at.next_keys);
            next_values = in_order(next.values, next.from, next.to, heads, v_dim, pieces, at.next_values);
        }
        for (int head = 0; head < item.kv_heads; head++) {
            const int first = head * queries.m;
            const ptrdiff_t asked = head * keys;
            const Scattered<T> rows = {here.keys + from, head * k_dim, next_keys ? next_keys + asked : nullptr};
            score(rows, keys, query + first * k_dim, queries.m, k_dim, &at.score[from]);
            queries.weigh(here, first, at);
            const Values<T> values = {here.values + from, head * v_dim, next_values ? next_values + asked : nullptr};
            const X* weights = factors<X>(at.score.data(), queries.m * SEGMENT, at.rounded_weight) + from;
            mix(weights, queries.m, keys, values, v_dim, &at.out[first * queries.stride], queries.stride);
        }
    }
    queries.end(out, at);
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

// q [tokens][heads][k_dim] -> out [tokens][heads][v_dim]; K and V of these tokens are written first. T: what the cache
// holds; X: what it is multiplied with.
template <class T, class X>
void attend(const Attention& a, const Step& step, const float* q, const float* k, const float* v, float* out) {
    write<T>(a.cache, step, k, v);
    const Cache& c = a.cache;
    const int group = a.heads / c.kv_heads, most = std::max(1, ITEM_QUERIES / group);
    const int segment = SEGMENT * (c.k_dim + c.v_dim) * static_cast<int>(sizeof(T));  // bytes of a KV head
    // A prompt's queries compute for as long as memory takes; those that decode wait for it.
    const int together = step.n_spans < pool.threads() ? 1 : std::max(1, SEGMENT_BYTES / segment);
    std::vector<Item> items;
    for (int s = 0; s < step.n_spans; s++) {
        const int tokens = step.spans[s].tokens, heads = tokens > most ? 1 : together;
        for (int first = 0; first < tokens; first += most)
            for (int head = 0; head < c.kv_heads; head += heads)
                items.push_back({s, head, std::min(heads, c.kv_heads - head), first, std::min(most, tokens - first)});
    }
    const int n = static_cast<int>(items.size());
    pool.run(n, [&](int i) {
        static thread_local Scratch scratch;
        const bool follows = pool.threads() == 1 && i + 1 < n;  // else another thread may take it
        // The longest of a chunk first.
        attend_item<T, X>(a, step, items[n - 1 - i], follows ? &items[n - 2 - i] : nullptr, q, out, scratch);
    });
}
