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
    Vec add(Vec acc, const int8_t* x, float x_scale, float x_sum) const {
        __m512i lower = _mm512_setzero_si512(), upper = lower;  // two sums: half the latency
        for (int j = 0; j < 4; j++) {
            lower = _mm512_dpbusd_epi32(lower, codes[j], four(x + 4 * j));
            upper = _mm512_dpbusd_epi32(upper, codes[j + 4], four(x + 4 * j + 16));
        }
        if (KIND != Q8_0 && RAISED) upper = _mm512_srai_epi32(upper, 4);
        Vec total = _mm512_cvtepi32_ps(_mm512_add_epi32(lower, upper));
        return fma(minimum, set1(x_sum), fma(total * scale, set1(x_scale), acc));
    }

  private:
    static __m512i row(const uint8_t* tile, int j) { return _mm512_loadu_si512(tile + 64 * j); }
    static __m512i four(const int8_t* x) {
        int32_t bytes;
        std::memcpy(&bytes, x, 4);
        return _mm512_set1_epi32(bytes);
    }
};

// Sums stay in registers while the inputs go by.
template <int KIND, int M>
inline void few_rows(const uint8_t* tiles, int k, const Quantized& x, int row0, float* out) {
    Vec acc[M];
    for (Vec& a : acc) a = set1(0);
    for (int b = 0; b < k / BLOCK; b++, tiles += tile_bytes(KIND)) {
        const Codes<KIND, true> w(tiles);
        size_t at = size_t(b) * x.rows + row0;
        for (int m = 0; m < M; m++, at++) acc[m] = w.add(acc[m], x.codes + at * BLOCK, x.scales[at], x.sums[at]);
    }
    for (int m = 0; m < M; m++) store(out + m * WIDE, acc[m]);
}

template <int KIND>
inline void quantized_tile(const uint8_t* tiles, int k, const Quantized& x, int row0, int rows, float* out) {
    switch (rows) {
        case 1: return few_rows<KIND, 1>(tiles, k, x, row0, out);
        case 2: return few_rows<KIND, 2>(tiles, k, x, row0, out);
        case 3: return few_rows<KIND, 3>(tiles, k, x, row0, out);
        case 4: return few_rows<KIND, 4>(tiles, k, x, row0, out);
    }
    for (int m = 0; m < rows; m++) store(out + m * WIDE, set1(0));
    for (int b = 0; b < k / BLOCK; b++, tiles += tile_bytes(KIND)) {
        const Codes<KIND, false> w(tiles);
        size_t at = size_t(b) * x.rows + row0;
        const int8_t* codes = x.codes + at * BLOCK;
        const float *scales = x.scales + at, *sums = x.sums + at;
        for (int m = 0; m < rows; m++, codes += BLOCK) {
            float* acc = out + m * WIDE;
            store(acc, w.add(load(acc), codes, scales[m], sums[m]));
        }
    }
}
