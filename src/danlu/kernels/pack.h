// Matrices from the row order of files into tiles of 16 rows: see quantized.h for the packed ones; floats lie by input,
// (k, 16). Rows beyond the last are zero.
#pragma once
#include <algorithm>
#include <cstring>

#include "abi.h"

struct BlockLayout {
    int bytes, codes, scale_bytes;  // of a block in the file; where its codes begin; what stands before them
};

inline BlockLayout block_layout(int kind) {
    if (kind == Q8_0) return {34, 2, 2};
    if (kind == Q4_0) return {18, 2, 2};
    return {20, 4, 4};
}

inline void pack_quantized(int kind, const uint8_t* rows, int n, int k, uint8_t* to) {
    const BlockLayout in = block_layout(kind);
    const int n_blocks = k / BLOCK, code_bytes = in.bytes - in.codes;
    for (int tile = 0; tile < n; tile += TILE)
        for (int b = 0; b < n_blocks; b++, to += TILE * in.bytes) {
            std::memset(to, 0, TILE * in.bytes);
            for (int c = 0; c < std::min(TILE, n - tile); c++) {
                const uint8_t* block = rows + (size_t(tile + c) * n_blocks + b) * in.bytes;
                for (int i = 0; i < code_bytes; i += 4) std::memcpy(to + i * TILE + c * 4, block + in.codes + i, 4);
                for (int s = 0; s < in.scale_bytes; s += 2)
                    std::memcpy(to + code_bytes * TILE + s * TILE + c * 2, block + s, 2);
            }
        }
}

template <class T>
inline void pack_dense(const T* rows, int n, int k, T* to) {
    for (int tile = 0; tile < n; tile += TILE)
        for (int i = 0; i < k; i++, to += TILE)
            for (int c = 0; c < TILE; c++) to[c] = tile + c < n ? rows[size_t(tile + c) * k + i] : T(0);
}
