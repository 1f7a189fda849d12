// Scores of queries and keys, before they are scaled.
#pragma once

#include <algorithm>

#include "mix.h"

// out[b][t] = q[b] . keys[t] for m queries of `dim` elements; the rows of `out` are SEGMENT apart, and what lies behind
// the last one is written too, less than a vector.
template <class T>
inline void score(const Scattered<T>& keys, int n, const float* q, int m, int dim, float* out) {
    dot_block(keys, n, q, dim, m, dim, out, SEGMENT);
}

#if PRODUCTS_OF_BF16
// 16 rows of 16 pairs become 16 pairs of 16 rows.
inline void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0x88);
            t[i + 4 + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
    }
}

// Pairs of elements of the keys, side by side: pairs[p][t]. Zeros stand for what is missing.
inline void turn(const Scattered<bf16>& keys, int n, int dim, int32_t (*pairs)[SEGMENT]) {
    for (int at = 0; at < dim; at += 2 * W) {
        const __mmask32 part = dim - at >= 2 * W ? ~0u : (1u << (dim - at)) - 1;
        for (int first = 0; first < n; first += W) {
            __m512i rows[16];
            for (int t = 0; t < 16; t++) {
                const bool there = first + t < n;
                rows[t] = there ? _mm512_maskz_loadu_epi16(part, keys[first + t] + at) : __m512i{};
                if (there && keys.next) ask_for(keys.next[first + t] + at);
            }
            transpose(rows);
            for (int p = 0; p < 16; p++) _mm512_storeu_si512(pairs[at / 2 + p] + first, rows[p]);
        }
    }
}

// For B queries and NV vectors of keys.
template <int B, int NV>
inline void score_tile(const int32_t (*pairs)[SEGMENT], int count, const bf16* q, int dim, float* out) {
    V acc[B][NV] = {};
    for (int p = 0; p < count; p++) {
        __m512i keys[NV];
        for (int j = 0; j < NV; j++) keys[j] = _mm512_loadu_si512(pairs[p] + j * W);
        for (int b = 0; b < B; b++) {
            int32_t both;
            std::memcpy(&both, q + b * dim + 2 * p, sizeof both);
            const __m512i query = _mm512_set1_epi32(both);
            for (int j = 0; j < NV; j++) acc[b][j] = Product<bf16, bf16>::add(acc[b][j], keys[j], query);
        }
    }
    for (int b = 0; b < B; b++)
        for (int j = 0; j < NV; j++) store(out + b * SEGMENT + j * W, acc[b][j]);
}

template <int B>
inline void score_rows(const int32_t (*pairs)[SEGMENT], int n, const bf16* q, int dim, float* out) {
    int t = 0;
    for (; t + 3 * W < n; t += 4 * W) score_tile<B, 4>(pairs, dim / 2, q, dim, out);
    for (; t < n; t += W)
        score_tile<B, 1>(reinterpret_cast<const int32_t(*)[SEGMENT]>(*pairs + t), dim / 2, q, dim, out + t);
}

// With all vectors of keys in one pass over the elements of a query: nothing has to be added up across a vector, which
// would cost more than the products of so few elements. dim is even.
inline void score(const Scattered<bf16>& keys, int n, const bf16* q, int m, int dim, float* out) {
    static thread_local std::vector<int32_t> room;
    auto pairs = reinterpret_cast<int32_t(*)[SEGMENT]>(grow(room, (dim + 2 * W - 1) / (2 * W) * W * SEGMENT));
    turn(keys, n, dim, pairs);
    int b = 0;
    for (; b + 6 <= m; b += 6) score_rows<6>(pairs, n, q + b * dim, dim, out + b * SEGMENT);
    q += b * dim;
    out += b * SEGMENT;
    switch (m - b) {
        case 1: score_rows<1>(pairs, n, q, dim, out); break;
        case 2: score_rows<2>(pairs, n, q, dim, out); break;
        case 3: score_rows<3>(pairs, n, q, dim, out); break;
        case 4: score_rows<4>(pairs, n, q, dim, out); break;
        case 5: score_rows<5>(pairs, n, q, dim, out); break;
    }
}
#endif
