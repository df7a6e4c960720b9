// Products of packed 8- and 4-bit weights with activations that are rounded to 8 bits, 32 at a time, as llama.cpp does:
//
//     sum_k w x = sum_blocks  d dx sum(q xq)  +  m dx sum(xq)
//
// The weights are exactly those of the file. A tile holds 16 outputs of one block of 32 inputs: four (4-bit) or eight
// (8-bit) rows of 64 bytes, 16 outputs x 4 inputs, then 16 scales d and, for Q4_1, 16 minima m in fp16. A 4-bit row holds
// inputs 4g..4g+3 in the low and 16+4g..16+4g+3 in the high halves of its bytes.
#pragma once
#include "abi.h"
#include "simd.h"

constexpr int ROW_GROUP = 16;  // rows whose blocks lie side by side: they are multiplied together

// Activations of some rows: codes (row / 8, block, row % 8, 32), then dx and dx * sum(xq) of each block in that order.
struct Quantized {
    int8_t* codes;
    float *scales, *sums;

    static size_t place(int row, int block, int k) {
        return (size_t(row / ROW_GROUP) * (k / BLOCK) + block) * ROW_GROUP + row % ROW_GROUP;
    }
};

// Rounds a row; where `rest` is given, what that leaves too, to 254 steps of each step: as much again as 8 bits keep.
inline void quantize_row(const float* x, int k, const Quantized& to, int row, const Quantized* rest = nullptr) {
    for (int b = 0; b < k / BLOCK; b++, x += BLOCK) {
        Vec most = abs(load(x));
        for (int i = W; i < BLOCK; i += W) most = max(most, abs(load(x + i)));
        const float scale = greatest(most) / 127, inverse = scale > 0 ? 1 / scale : 0;
        const size_t at = Quantized::place(row, b, k);
        Vec total = set1(0), rest_total = set1(0);
        for (int i = 0; i < BLOCK; i += W) {
            const Vec exact = load(x + i) * set1(inverse), q = round(exact);
            total = total + q;
            store(to.codes + at * BLOCK + i, q);
            if (!rest) continue;
            const Vec fine = round((exact - q) * set1(254));
            rest_total = rest_total + fine;
            store(rest->codes + at * BLOCK + i, fine);
        }
        to.scales[at] = scale;
        to.sums[at] = scale * sum(total);
        if (!rest) continue;
        rest->scales[at] = scale / 254;
        rest->sums[at] = scale / 254 * sum(rest_total);
    }
}

inline size_t tile_bytes(int kind) {
    switch (kind) {
        case Q8_0: return 512 + 32;
        case Q4_0: return 256 + 32;
        case Q4_1: return 256 + 64;
        case F32: return 4 * TILE * BLOCK;
        default: return 2 * TILE * BLOCK;
    }
}

// Tiles whose products are computed together, and the outputs in them.
#ifdef __AMX_BF16__
constexpr int SPAN = 2;
#else
constexpr int SPAN = 1;
#endif
constexpr int WIDE = SPAN * TILE;

// Weights are read once, faster than the hardware looks ahead: tiles follow each other across pages. Measured: 4 KiB with
// AVX2 (1, 2 and 8 are slower), 8 KiB with AVX-512 (1, 2 and 4 are).
inline void fetch_ahead(const uint8_t* tile, size_t n_bytes) {
    constexpr size_t AHEAD = W == 16 ? 8192 : 4096;
    for (size_t i = 0; i < n_bytes; i += 64) _mm_prefetch((const char*)tile + AHEAD + i, _MM_HINT_T0);
}

#ifdef __AVX512VNNI__
#include "quantized_avx512.h"
#else
// A block of eight outputs: w[j] has inputs 4j..4j+3 of each.
template <int KIND>
struct Half {
    __m256i w[8];
    Vec scale, minimum;

    Half(const uint8_t* tile, int half) {
        const uint8_t* scales = tile + (KIND == Q8_0 ? 512 : 256) + 16 * half;
        scale = load((const f16*)scales);
        if (KIND == Q4_1) minimum = load((const f16*)(scales + 32));
        if (KIND == Q4_0) minimum = scale * set1(-8.0f);
        if (KIND == Q8_0) {
            for (int j = 0; j < 8; j++) w[j] = _mm256_loadu_si256((const __m256i*)(tile + 64 * j + 32 * half));
            return;
        }
        const __m256i low = _mm256_set1_epi8(15);
        for (int g = 0; g < 4; g++) {
            __m256i both = _mm256_loadu_si256((const __m256i*)(tile + 64 * g + 32 * half));
            w[g] = _mm256_and_si256(both, low);
            w[g + 4] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
        }
    }

    // sum(q xq) of each output.
    Vec dot(const int8_t* x) const {
        const auto four = [x](int j) { return _mm256_broadcastd_epi32(_mm_loadu_si32(x + 4 * j)); };
        const __m256i ones = _mm256_set1_epi16(1);
        __m256i total;
        if (KIND == Q8_0) {  // both factors signed: |w| times x with the sign of w; two products may fill 16 bits
            total = _mm256_setzero_si256();
            for (int j = 0; j < 8; j++) {
                __m256i signed_x = _mm256_sign_epi8(four(j), w[j]);
                total = _mm256_add_epi32(
                    total, _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w[j]), signed_x), ones));
            }
        } else {  // 16 products of at most 15 * 127 still fit 16 bits
            __m256i pairs = _mm256_maddubs_epi16(w[0], four(0));
            for (int j = 1; j < 8; j++)
                pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w[j], four(j)));
            total = _mm256_madd_epi16(pairs, ones);
        }
        return _mm256_cvtepi32_ps(total);
    }
};

template <int KIND>
inline void quantized_tile(const uint8_t* tiles, int k, const Quantized& x, int row0, int rows, float* out) {
    if (rows == 1) {
        Vec acc[2] = {set1(0), set1(0)};
        for (int b = 0; b < k / BLOCK; b++, tiles += tile_bytes(KIND)) {
            fetch_ahead(tiles, tile_bytes(KIND));
            const size_t at = x.place(row0, b, k);
            Vec scale = set1(x.scales[at]), total = set1(x.sums[at]);
            for (int half = 0; half < 2; half++) {
                Half<KIND> w(tiles, half);
                acc[half] = fma(w.dot(x.codes + at * BLOCK) * w.scale, scale, acc[half]);  // in the order of many rows: same bits
                if (KIND != Q8_0) acc[half] = fma(w.minimum, total, acc[half]);
            }
        }
        store(out, acc[0]);
        store(out + W, acc[1]);
        return;
    }
    std::memset(out, 0, sizeof(float) * TILE * rows);
    for (int b = 0; b < k / BLOCK; b++, tiles += tile_bytes(KIND)) {
        fetch_ahead(tiles, tile_bytes(KIND));
        for (int half = 0; half < 2; half++) {
            Half<KIND> w(tiles, half);
            float* acc = out + half * W;
            for (int m = 0; m < rows; m++, acc += TILE) {
                const size_t at = x.place(row0 + m, b, k);
                Vec y = fma(w.dot(x.codes + at * BLOCK) * w.scale, set1(x.scales[at]), load(acc));
                if (KIND != Q8_0) y = fma(w.minimum, set1(x.sums[at]), y);
                store(acc, y);
            }
        }
    }
}
#endif
