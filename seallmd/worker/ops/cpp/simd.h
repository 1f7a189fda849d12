// Vectors of floats, and weights of three dtypes read as floats.
//
// GCC's vector extensions rather than intrinsics: one source for AVX-512, AVX2 and whatever else the compiler
// is told to build for (-march=native). Every sum below runs in an order that depends on the length alone.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int W = 16;  // floats in a vector
#else
constexpr int W = 8;
#endif
constexpr int QUERIES = W == 16 ? 6 : 3;  // rows of activations in one tile of registers, beside 4 of weights

typedef float V __attribute__((vector_size(W * 4)));
typedef float VU __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint32_t I __attribute__((vector_size(W * 4)));
typedef int32_t S __attribute__((vector_size(W * 4)));
typedef uint16_t HU __attribute__((vector_size(W * 2), aligned(2), may_alias));

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

inline V splat(float x) { return V{} + x; }
inline V load(const float* p) { return *reinterpret_cast<const VU*>(p); }
inline void store(float* p, V v) { *reinterpret_cast<VU*>(p) = v; }

inline V load(const bf16* p) {
#if defined(__AVX512F__)  // GCC would widen halves and put them together, three times the instructions
    I wide = reinterpret_cast<I>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
    I wide = reinterpret_cast<I>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    I wide = __builtin_convertvector(*reinterpret_cast<const HU*>(p), I);
#endif
    return reinterpret_cast<V>(wide << 16);
}

inline V load(const f16* p) {
#if defined(__AVX512F__)
    return reinterpret_cast<V>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
    return reinterpret_cast<V>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    V v;
    for (int i = 0; i < W; i++) {
        _Float16 h;
        std::memcpy(&h, p + i, 2);
        v[i] = static_cast<float>(h);
    }
    return v;
#endif
}

// The first n of a vector, zeros behind them; reads no further.
template <class T> inline V load_part(const T* p, int n) {
    T part[W] = {};
    std::memcpy(part, p, n * sizeof(T));
    return load(part);
}

inline void store_part(float* p, V v, int n) {
    float part[W];
    store(part, v);
    std::memcpy(p, part, n * sizeof(float));
}

inline void narrow(float x, float* p) { *p = x; }
inline void narrow(float x, bf16* p) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    p->bits = x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
inline void narrow(float x, f16* p) {
    _Float16 h = static_cast<_Float16>(x);
    std::memcpy(p, &h, 2);
}

inline float sum(V v) {
    float half[W];
    store(half, v);
    for (int n = W / 2; n; n /= 2)
        for (int i = 0; i < n; i++) half[i] += half[i + n];
    return half[0];
}

typedef float V4 __attribute__((vector_size(16)));

#if defined(__AVX512F__)
// Halves of a sum, of two vectors at once: in lanes of 8, 4 and 2 floats. A shuffle costs more than a blend.
inline V fold8(V a, V b) {
    V own = reinterpret_cast<V>(_mm512_mask_blend_ps(0xff00, a, b));
    return own + reinterpret_cast<V>(_mm512_shuffle_f32x4(a, b, 0x4e));
}
inline V fold4(V a, V b) {
    V own = reinterpret_cast<V>(_mm512_mask_blend_ps(0xf0f0, a, b)), rest = _mm512_mask_blend_ps(0xf0f0, b, a);
    return own + reinterpret_cast<V>(_mm512_shuffle_f32x4(rest, rest, 0xb1));
}
inline V fold2(V a, V b) {
    __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
    return reinterpret_cast<V>(_mm512_mask_blend_pd(0xaa, c, d)) + reinterpret_cast<V>(_mm512_shuffle_pd(c, d, 0x55));
}
inline V fold1(V a, V b) {
    return reinterpret_cast<V>(_mm512_shuffle_ps(a, b, 0x88)) + reinterpret_cast<V>(_mm512_shuffle_ps(a, b, 0xdd));
}

// The sums of four vectors, each in four neighbouring floats that are still to be added.
inline V quarter(V a, V b, V c, V d) { return fold4(fold8(a, c), fold8(b, d)); }

// The sums of four times four vectors, in the order in which `sum` adds: v[i][j] -> out[i * stride + j].
inline void store_sums(const V (*v)[4], float* out, ptrdiff_t stride) {
    V columns[4];
    for (int j = 0; j < 4; j++) columns[j] = quarter(v[0][j], v[1][j], v[2][j], v[3][j]);
    V sums = fold1(fold2(columns[0], columns[1]), fold2(columns[2], columns[3]));
    for (int i = 0; i < 4; i++) std::memcpy(out + i * stride, reinterpret_cast<const char*>(&sums) + 16 * i, 16);
}

inline V4 sum4(V a, V b, V c, V d) {
    V v = quarter(a, b, c, d);
    v = fold1(fold2(v, v), fold2(v, v));
    return reinterpret_cast<V4>(_mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, v)));
}
#else
inline V4 halve(V v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7); }

// The sums of four vectors, in the order in which `sum` adds.
inline V4 sum4(V a, V b, V c, V d) {
    V4 p = halve(a), q = halve(b), r = halve(c), s = halve(d);
    V4 pq = __builtin_shufflevector(p, q, 0, 1, 4, 5) + __builtin_shufflevector(p, q, 2, 3, 6, 7);
    V4 rs = __builtin_shufflevector(r, s, 0, 1, 4, 5) + __builtin_shufflevector(r, s, 2, 3, 6, 7);
    return __builtin_shufflevector(pq, rs, 0, 2, 4, 6) + __builtin_shufflevector(pq, rs, 1, 3, 5, 7);
}

inline void store_sums(const V (*v)[4], float* out, ptrdiff_t stride) {
    for (int i = 0; i < 4; i++) {
        V4 sums = sum4(v[i][0], v[i][1], v[i][2], v[i][3]);
        std::memcpy(out + i * stride, &sums, 16);
    }
}
#endif

inline V min(V a, V b) { return a < b ? a : b; }
inline V max(V a, V b) { return a > b ? a : b; }

// e^x within 2 units in the last place; arguments below -87 give the smallest normal number.
// Cephes' expf: x = n ln 2 + r, a polynomial in r, 2^n by the exponent's bits.
inline V exp(V x) {
    x = min(max(x, splat(-87.33f)), splat(88.37f));
    const V magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    V n = (x * 1.44269504088896341f + magic) - magic;
    V r = x - n * 0.693359375f + n * 2.12194440e-4f;
    V p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    S power = (__builtin_convertvector(n, S) + 127) << 23;
    return p * reinterpret_cast<V>(power);
}

// How T times X is summed in floats: STEP elements of each at a time.
template <class T, class X> struct Product {
    static constexpr int STEP = W;
    using Vector = V;
    template <class E> static V load(const E* p) { return ::load(p); }
    template <class E> static V load_part(const E* p, int n) { return ::load_part(p, n); }
    static V add(V sum, V a, V b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
#define PRODUCTS_OF_BF16 1
// Twice the products in the same time, exact and summed in floats: only the factors are 16 bits wide.
template <> struct Product<bf16, bf16> {
    static constexpr int STEP = 2 * W;
    using Vector = __m512i;
    static Vector load(const bf16* p) { return _mm512_loadu_si512(p); }
    static Vector load_part(const bf16* p, int n) { return _mm512_maskz_loadu_epi16((1ull << n) - 1, p); }
    static V add(V sum, Vector a, Vector b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};
#else
#define PRODUCTS_OF_BF16 0
#endif

// To nearest, ties to even.
inline void narrow(const float* x, int64_t n, bf16* out) {
    int64_t i = 0;
#if defined(__AVX512BF16__)
    for (; i + W <= n; i += W)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), (__m256i)_mm512_cvtneps_pbh(load(x + i)));
#endif
    for (; i < n; i++) narrow(x[i], out + i);
}
