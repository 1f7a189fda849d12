// Sums of values, weighted by a softmax.
#pragma once

#include <algorithm>

#include "linear.h"

constexpr int SEGMENT = 64;  // keys that are weighted together

// Values, as `Scattered` has its rows.
template <class T> struct Values {
    const T* const* rows;
    ptrdiff_t offset;
    const T* const* next;
    const T* operator[](int t) const { return rows[t] + offset; }
    template <int N> void ask(int t, int at) const {
        if (next)
#pragma GCC unroll 8
            for (int i = 0; i < N; i += 64 / static_cast<int>(sizeof(T)))
                ask_for(next[t] + at + i);
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

#if PRODUCTS_OF_BF16
// Which elements of two rows of 32 make the first 16 pairs, or the last.
inline const __m512i FIRST_PAIRS = [] {
    alignas(64) uint16_t at[32];
    for (int i = 0; i < 32; i++) at[i] = i / 2 + i % 2 * 32;
    return _mm512_load_si512(at);
}();
inline const __m512i LAST_PAIRS = _mm512_add_epi16(FIRST_PAIRS, _mm512_set1_epi16(16));

// As `mix_tile`, with weights of 16 bits and two keys at a time: twice the products in the same time. NV = 1: of the
// first n elements alone.
template <int B, int NV>
inline void mix_pairs(const bf16* p, int keys, const Values<bf16>& v, int at, int n, float* out, ptrdiff_t os) {
    const __mmask32 part = NV > 1 ? ~0u : (1u << n) - 1;
    V acc[B][NV];
    for (int b = 0; b < B; b++)
        for (int j = 0; j < NV; j++) acc[b][j] = load(out + b * os + j * W);
    for (int t = 0; t < keys; t += 2) {
        __m512i pairs[NV];
        for (int j = 0; j < NV; j += 2) {
            const __m512i one = _mm512_maskz_loadu_epi16(part, v[t] + at + j * W);
            const __m512i two = t + 1 < keys ? _mm512_maskz_loadu_epi16(part, v[t + 1] + at + j * W) : __m512i{};
            pairs[j] = _mm512_permutex2var_epi16(one, FIRST_PAIRS, two);
            if constexpr (NV > 1) pairs[j + 1] = _mm512_permutex2var_epi16(one, LAST_PAIRS, two);
        }
        v.template ask<NV * W>(t, at);
        if (t + 1 < keys) v.template ask<NV * W>(t + 1, at);
        for (int b = 0; b < B; b++) {
            int32_t both;
            std::memcpy(&both, p + b * SEGMENT + t, sizeof both);
            const __m512i weight = _mm512_set1_epi32(both);
            for (int j = 0; j < NV; j++) acc[b][j] = Product<bf16, bf16>::add(acc[b][j], pairs[j], weight);
        }
    }
    for (int b = 0; b < B; b++)
        for (int j = 0; j < NV; j++) store(out + b * os + j * W, acc[b][j]);
}

template <class T, int B>
inline void mix_rows(const bf16* p, int keys, const Values<T>& v, int dim, float* out, ptrdiff_t os) {
    int j = 0;
    for (; j + 4 * W <= dim; j += 4 * W) mix_pairs<B, 4>(p, keys, v, j, 0, out + j, os);
    for (; j + 2 * W <= dim; j += 2 * W) mix_pairs<B, 2>(p, keys, v, j, 0, out + j, os);
    for (; j < dim; j += W) mix_pairs<B, 1>(p, keys, v, j, std::min(W, dim - j), out + j, os);
}
#endif

// m rows of weights, of SEGMENT each: floats, or bfloat16 where `v` is.
template <class T, class P>
inline void mix(const P* p, int m, int keys, Values<T> v, int dim, float* out, ptrdiff_t os) {
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
