// Copies of much memory: weights that come in, KV that goes and comes back.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

constexpr int64_t LINE_BYTES = 64;

#if defined(__SSE2__)
inline void stream_line(char* to, const char* from) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX__)
    for (int i = 0; i < LINE_BYTES; i += 32)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
#else
    for (int i = 0; i < LINE_BYTES; i += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
#endif
}
#endif

// As memcpy, but written past the caches: what is larger than they are would only push out what steps use, and a
// line that is written whole need not be read first. Half as fast again as memcpy (docs/log.md).
inline void copy_through(char* to, const char* from, int64_t bytes) {
#if defined(__SSE2__)
    const int64_t head = std::min(bytes, -reinterpret_cast<intptr_t>(to) & (LINE_BYTES - 1));
    std::memcpy(to, from, head);
    int64_t at = head;
    for (; at + LINE_BYTES <= bytes; at += LINE_BYTES) {
        __builtin_prefetch(from + at + (1 << 10), 0, 3);
        stream_line(to + at, from + at);
    }
    _mm_sfence();  // or other threads might not see it
    std::memcpy(to + at, from + at, bytes - at);
#else
    std::memcpy(to, from, bytes);
#endif
}
