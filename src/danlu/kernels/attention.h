// Attention over a paged cache, in fp32, with the softmax taken as the keys go by (Dao et al. 2022, arXiv:2205.14135).
#pragma once
#include <cmath>
#include <vector>

#include "abi.h"
#include "dense.h"

constexpr int KEYS = 128;  // keys whose scores are held at once

template <class T>
constexpr size_t cache_block_bytes(int head_dim) {
    return size_t(TILE) * head_dim * sizeof(T) + (sizeof(T) == 1 ? TILE * sizeof(float) : 0);
}

inline size_t cache_block_bytes(int kind, int head_dim) {
    return kind == KV_F32    ? cache_block_bytes<float>(head_dim)
           : kind == KV_BF16 ? cache_block_bytes<bf16>(head_dim)
                             : cache_block_bytes<int8_t>(head_dim);
}

inline void write_one(float* to, float x, float) { *to = x; }
inline void write_one(bf16* to, float x, float) { *to = to_bf16(x); }
inline void write_one(int8_t* to, float x, float inverse) { *to = int8_t(std::nearbyint(x * inverse)); }

// Stores one token's key or value of one head at its place in a block: step 16 for keys, 1 for values.
template <class T>
inline void write_cache(uint8_t* block, int place, const float* x, int head_dim, bool key) {
    T* to = (T*)block + (key ? place : place * head_dim);
    float inverse = 0;
    if (sizeof(T) == 1) {
        float most = 0;
        for (int i = 0; i < head_dim; i++) most = std::max(most, std::fabs(x[i]));
        float* scales = (float*)(block + size_t(TILE) * head_dim);
        scales[place] = most / 127;
        inverse = most > 0 ? 127 / most : 0;
    }
    for (int i = 0; i < head_dim; i++) write_one(to + i * (key ? TILE : 1), x[i], inverse);
}

// One key/value head of one sequence, as one layer sees it.
struct Heads {
    const uint8_t *keys, *values;  // of this layer and head; blocks are `stride` bytes apart
    size_t stride;
    const int32_t* table;
    int head_dim, window;
    float softcap;
};

inline void fetch(const uint8_t* from, size_t n_bytes) {
    for (size_t i = 0; i < n_bytes; i += 64) _mm_prefetch((const char*)from + i, _MM_HINT_T0);
}

// The first key that a query at this place sees, down to a whole block.
inline int first_key(const Heads& heads, int position) {
    return heads.window ? std::max(0, position - heads.window + 1) / TILE * TILE : 0;
}

struct AttentionScratch {
    std::vector<float> queries, scores, out, most, total;
    void fit(int rows, int head_dim) {
        if (int(most.size()) < rows) most.resize(rows), total.resize(rows), scores.resize(size_t(rows) * KEYS);
        if (queries.size() < size_t(rows) * head_dim) queries.resize(size_t(rows) * head_dim), out.resize(size_t(rows) * head_dim);
    }
};

// The queries, scaled and turned, are in scratch.queries, (rows, head_dim); positions[m] is the place of row m,
// ascending. Looks at the keys of chunks [begin, end) of KEYS each, from first_key() on, and leaves in scratch the sums
// `out`, (rows, head_dim), and `total` of each row, both divided by e^most.
template <class T>
inline void attend(const Heads& heads, const int* positions, int rows, int begin, int end, AttentionScratch& scratch) {
    const int dim = heads.head_dim;
    float *scores = scratch.scores.data(), *out = scratch.out.data();
    std::fill_n(out, size_t(rows) * dim, 0.0f);
    std::fill_n(scratch.most.data(), rows, -INFINITY);
    std::fill_n(scratch.total.data(), rows, 0.0f);
    constexpr int AHEAD = 3;  // blocks lie anywhere in memory: no hardware foresees the next one
    const size_t block_bytes = cache_block_bytes<T>(dim);
    const int first = first_key(heads, positions[0]), past = positions[rows - 1] + 1;
    for (int b = 0, at = first + begin * KEYS; b < AHEAD && at < past; b++, at += TILE)
        fetch(heads.keys + heads.table[at / TILE] * heads.stride, block_bytes);
    for (int start = first + begin * KEYS; start < std::min(past, first + end * KEYS); start += KEYS) {
        int n_keys = std::min(KEYS, past - start), n_blocks = (n_keys + TILE - 1) / TILE, n = n_blocks * TILE;
        for (int b = 0; b < n_blocks; b++) {
            const int32_t* at = heads.table + start / TILE + b;
            const uint8_t* block = heads.keys + *at * heads.stride;
            if (start + (b + AHEAD) * TILE < past) fetch(heads.keys + at[AHEAD] * heads.stride, block_bytes);
            fetch(heads.values + *at * heads.stride, block_bytes);
            by_16(scratch.queries.data(), dim, rows, (const T*)block, TILE, dim, scores + b * TILE, KEYS, false);
            if (sizeof(T) == 1) {
                const float* scales = (const float*)(block + size_t(TILE) * dim);
                for (int m = 0; m < rows; m++)
                    for (int v = 0; v < TILE; v += W) {
                        float* s = scores + m * KEYS + b * TILE + v;
                        store(s, load(s) * load(scales + v));
                    }
            }
        }
        for (int m = 0; m < rows; m++) {
            float* s = scores + m * KEYS;
            if (heads.softcap > 0)
                for (int i = 0; i < n; i += W)
                    store(s + i, set1(heads.softcap) * tanh(load(s + i) * set1(1 / heads.softcap)));
            int from = heads.window ? std::max(0, positions[m] - heads.window + 1 - start) : 0;
            int to = std::min(n, positions[m] + 1 - start);
            for (int i = 0; i < std::min(from, n); i++) s[i] = -INFINITY;
            for (int i = std::max(to, 0); i < n; i++) s[i] = -INFINITY;
            Vec greatest_v = load(s);
            for (int i = W; i < n; i += W) greatest_v = max(greatest_v, load(s + i));
            float most = std::max(scratch.most[m], greatest(greatest_v));
            if (most == -INFINITY) {  // nothing to see among these keys
                std::fill_n(s, n, 0.0f);
                continue;
            }
            float shrink = std::exp(scratch.most[m] - most);
            Vec total = set1(0);
            for (int i = 0; i < n; i += W) {
                Vec x = load(s + i);
                Vec e = exp(x - set1(most));
#ifdef __AVX512F__
                e = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, set1(-INFINITY), _CMP_NEQ_UQ), e);
#else
                e = _mm256_and_ps(_mm256_cmp_ps(x, set1(-INFINITY), _CMP_NEQ_UQ), e);
#endif
                total = total + e;
                store(s + i, e);
            }
            scratch.total[m] = scratch.total[m] * shrink + sum(total);
            scratch.most[m] = most;
            if (shrink != 1.0f)
                for (int i = 0; i < dim; i += W) store(out + m * dim + i, load(out + m * dim + i) * set1(shrink));
        }
        for (int b = 0; b < n_blocks; b++) {
            const uint8_t* block = heads.values + heads.table[start / TILE + b] * heads.stride;
            if (sizeof(T) == 1) {
                const float* scales = (const float*)(block + size_t(TILE) * dim);
                for (int m = 0; m < rows; m++)
                    for (int v = 0; v < TILE; v += W) {
                        float* s = scores + m * KEYS + b * TILE + v;
                        store(s, load(s) * load(scales + v));
                    }
            }
            int filled = std::min(TILE, n_keys - b * TILE);  // the rest of a block is whatever it held before
            for (int d = 0; d < dim; d += TILE)
                by_16(scores + b * TILE, KEYS, rows, (const T*)block + d, dim, filled, out + d, dim, true);
        }
    }
}
