// Products of activations with weights of 8 bits in blocks.
//
// 32 neighbours along k are a block of weights with one scale, as in llama.cpp's Q8_0; 16 are a group of activations,
// which are rounded to 8 bits too. Products of a group are summed in integers, which is exact, and groups are added up
// in their order: a row's result depends neither on its neighbours nor on how many rows there are, nor on the width of
// vectors. Groups as long as blocks, as llama.cpp has them, are a little faster and cost three times the perplexity.
//
// Weights lie in panels of 16 rows: the first four weights of a block of each of the 16 rows, then the next four. So
// one instruction multiplies four weights of each row by four activations, the 16 sums are 16 outputs, and nothing is
// ever added up across a vector. A weight is stored as itself + 128: the instruction wants one factor without a sign.
#pragma once

#include <bit>

#include "linear.h"

constexpr int BLOCK = 32;    // weights that share a scale
constexpr int GROUP = 16;    // activations that do
constexpr int PANEL = 16;    // rows of weights side by side
constexpr int OFFSET = 128;  // of a stored weight
constexpr int QUADS = GROUP / 4, GROUPS = BLOCK / GROUP, VECTORS = PANEL / W;  // of a group, a block, a panel

inline int blocks_of(int k) { return (k + BLOCK - 1) / BLOCK; }

typedef int8_t C __attribute__((vector_size(W)));
typedef int8_t CU __attribute__((vector_size(W), aligned(1), may_alias));

// Four activations as the products below take them, and the products: W rows of four stored weights each are
// multiplied by them and added to W sums.
#if defined(__AVX512VNNI__)
using Quad = int32_t;  // 8 bits each
inline S add_products(S sums, S stored, Quad x) {
    return (S)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)stored, _mm512_set1_epi32(x));
}
#elif defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))
using Quad = int64_t;  // as 16 bits each: even ones, odd ones
inline S pairs(S a, int32_t b) {
#if defined(__AVX512BW__)
    return (S)_mm512_madd_epi16((__m512i)a, _mm512_set1_epi32(b));
#else
    return (S)_mm256_madd_epi16((__m256i)a, _mm256_set1_epi32(b));
#endif
}
inline S add_products(S sums, S stored, Quad x) {
    const I odd = (I)stored >> 8 & 0x00ff00ff;
    return sums + pairs(stored & 0x00ff00ff, static_cast<int32_t>(x)) + pairs((S)odd, static_cast<int32_t>(x >> 32));
}
#else
using Quad = int32_t;
inline S add_products(S sums, S stored, Quad x) {
    for (int i = 0; i < 4; i++) sums += (S)((I)stored >> (8 * i) & 255) * static_cast<int8_t>(x >> (8 * i));
    return sums;
}
#endif
inline Quad quad(const int8_t* x) {
    const int16_t wide[] = {x[0], x[2], x[1], x[3]};
    Quad four;
    std::memcpy(&four, sizeof(four) == sizeof(wide) ? static_cast<const void*>(wide) : x, sizeof(four));
    return four;
}

#if defined(__AVX512F__)
inline int32_t greatest(S v) { return _mm512_reduce_max_epi32((__m512i)v); }
inline int32_t total(S v) { return _mm512_reduce_add_epi32((__m512i)v); }
#else
inline int32_t greatest(S v) {
    int32_t most = v[0];
    for (int i = 1; i < W; i++) most = std::max(most, v[i]);
    return most;
}
inline int32_t total(S v) {
    uint32_t all = 0;
    for (int i = 0; i < W; i++) all += static_cast<uint32_t>(v[i]);
    return static_cast<int32_t>(all);
}
#endif

// Rows of activations of 8 bits in groups. start: where a group's sum begins, so that the offset of the weights does
// not count.
struct Rounded {
    const Quad* quads;     // [rows][groups][QUADS]
    const float* scales;   // [rows][groups]
    const int32_t* start;  // [rows][groups]
    int groups;
    Rounded from(int row) const {
        const ptrdiff_t at = static_cast<ptrdiff_t>(row) * groups;
        return {quads + at * QUADS, scales + at, start + at, groups};
    }
};

// One group, of which n numbers are there and zeros behind them: to the nearest of 127 steps to either side of zero.
inline void round_group(const float* x, int n, Quad* quads, float* scale, int32_t* start) {
    V parts[GROUP / W];
    S most = {};  // as bits, by which NaN is larger than all numbers and is not lost
    for (int i = 0; i < GROUP / W; i++) {
        const int here = std::min(W, n - i * W);
        parts[i] = here == W ? load(x + i * W) : here > 0 ? load_part(x + i * W, here) : V{};
        const S bits = reinterpret_cast<S>(parts[i]) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    const float largest = std::bit_cast<float>(greatest(most));
    const V magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const float per_unit = largest > 1e-30f ? 127 / largest : 0;
    int8_t rounded[GROUP];
    S sum = {};
    for (int i = 0; i < GROUP / W; i++) {
        const S whole = __builtin_convertvector(parts[i] * per_unit + magic - magic, S);
        sum += whole;
        *reinterpret_cast<CU*>(rounded + i * W) = __builtin_convertvector(whole, C);
    }
    for (int i = 0; i < QUADS; i++) quads[i] = quad(rounded + 4 * i);
    *scale = largest / 127;
    *start = static_cast<int32_t>(-static_cast<uint32_t>(total(sum)) * OFFSET);
}

// x [m][k] in groups; valid until the next call of this thread.
inline Rounded round_groups(const float* x, int m, int k) {
    static thread_local std::vector<Quad> quads;
    static thread_local std::vector<float> scales;
    static thread_local std::vector<int32_t> start;
    const int groups = blocks_of(k) * GROUPS;
    const int64_t all = static_cast<int64_t>(m) * groups;
    Quad* q = grow(quads, all * QUADS);
    float* s = grow(scales, all);
    int32_t* t = grow(start, all);
    share(m, std::max<int64_t>(1, (16 << 10) / k), [&](int64_t row, int64_t end) {
        for (; row < end; row++)
            for (int i = 0; i < groups; i++) {
                const int64_t to = row * groups + i;
                round_group(x + row * k + i * GROUP, k - i * GROUP, q + to * QUADS, s + to, t + to);
            }
    });
    return {q, s, t, groups};
}

// Panels of weights: all of k for some of the rows.
struct Panels {
    const uint8_t* weights;  // [panels][blocks][BLOCK / 4][PANEL][4]
    const f16* scales;       // [panels][blocks][PANEL]
    int blocks;
    Panels from(int panel) const {
        const ptrdiff_t at = static_cast<ptrdiff_t>(panel) * blocks * PANEL;
        return {weights + at * BLOCK, scales + at, blocks};
    }
};

// The i-th vector of a panel's outputs, of which `columns` are to be stored.
inline void store_columns(float* out, int i, int columns, V v) {
    const int here = std::min(W, columns - i * W);
    if (here == W) store(out + i * W, v);
    else if (here > 0) store_part(out + i * W, v, here);
}

// out[b][r] for the rows of one panel and B rows of activations, with all sums in registers; `columns` of it are to be
// stored. What lies `ahead` bytes behind the weights is asked for, if that is not 0.
template <int B>
inline void block_tile(const Panels& w, const Rounded& x, float* out, ptrdiff_t os, int columns, ptrdiff_t ahead) {
    V acc[B][VECTORS] = {};
    for (int block = 0; block < w.blocks; block++) {
        const ptrdiff_t first = static_cast<ptrdiff_t>(block) * PANEL;
        V scales[VECTORS];
        for (int i = 0; i < VECTORS; i++) scales[i] = load(w.scales + first + i * W);
#pragma GCC unroll 8
        for (int g = 0; g < GROUPS; g++) {
            const int group = block * GROUPS + g;
            S sums[B][VECTORS];
#pragma GCC unroll 8
            for (int b = 0; b < B; b++)
                for (int i = 0; i < VECTORS; i++) sums[b][i] = S{} + x.start[b * x.groups + group];
#pragma GCC unroll 8
            for (int q = 0; q < QUADS; q++) {
                const uint8_t* from = w.weights + first * BLOCK + (g * QUADS + q) * 4 * PANEL;
                S stored[VECTORS];
                std::memcpy(stored, from, sizeof(stored));
                if (ahead) ask_for(from + ahead);
#pragma GCC unroll 8
                for (int b = 0; b < B; b++)
                    for (int i = 0; i < VECTORS; i++)
                        sums[b][i] = add_products(sums[b][i], stored[i], x.quads[(b * x.groups + group) * QUADS + q]);
            }
#pragma GCC unroll 8
            for (int b = 0; b < B; b++)
                for (int i = 0; i < VECTORS; i++)
                    acc[b][i] += __builtin_convertvector(sums[b][i], V) * (scales[i] * x.scales[b * x.groups + group]);
        }
    }
    for (int b = 0; b < B; b++)
        for (int i = 0; i < VECTORS; i++) store_columns(out + b * os, i, columns, acc[b][i]);
}

// The same for `columns` rows of neighbouring panels. The first tile asks for nothing: the processor reads ahead by
// itself, since weights lie in the order in which they are used, and asking too took up to a third longer. A later
// tile asks for its share, panels `asks_from` to `asks_to`, of those in use next, `next` bytes on.
template <int B>
inline void block_rows(const Panels& w, const Rounded& x, float* out, ptrdiff_t os, int columns, int asks_from,
                       int asks_to, ptrdiff_t next) {
    for (int p = 0; p * PANEL < columns; p++) {
        const bool asks = p >= asks_from && p < asks_to;
        block_tile<B>(w.from(p), x, out + p * PANEL, os, columns - p * PANEL, asks ? next : 0);
    }
}

// y[m][n] = x[m][k] W[n][k]^T of weights in blocks; the threads share the panels.
inline void block_matmul(const Rounded& x, int m, const Panels& w, int n, float* y) {
    const int panel_bytes = w.blocks * BLOCK * PANEL, panels = (n + PANEL - 1) / PANEL;
    const int most = std::max<int>(1, PANEL_BYTES / panel_bytes), least = std::max(1, LEAST_BYTES / panel_bytes);
    const int each = (panels + 4 * pool.threads() - 1) / (4 * pool.threads());
    const int size = pool.threads() == 1 ? most : std::min(most, std::max(least, each));
    const int tiles = (m + QUERIES - 1) / QUERIES;
    pool.run((panels + size - 1) / size, [&](int chunk) {
        const int first = chunk * size, here = std::min(panels - first, size);
        const int columns = std::min(n - first * PANEL, size * PANEL);
        const ptrdiff_t next = static_cast<ptrdiff_t>(size) * panel_bytes * pool.threads();
        for (int t = 0; t < tiles; t++) {
            const int b = part_of(m, t, tiles), rows = part_of(m, t + 1, tiles) - b;
            const int asks_from = t ? part_of(here, t - 1, tiles - 1) : 0;
            const int asks_to = t ? part_of(here, t, tiles - 1) : 0;
            const auto pass = [&](auto count) {
                block_rows<count()>(w.from(first), x.from(b), y + static_cast<ptrdiff_t>(b) * n + first * PANEL, n,
                                    columns, asks_from, asks_to, next);
            };
            switch (rows) {
                case 1: pass(std::integral_constant<int, 1>{}); break;
                case 2: pass(std::integral_constant<int, 2>{}); break;
                case 3: pass(std::integral_constant<int, 3>{}); break;
#if defined(__AVX512F__)
                case 4: pass(std::integral_constant<int, 4>{}); break;
                case 5: pass(std::integral_constant<int, 5>{}); break;
                case 6: pass(std::integral_constant<int, 6>{}); break;
#endif
            }
        }
    });
}

// The same with activations as they are, for comparisons.
inline void exact_block_matmul(const float* x, int m, int k, const Panels& w, int n, float* y) {
    pool.run((n + PANEL - 1) / PANEL, [&](int panel) {
        const Panels own = w.from(panel);
        for (int row = 0; row < m; row++)
            for (int part = 0; part < VECTORS; part++) {
                V total = {};
                for (int block = 0; block < w.blocks; block++) {
                    const float* given = x + static_cast<ptrdiff_t>(row) * k + block * BLOCK;
                    const ptrdiff_t first = static_cast<ptrdiff_t>(block) * PANEL;
                    V sum = {};
                    for (int i = 0; i < std::min(BLOCK, k - block * BLOCK); i++) {
                        I stored;
                        const uint8_t* from = own.weights + first * BLOCK + i / 4 * 4 * PANEL + part * 4 * W;
                        std::memcpy(&stored, from, sizeof(stored));
                        const S number = (S)(stored >> (8 * (i % 4)) & 255) - OFFSET;
                        sum += __builtin_convertvector(number, V) * given[i];
                    }
                    total += sum * load(own.scales + first + part * W);
                }
                store_columns(y + static_cast<ptrdiff_t>(row) * n + panel * PANEL, part, n - panel * PANEL, total);
            }
    });
}
