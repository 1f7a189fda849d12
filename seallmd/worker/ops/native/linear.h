// Products of activations with rows of weights.
#pragma once

#include <algorithm>
#include <omp.h>

#include "simd.h"

// out[b][r] = w[r] . x[b] over k elements, for R rows of weights and B of activations held in registers.
// The order of additions depends on k alone, so a row's result depends neither on its neighbours nor on B.
template <class T, int R, int B>
inline void dot_tile(const T* w, ptrdiff_t ws, const float* x, ptrdiff_t xs, int k, float* out, ptrdiff_t os) {
    V acc[B][R] = {};
    int i = 0;
    for (; i + W <= k; i += W) {
        V rows[R];
        for (int r = 0; r < R; r++) rows[r] = load(w + r * ws + i);
        for (int r = 0; r < R; r++) __builtin_prefetch(w + (r + R) * ws + i);
        for (int b = 0; b < B; b++) {
            V row = load(x + b * xs + i);
            for (int r = 0; r < R; r++) acc[b][r] += rows[r] * row;
        }
    }
    if (i < k) {
        for (int b = 0; b < B; b++) {
            V row = load_part(x + b * xs + i, k - i);
            for (int r = 0; r < R; r++) acc[b][r] += load_part(w + r * ws + i, k - i) * row;
        }
    }
    for (int b = 0; b < B; b++) {
        if constexpr (R == 4) {
            V4 sums = sum4(acc[b][0], acc[b][1], acc[b][2], acc[b][3]);
            std::memcpy(out + b * os, &sums, 16);
        } else {
            for (int r = 0; r < R; r++) out[b * os + r] = sum(acc[b][r]);
        }
    }
}

// out[b][r] for `rows` rows of weights.
template <class T, int B>
inline void dot_rows(const T* w, ptrdiff_t ws, int rows, const float* x, ptrdiff_t xs, int k, float* out,
                     ptrdiff_t os) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) dot_tile<T, 4, B>(w + r * ws, ws, x, xs, k, out + r, os);
    for (; r < rows; r++) dot_tile<T, 1, B>(w + r * ws, ws, x, xs, k, out + r, os);
}

// The same for any number of activation rows, in tiles of nearly equal size.
template <class T>
inline void dot_block(const T* w, ptrdiff_t ws, int rows, const float* x, ptrdiff_t xs, int m, int k, float* out,
                      ptrdiff_t os) {
    int tiles = (m + QUERIES - 1) / QUERIES;
    for (int t = 0; t < tiles; t++) {
        int b = m * t / tiles, n = m * (t + 1) / tiles - b;
        const float* xb = x + b * xs;
        float* ob = out + b * os;
        switch (n) {
            case 1: dot_rows<T, 1>(w, ws, rows, xb, xs, k, ob, os); break;
            case 2: dot_rows<T, 2>(w, ws, rows, xb, xs, k, ob, os); break;
            case 3: dot_rows<T, 3>(w, ws, rows, xb, xs, k, ob, os); break;
#if defined(__AVX512F__)
            case 4: dot_rows<T, 4>(w, ws, rows, xb, xs, k, ob, os); break;
            case 5: dot_rows<T, 5>(w, ws, rows, xb, xs, k, ob, os); break;
            case 6: dot_rows<T, 6>(w, ws, rows, xb, xs, k, ob, os); break;
#endif
        }
    }
}

// A panel of weights stays in the second-level cache while all rows of activations pass over it.
constexpr ptrdiff_t PANEL_BYTES = 128 << 10;

// y[m][n] = x[m][k] W[n][k]^T; the threads share the rows of W.
template <class T>
inline void matmul(const float* x, ptrdiff_t xs, int m, const T* w, ptrdiff_t ws, int n, int k, float* y,
                   ptrdiff_t ys) {
    int units = (n + 3) / 4;
    int panel = std::max<int>(1, PANEL_BYTES / (4 * k * static_cast<int>(sizeof(T))));
#pragma omp parallel
    {
        int threads = omp_get_num_threads(), me = omp_get_thread_num();
        int end = static_cast<int64_t>(units) * (me + 1) / threads;
        for (int u = static_cast<int64_t>(units) * me / threads; u < end; u += panel) {
            int first = u * 4, rows = std::min(n, std::min(u + panel, end) * 4) - first;
            dot_block(w + first * ws, ws, rows, x, xs, m, k, y + first, ys);
        }
    }
}
