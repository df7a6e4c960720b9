// The products of quantized.h with AVX512-VNNI. vpdpbusd multiplies 64 unsigned by 64 signed bytes and adds the
// products, by fours, to 16 sums. The weights are the unsigned bytes, so that the activations can be an operand that is
// broadcast from memory; 8-bit weights become unsigned by adding 128, and their minimum is then -128 d.
#pragma once
#include "abi.h"
#include "simd.h"

// A block of 16 outputs: weight = scale * code + minimum, codes[j] has inputs 4j..4j+3 of each.
// RAISED: the upper four of 4-bit codes stay in the upper halves of their bytes, 16 times as large. To divide their sum
// costs an instruction a row, to shift them down four a block.
template <int KIND, bool RAISED>
struct Codes {
    __m512i codes[8];
    Vec scale, minimum;

    explicit Codes(const uint8_t* tile) {
        const uint8_t* scales = tile + (KIND == Q8_0 ? 512 : 256);
        scale = load((const f16*)scales);
        minimum = KIND == Q4_1 ? load((const f16*)(scales + 32)) : scale * set1(KIND == Q4_0 ? -8.0f : -128.0f);
        if (KIND == Q8_0) {
            for (int j = 0; j < 8; j++) codes[j] = _mm512_xor_si512(row(tile, j), _mm512_set1_epi8(-128));
            return;
        }
        for (int g = 0; g < 4; g++) {
            __m512i both = row(tile, g), upper = _mm512_and_si512(both, _mm512_set1_epi8(-16));
            codes[g] = _mm512_and_si512(both, _mm512_set1_epi8(15));
            codes[g + 4] = RAISED ? upper : _mm512_srli_epi16(upper, 4);
        }
    }

    // acc + the products with a row's activations of this block.
    ALWAYS_INLINE Vec add(Vec acc, const int8_t* x, float x_scale, float x_sum) const {
        __m512i lower = _mm512_setzero_si512(), upper = lower;
        unroll<4>([&](int j) ALWAYS_INLINE { lower = add_products(lower, codes[j], x + 4 * j); });
        unroll<4>([&](int j) ALWAYS_INLINE { upper = add_products(upper, codes[j + 4], x + 4 * j + 16); });
        if (KIND != Q8_0 && RAISED) upper = _mm512_srai_epi32(upper, 4);
        Vec total = _mm512_cvtepi32_ps(_mm512_add_epi32(lower, upper));
        return fma(minimum, set1(x_sum), fma(total * scale, set1(x_scale), acc));
    }

  private:
    static __m512i row(const uint8_t* tile, int j) { return _mm512_loadu_si512(tile + 64 * j); }
    // Sums of four products: those of 16 outputs with the same four activations.
    static __m512i add_products(__m512i sums, __m512i codes, const int8_t* x) {
#ifdef EMULATED  // by the tests
        int32_t four;
        std::memcpy(&four, x, 4);
        return _mm512_dpbusd_epi32(sums, codes, _mm512_set1_epi32(four));
#else  // for the intrinsic, compilers load the four with an instruction of its own: a third more of them
        asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(codes), "m"(*(const int8_t(*)[4])x));
        return sums;
#endif
    }
};

constexpr int RAISED_ROWS = 4;  // up to so many, a shift for each row is cheaper than one for each row of codes

// Sums stay in registers while the inputs go by, and what lies ahead of them is fetched.
template <int KIND, int M>
inline void few_rows(const uint8_t* tiles, int k, const Quantized& x, int row0, float* out) {
    Vec acc[M];
    unroll<M>([&](int m) ALWAYS_INLINE { acc[m] = set1(0); });
    const size_t first = x.place(row0, 0, k);
    const int8_t* codes = x.codes + first * BLOCK;
    const float *scales = x.scales + first, *sums = x.sums + first;
    for (int b = 0; b < k / BLOCK; b++, tiles += tile_bytes(KIND)) {
        fetch_ahead(tiles, tile_bytes(KIND));
        const Codes<KIND, M <= RAISED_ROWS> w(tiles);
        unroll<M>([&](int m) ALWAYS_INLINE { acc[m] = w.add(acc[m], codes + m * BLOCK, scales[m], sums[m]); });
        codes += ROW_GROUP * BLOCK, scales += ROW_GROUP, sums += ROW_GROUP;
    }
    unroll<M>([&](int m) ALWAYS_INLINE { store(out + m * WIDE, acc[m]); });
}

// row0: a multiple of ROW_GROUP.
template <int KIND>
inline void quantized_tile(const uint8_t* tiles, int k, const Quantized& x, int row0, int rows, float* out) {
    for (; rows >= ROW_GROUP; rows -= ROW_GROUP, row0 += ROW_GROUP, out += ROW_GROUP * WIDE)
        few_rows<KIND, ROW_GROUP>(tiles, k, x, row0, out);
    as_constant<ROW_GROUP - 1>(rows, [&](auto m) { few_rows<KIND, m>(tiles, k, x, row0, out); });
}
