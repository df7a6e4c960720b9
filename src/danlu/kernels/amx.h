// Products of many rows in bfloat16 with AMX: C (16, 16) += A (16, 32) B (32, 16) is one instruction on tile registers.
// A are rows of activations, rounded once for all the products they enter. B are 16 outputs, two inputs of each side by
// side, unpacked from however they are stored. Prompts are read so; answers are continued with 8-bit products, however
// many there are, so that no token depends on what else is in a step.
#pragma once
#include <optional>
#include <vector>

#include "abi.h"
#include "quantized.h"
#include "simd.h"

struct alignas(64) TileRow {  // 32 inputs of a row, or two inputs of 16 outputs
    uint32_t pairs[16];
};

inline int input_blocks(int k) { return (k + BLOCK - 1) / BLOCK; }

// Every tile register in full: 16 rows of 64 bytes. Each thread configures and releases its own.
struct TileRegisters {
    TileRegisters() {
        alignas(64) static constexpr struct {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config{};
        _tile_loadconfig(&config);
    }
    ~TileRegisters() { _tile_release(); }
};

// As bfloat16 in the upper halves of 32 bits: to nearest, ties away from zero.
inline __m512i rounded(Vec x) { return _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000)); }

// One row of activations into tiles of 16 rows by 32 inputs; `to` is the row's place in the first.
inline void round_row(const float* x, int k, TileRow* to) {
    for (; k > 0; k -= BLOCK, x += BLOCK, to += TILE) {
        float last[BLOCK] = {};
        const float* from = k < BLOCK ? (const float*)std::memcpy(last, x, k * sizeof(float)) : x;
        for (int i = 0; i < BLOCK; i += W)
            _mm256_store_si256((__m256i*)(to->pairs + i / 2),
                               _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(load(from + i)), 16)));
    }
}

inline void store_pairs(TileRow* to, Vec first, Vec second) {
    _mm512_store_si512(to, _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(rounded(first), 16), rounded(second)));
}

// 16 outputs of k inputs; what is missing in the last block of 32 is zero.
template <class T>
inline void unpack_floats(const T* tile, int k, TileRow* to) {
    for (int i = 0; i < input_blocks(k) * BLOCK; i += 2, to++)
        store_pairs(to, i < k ? load(tile + i * TILE) : set1(0), i + 1 < k ? load(tile + (i + 1) * TILE) : set1(0));
}

// Codes are masked where they stand within 32 bits; the power of two that leaves is divided out of the scale.
template <int KIND>
inline void unpack_codes(const uint8_t* tile, int k, TileRow* to) {
    constexpr int BITS = KIND == Q8_0 ? 8 : 4, PLACES = 32 / BITS;
    for (int b = 0; b < k / BLOCK; b++, tile += tile_bytes(KIND), to += TILE) {
        const uint8_t* scales = tile + (KIND == Q8_0 ? 512 : 256);
        const Vec scale = load((const f16*)scales);
        const Vec minimum =
            KIND == Q4_1 ? load((const f16*)(scales + 32)) : scale * set1(KIND == Q4_0 ? -8.0f : -128.0f);
        Vec scale_at[PLACES];
        for (int p = 0; p < PLACES; p++) scale_at[p] = scale * set1(1.0f / (1u << BITS * p));
        for (int g = 0; g < BITS; g++) {
            __m512i codes = _mm512_loadu_si512(tile + 64 * g);
            if (KIND == Q8_0) codes = _mm512_xor_si512(codes, _mm512_set1_epi8(-128));
            const auto weight = [&](int place) {
                __m512i code = _mm512_and_si512(codes, _mm512_set1_epi32(((1u << BITS) - 1) << BITS * place));
                return fma(_mm512_cvtepu32_ps(code), scale_at[place], minimum);
            };
            if (KIND == Q8_0) {
                for (int i = 0; i < 4; i += 2) store_pairs(to + 2 * g + i / 2, weight(i), weight(i + 1));
            } else {
                for (int i = 0; i < 4; i += 2) {
                    store_pairs(to + 2 * g + i / 2, weight(2 * i), weight(2 * i + 2));
                    store_pairs(to + 8 + 2 * g + i / 2, weight(2 * i + 1), weight(2 * i + 3));
                }
            }
        }
    }
}

// The tiles that a thread unpacked last: those of one item of work, which all rows come to in turn.
class UnpackedTiles {
  public:
    // At each step: other matrices may have come to lie where these lay.
    void forget() {
        for (Kept& kept : kept_) kept.tile = nullptr;
    }

    const TileRow* get(int kind, int k, const uint8_t* tile) {
        for (const Kept& kept : kept_)
            if (kept.tile == tile) return kept.rows.data();
        Kept& kept = kept_[next_++ % (2 * SPAN)];
        kept.tile = tile;
        kept.rows.resize(size_t(input_blocks(k)) * TILE);
        TileRow* rows = kept.rows.data();
        switch (kind) {
            case BF16: unpack_floats((const bf16*)tile, k, rows); break;
            case F16: unpack_floats((const f16*)tile, k, rows); break;
            case Q8_0: unpack_codes<Q8_0>(tile, k, rows); break;
            case Q4_0: unpack_codes<Q4_0>(tile, k, rows); break;
            default: unpack_codes<Q4_1>(tile, k, rows);
        }
        return rows;
    }

  private:
    struct Kept {
        const uint8_t* tile = nullptr;
        std::vector<TileRow> rows;
    };
    Kept kept_[2 * SPAN];  // gate and up are computed together
    unsigned next_ = 0;
};

// R by C tiles of results: each tile that is loaded enters C or R products.
template <int R, int C>
inline void tile_block(const TileRow* x0, const TileRow* x1, const TileRow* w0, const TileRow* w1, int n_blocks,
                       float* out) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int i = 0; i < n_blocks * TILE; i += TILE) {
        _tile_loadd(4, x0 + i, sizeof(TileRow));
        _tile_loadd(6, w0 + i, sizeof(TileRow));
        _tile_dpbf16ps(0, 4, 6);
        if (C > 1) {
            _tile_loadd(7, w1 + i, sizeof(TileRow));
            _tile_dpbf16ps(1, 4, 7);
        }
        if (R > 1) {
            _tile_loadd(5, x1 + i, sizeof(TileRow));
            _tile_dpbf16ps(2, 5, 6);
            if (C > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
    constexpr int STRIDE = WIDE * sizeof(float);
    _tile_stored(0, out, STRIDE);
    if (C > 1) _tile_stored(1, out + TILE, STRIDE);
    if (R > 1) _tile_stored(2, out + TILE * WIDE, STRIDE);
    if (R > 1 && C > 1) _tile_stored(3, out + TILE * WIDE + TILE, STRIDE);
}

// x: tiles of 16 rows, from the first of `rows`; w: the tiles of one or two times 16 outputs, the second may be null.
// Whole tiles of rows are written.
inline void tile_products(const TileRow* x, const TileRow* w0, const TileRow* w1, int k, int rows, float* out) {
    asm volatile("" ::: "memory");  // compilers may not know that tiles are read from memory
    const int n_blocks = input_blocks(k);
    const size_t stride = size_t(n_blocks) * TILE;
    for (int m = 0; m < rows; m += 2 * TILE, x += 2 * stride, out += 2 * TILE * WIDE) {
        const bool two = rows - m > TILE;
        if (two && w1) tile_block<2, 2>(x, x + stride, w0, w1, n_blocks, out);
        else if (two) tile_block<2, 1>(x, x + stride, w0, w0, n_blocks, out);
        else if (w1) tile_block<1, 2>(x, x, w0, w1, n_blocks, out);
        else tile_block<1, 1>(x, x, w0, w0, n_blocks, out);
    }
}
