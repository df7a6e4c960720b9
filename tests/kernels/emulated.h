// Included before a kernel source, lets it be compiled for AVX512-VNNI, with EMULATE_BF16 for AVX512-BF16 and with
// EMULATE_AMX for AMX, and run on any CPU with AVX2: SIMDe has most of the AVX512 intrinsics, the rest and the tiles are here, in plain loops.
#pragma once
#define EMULATED
#define ALWAYS_INLINE  // nothing is in registers here, and code of its own for each use takes fifteen times as long to compile
#include <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

// One number after the other, of any two vectors with as many of them.
template <class To, class ToLane, class FromLane, class From, class F>
inline To each(From from, F f) {
    FromLane x[sizeof(From) / sizeof(FromLane)];
    ToLane y[sizeof(To) / sizeof(ToLane)];
    static_assert(sizeof(x) / sizeof(x[0]) == sizeof(y) / sizeof(y[0]));
    std::memcpy(x, &from, sizeof(x));
    for (size_t i = 0; i < sizeof(x) / sizeof(x[0]); i++) y[i] = f(x[i]);
    To to;
    std::memcpy(&to, y, sizeof(y));
    return to;
}

template <class F>
inline float fold(__m512 a, F f) {
    float x[16];
    std::memcpy(x, &a, sizeof(x));
    for (int i = 1; i < 16; i++) x[0] = f(x[0], x[i]);
    return x[0];
}

inline float bfloat(const uint8_t* from) {
    uint32_t bits = uint32_t(from[0]) << 16 | uint32_t(from[1]) << 24;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

#ifdef EMULATE_BF16
// To nearest, ties to even.
inline __m256i round_to_bf16(__m512 from) {
    return each<__m256i, uint16_t, uint32_t>(from, [](uint32_t x) { return uint16_t((x + 0x7fff + (x >> 16 & 1)) >> 16); });
}
// sums[n] += a[2n] b[2n] + a[2n + 1] b[2n + 1]
inline __m512 multiply_pairs(__m512 sums, __m512i a, __m512i b) {
    float y[16];
    uint8_t x[2][64];
    std::memcpy(y, &sums, 64), std::memcpy(x[0], &a, 64), std::memcpy(x[1], &b, 64);
    for (int n = 0; n < 16; n++)
        for (int half = 2; half >= 0; half -= 2) y[n] += bfloat(x[0] + 4 * n + half) * bfloat(x[1] + 4 * n + half);
    __m512 to;
    std::memcpy(&to, y, 64);
    return to;
}
#endif

#ifdef EMULATE_AMX
// Which a thread has once it configures them; touching them before, or after their release, ends the test.
struct Tiles {
    bool configured = false;
    uint8_t bytes[8][16][64];
};
inline Tiles& tiles() {
    static thread_local Tiles tiles;
    return tiles;
}
inline uint8_t (&tile(int i))[16][64] {
    if (!tiles().configured) __builtin_trap();
    return tiles().bytes[i];
}
inline void configure(const void* config) {
    const uint8_t* bytes = (const uint8_t*)config;
    if (bytes[0] != 1) __builtin_trap();
    for (int i = 0; i < 8; i++)
        if (bytes[16 + 2 * i] != 64 || bytes[17 + 2 * i] || bytes[48 + i] != 16) __builtin_trap();
    tiles().configured = true;
}
inline void load_tile(int i, const void* from, size_t stride) {
    for (int r = 0; r < 16; r++) std::memcpy(tile(i)[r], (const uint8_t*)from + r * stride, 64);
}
inline void store_tile(int i, void* to, size_t stride) {
    for (int r = 0; r < 16; r++) std::memcpy((uint8_t*)to + r * stride, tile(i)[r], 64);
}
// C[m][n] += sum_k A[m][2k] B[k][2n] + A[m][2k + 1] B[k][2n + 1]
inline void multiply_tiles(int c, int a, int b) {
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            float sum;
            std::memcpy(&sum, tile(c)[m] + 4 * n, 4);
            for (int k = 0; k < 16; k++)
                for (int half = 0; half < 4; half += 2)
                    sum += bfloat(tile(a)[m] + 4 * k + half) * bfloat(tile(b)[k] + 4 * n + half);
            std::memcpy(tile(c)[m] + 4 * n, &sum, 4);
        }
}
#endif
}  // namespace emulated

#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtepi32_epi8
#undef _mm512_cvtepi32_epi16
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtepu32_ps
#undef _mm512_cvtps_epi32
#undef _mm512_cvtph_ps
#undef _mm512_srai_epi32
#undef _mm512_reduce_add_ps
#undef _mm512_reduce_max_ps
#define _mm512_cvtepu16_epi32(a) emulated::each<__m512i, int32_t, uint16_t>(a, [](uint16_t x) { return x; })
#define _mm512_cvtepi8_epi32(a) emulated::each<__m512i, int32_t, int8_t>(a, [](int8_t x) { return x; })
#define _mm512_cvtepi32_epi8(a) emulated::each<__m128i, int8_t, int32_t>(a, [](int32_t x) { return int8_t(x); })
#define _mm512_cvtepi32_epi16(a) emulated::each<__m256i, int16_t, int32_t>(a, [](int32_t x) { return int16_t(x); })
#define _mm512_cvtepi32_ps(a) emulated::each<__m512, float, int32_t>(a, [](int32_t x) { return float(x); })
#define _mm512_cvtepu32_ps(a) emulated::each<__m512, float, uint32_t>(a, [](uint32_t x) { return float(x); })
#define _mm512_cvtps_epi32(a) emulated::each<__m512i, int32_t, float>(a, [](float x) { return int(std::nearbyint(x)); })
#define _mm512_cvtph_ps(a) emulated::each<__m512, float, uint16_t>(a, [](uint16_t x) { return _cvtsh_ss(x); })
#define _mm512_srai_epi32(a, by) emulated::each<__m512i, int32_t, int32_t>(a, [](int32_t x) { return x >> (by); })
#define _mm512_reduce_add_ps(a) emulated::fold(a, [](float x, float y) { return x + y; })
#define _mm512_reduce_max_ps(a) emulated::fold(a, [](float x, float y) { return std::max(x, y); })

#define __AVX512F__ 1
#define __AVX512VNNI__ 1

#ifdef EMULATE_BF16
#define __AVX512BF16__ 1
#undef _mm512_cvtneps_pbh
#undef _mm512_dpbf16_ps
#define __m512bh __m512i
#define _mm512_cvtneps_pbh(x) emulated::round_to_bf16(x)
#define _mm512_dpbf16_ps(sums, a, b) emulated::multiply_pairs(sums, a, b)
#endif

#ifdef EMULATE_AMX
#define __AMX_BF16__ 1
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) emulated::configure(config)
#define _tile_release() (emulated::tiles().configured = false)
#define _tile_zero(i) std::memset(emulated::tile(i), 0, 1024)
#define _tile_loadd(i, from, stride) emulated::load_tile(i, from, stride)
#define _tile_stored(i, to, stride) emulated::store_tile(i, to, stride)
#define _tile_dpbf16ps(c, a, b) emulated::multiply_tiles(c, a, b)
#endif
