// Products of activations with rows of weights.
#pragma once

#include <algorithm>

#include "pool.h"
#include "simd.h"

// How far ahead weights are asked for; rows follow each other in memory. Measured: 4 to 32 KiB differ little.
constexpr ptrdiff_t AHEAD_BYTES = 12 << 10;

// A tile of activations passes over rows of weights, and asks for what lies behind some of them.
struct Pass {
    int rows, asks_from, asks_to;
    bool first;
};

// Rows of a matrix in memory; what lies `ahead` bytes behind those in use is asked for. next: bytes to the
// rows that will be in use after these.
template <class T> struct Matrix {
    using Element = T;
    const T* first;
    ptrdiff_t stride, next, ahead = 0;
    const T* operator[](int r) const { return first + r * stride; }
    // Rows from r on. The first tile asks for what it is about to use itself; each later one for its share of
    // the next rows, so that memory is read while the processor computes.
    Matrix from(int r, const Pass& pass) const {
        const bool asks = r >= pass.asks_from && r < pass.asks_to;
        return {first + r * stride, stride, next, pass.first ? AHEAD_BYTES : asks ? next : 0};
    }
    // For B rows of activations. One or two wait for memory alone, and have it come into the first-level cache;
    // for more, which compute meanwhile, that is too early, and it is in the way there.
    template <int R, int STEP, int B> void ask(int i) const {
        constexpr int LOCALITY = B <= 2 ? 3 : 2;
#pragma GCC unroll 8
        for (size_t line = 0; line < R * STEP * sizeof(T); line += 64)  // in the order in which rows lie in memory
            __builtin_prefetch(reinterpret_cast<const char*>(first + i * R) + ahead + line, 0, LOCALITY);
    }
};

// Have a line come into the second-level cache. Measured for keys and values: asked for into the first, they come at
// half the rate.
inline void ask_for(const void* p) { __builtin_prefetch(p, 0, 2); }

// Rows that lie anywhere, each `offset` elements behind a pointer. next: what is asked for meanwhile, a piece as long
// as a row for each of them, if anything.
template <class T> struct Scattered {
    using Element = T;
    const T* const* rows;
    ptrdiff_t offset;
    const T* const* next = nullptr;
    const T* operator[](int r) const { return rows[r] + offset; }
    Scattered from(int r, const Pass& pass) const {
        return {rows + r, offset, pass.first && next ? next + r : nullptr};
    }
    template <int R, int STEP, int B> void ask(int i) const {
        if (next && i * sizeof(T) % 64 == 0)
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) ask_for(next[r] + i);
    }
};

// out[b][r] = w[r] . x[b] over k elements, for R rows of weights and B of activations held in registers.
// The order of additions depends on k alone, so a row's result depends neither on its neighbours nor on B.
template <int R, int B, class Rows, class X>
inline void dot_tile(const Rows& w, const X* x, ptrdiff_t xs, int k, float* out, ptrdiff_t os) {
    using P = Product<typename Rows::Element, X>;
    V acc[B][R] = {};
    int i = 0;
    for (; i + P::STEP <= k; i += P::STEP) {
        typename P::Vector rows[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) rows[r] = P::load(w[r] + i);
        w.template ask<R, P::STEP, B>(i);
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
            typename P::Vector row = P::load(x + b * xs + i);
#if defined(__AVX2__)
            asm("" : "+v"(row));  // once into a register: GCC would load it again for each product
#endif
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) acc[b][r] = P::add(acc[b][r], rows[r], row);
        }
    }
    if (i < k) {
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
            typename P::Vector row = P::load_part(x + b * xs + i, k - i);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) acc[b][r] = P::add(acc[b][r], P::load_part(w[r] + i, k - i), row);
        }
    }
    constexpr int FOURS = R == 4 ? B / 4 * 4 : 0;
    if constexpr (FOURS != 0) store_sums(acc, out, os);
#pragma GCC unroll 8
    for (int b = FOURS; b < B; b++) {
        if constexpr (R == 4) {
            V4 sums = sum4(acc[b][0], acc[b][1], acc[b][2], acc[b][3]);
            std::memcpy(out + b * os, &sums, 16);
        } else {
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) out[b * os + r] = sum(acc[b][r]);
        }
    }
}

// out[b][r] for the pass's rows of weights.
template <int B, class Rows, class X>
inline void dot_rows(const Rows& w, const Pass& pass, const X* x, ptrdiff_t xs, int k, float* out, ptrdiff_t os) {
    int r = 0;
    for (; r + 4 <= pass.rows; r += 4) dot_tile<4, B>(w.from(r, pass), x, xs, k, out + r, os);
    for (; r < pass.rows; r++) dot_tile<1, B>(w.from(r, pass), x, xs, k, out + r, os);
}

// Where the t-th of `tiles` parts of m begins; m * t may be more than an int holds.
inline int part_of(int m, int t, int tiles) { return static_cast<int>(static_cast<int64_t>(m) * t / tiles); }

// The same for any number of activation rows, in tiles of nearly equal size.
template <class Rows, class X>
inline void dot_block(const Rows& w, int rows, const X* x, ptrdiff_t xs, int m, int k, float* out, ptrdiff_t os) {
    int tiles = (m + QUERIES - 1) / QUERIES;
    for (int t = 0; t < tiles; t++) {
        int b = part_of(m, t, tiles), n = part_of(m, t + 1, tiles) - b;
        const int asks_from = t ? part_of(rows, t - 1, tiles - 1) : 0, asks_to = t ? part_of(rows, t, tiles - 1) : 0;
        const Pass pass = {rows, asks_from, asks_to, t == 0};
        const X* xb = x + b * xs;
        float* ob = out + b * os;
        switch (n) {
            case 1: dot_rows<1>(w, pass, xb, xs, k, ob, os); break;
            case 2: dot_rows<2>(w, pass, xb, xs, k, ob, os); break;
            case 3: dot_rows<3>(w, pass, xb, xs, k, ob, os); break;
#if defined(__AVX512F__)
            case 4: dot_rows<4>(w, pass, xb, xs, k, ob, os); break;
            case 5: dot_rows<5>(w, pass, xb, xs, k, ob, os); break;
            case 6: dot_rows<6>(w, pass, xb, xs, k, ob, os); break;
#endif
        }
    }
}

// A panel of weights stays in the second-level cache while all rows of activations pass over it.
constexpr ptrdiff_t PANEL_BYTES = 128 << 10;
constexpr int LEAST_BYTES = 32 << 10;  // less is not worth another thread's while

// y[m][n] = x[m][k] W[n][k]^T; the threads share the rows of W.
template <class T, class X>
inline void matmul(const X* x, ptrdiff_t xs, int m, const T* w, ptrdiff_t ws, int n, int k, float* y,
                   ptrdiff_t ys) {
    const int row_bytes = k * static_cast<int>(sizeof(T));
    const int panel = std::max<int>(1, PANEL_BYTES / (4 * row_bytes));  // in units of four rows
    const int units = (n + 3) / 4, each = (units + 4 * pool.threads() - 1) / (4 * pool.threads());
    const int least = std::max(1, LEAST_BYTES / (4 * row_bytes));
    const int size = pool.threads() == 1 ? panel : std::min(panel, std::max(least, each));
    pool.run((units + size - 1) / size, [&](int chunk) {
        const int first = chunk * size * 4, rows = std::min(n - first, size * 4);
        const ptrdiff_t next = static_cast<ptrdiff_t>(size) * 4 * row_bytes * pool.threads();
        dot_block(Matrix<T>{w + first * ws, ws, next}, rows, x, xs, m, k, y + first, ys);
    });
}
