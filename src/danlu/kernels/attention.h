// Attention over a paged cache, in fp32, with the softmax taken as the keys go by (Dao et al. 2022, arXiv:2205.14135).
#pragma once
#include <cmath>
#include <vector>

#include "abi.h"
#include "dense.h"

constexpr int KEYS = 128;  // keys whose scores are held at once

// How a block of the cache holds its values; keys lie by dimension, (head_dim, 16), values by token, (16, head_dim), and in
// bf16 two rows of either side by side. FACTOR: what they are multiplied with, queries and weights.
template <class T>
struct Stored {
    using Value = T;
    using Factor = float;
    static constexpr int DEPTH = 1;
};
template <>
struct Stored<bf16_pair> {
    using Value = bf16;
#ifdef __AVX512BF16__
    using Factor = bf16;
#else
    using Factor = float;
#endif
    static constexpr int DEPTH = 2;
};

template <class T>
constexpr size_t cache_block_bytes(int head_dim) {
    return size_t(TILE) * head_dim * sizeof(typename Stored<T>::Value) + (sizeof(T) == 1 ? TILE * sizeof(float) : 0);
}

inline size_t cache_block_bytes(int kind, int head_dim) {
    return kind == KV_F32    ? cache_block_bytes<float>(head_dim)
           : kind == KV_BF16 ? cache_block_bytes<bf16_pair>(head_dim)
                             : cache_block_bytes<int8_t>(head_dim);
}

inline void write_one(float* to, float x, float) { *to = x; }
inline void write_one(bf16* to, float x, float) { *to = to_bf16(x); }
inline void write_one(int8_t* to, float x, float inverse) { *to = int8_t(std::nearbyint(x * inverse)); }

// Stores one token's key or value of one head at its place in a block.
template <class T>
inline void write_cache(uint8_t* block, int place, const float* x, int head_dim, bool key) {
    constexpr int DEPTH = Stored<T>::DEPTH;
    auto* to = (typename Stored<T>::Value*)block;
    float inverse = 0;
    if (sizeof(T) == 1) {
        float most = 0;
        for (int i = 0; i < head_dim; i++) most = std::max(most, std::fabs(x[i]));
        float* scales = (float*)(block + size_t(TILE) * head_dim);
        scales[place] = most / 127;
        inverse = most > 0 ? 127 / most : 0;
    }
    for (int i = 0; i < head_dim; i++) {
        const int row = key ? i : place, column = key ? place : i, width = key ? TILE : head_dim;
        write_one(to + (row / DEPTH * width + column) * DEPTH + row % DEPTH, x[i], inverse);
    }
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

// Chunks of KEYS that a query at this place sees, as [first, last]. Chunks begin at multiples of KEYS, and are summed one
// by one and added up in order: the result does not depend on what shares a piece of work, or on how many there are.
inline int first_chunk(const Heads& heads, int position) {
    return heads.window ? std::max(0, position - heads.window + 1) / KEYS : 0;
}
inline int last_chunk(int position) { return position / KEYS; }

struct AttentionScratch {
    std::vector<float> queries, scores, out, most, total;  // of one chunk; queries and weights may be kept in bf16
    std::vector<float> all_out, all_most, all_total;       // of those so far

    void fit(int rows, int head_dim) {
        const size_t values = size_t(rows) * head_dim;
        for (auto* each : {&most, &total, &all_most, &all_total}) grow(*each, rows);
        for (auto* each : {&queries, &out, &all_out}) grow(*each, values);
        grow(scores, size_t(rows) * KEYS);
    }

    void clear(int rows, int head_dim) {
        std::fill_n(all_most.data(), rows, -INFINITY);
        std::fill_n(all_total.data(), rows, 0.0f);
        std::fill_n(all_out.data(), size_t(rows) * head_dim, 0.0f);
    }

  private:
    static void grow(std::vector<float>& buffer, size_t n) {
        if (buffer.size() < n) buffer.resize(n);
    }
};

// Scores of 16 keys, or weights of 16 values, times the scale that each of them is stored with.
inline void times_scales(const float* scales, int rows, float* scores) {
    for (int m = 0; m < rows; m++, scores += KEYS)
        for (int v = 0; v < TILE; v += W) store(scores + v, load(scores + v) * load(scales + v));
}

// Adds what a chunk gave for a row to what those before it gave: sums of values and of weights, both divided by e^most.
inline void absorb(float& most, float& total, float* out, float chunk_most, float chunk_total, const float* chunk, int dim) {
    if (chunk_most == -INFINITY) return;  // nothing to see among these keys
    const float greatest = std::max(most, chunk_most);
    const float before = std::exp(most - greatest), now = std::exp(chunk_most - greatest);
    total = total * before + chunk_total * now;
    for (int d = 0; d < dim; d += W) store(out + d, fma(set1(now), load(chunk + d), set1(before) * load(out + d)));
    most = greatest;
}

// Scales the query of row m.
template <class T>
inline void put_query(const float* query, float scale, int m, int dim, AttentionScratch& scratch) {
    auto* to = (typename Stored<T>::Factor*)scratch.queries.data() + size_t(m) * dim;
    for (int d = 0; d < dim; d += W) store(to + d, load(query + d) * set1(scale));
}

// The queries are in scratch.queries, (rows, head_dim); positions[m] is the place of row m, ascending. Leaves in scratch
// what one chunk of keys gives each row: `out`, (rows, head_dim), `total` and `most`.
template <class T>
inline void attend(const Heads& heads, const int* positions, int rows, int chunk, AttentionScratch& scratch) {
    constexpr int AHEAD = 4;  // blocks lie anywhere in memory: no hardware foresees the next one
    using Factor = typename Stored<T>::Factor;
    const int dim = heads.head_dim, start = chunk * KEYS;
    const auto* queries = (const Factor*)scratch.queries.data();
    const size_t block_bytes = cache_block_bytes<T>(dim);
    float *scores = scratch.scores.data(), *out = scratch.out.data();
    const int n_keys = std::min(KEYS, positions[rows - 1] + 1 - start);
    const int n_blocks = (n_keys + TILE - 1) / TILE, n = n_blocks * TILE;
    // Blocks before all windows may be gone.
    const int first = heads.window ? std::max(0, (positions[0] - heads.window + 1 - start) / TILE) : 0;
    const int32_t* table = heads.table + start / TILE;
    const auto keys = [&](int b) { return heads.keys + table[b] * heads.stride; };
    const auto values = [&](int b) { return heads.values + table[b] * heads.stride; };
    for (int b = first; b < std::min(first + AHEAD, n_blocks); b++) fetch(keys(b), block_bytes);
    for (int b = first, taken; b < n_blocks; b += taken) {
        taken = b + 4 <= n_blocks ? 4 : 1;
        for (int i = b; i < b + taken; i++) {
            if (i + AHEAD < n_blocks) fetch(keys(i + AHEAD), block_bytes);
            fetch(values(i), block_bytes);
        }
        if (taken == 4) {
            const Panel<T> four{{(const T*)keys(b), (const T*)keys(b + 1), (const T*)keys(b + 2), (const T*)keys(b + 3)}, dim};
            by_64<T>(queries, dim, rows, 1, [&](int) { return four; }, TILE, scores + b * TILE, KEYS);
        } else {
            by_16(queries, dim, rows, (const T*)keys(b), TILE, dim, scores + b * TILE, KEYS, false);
        }
        if (sizeof(T) == 1)
            for (int i = b; i < b + taken; i++) times_scales((const float*)(keys(i) + size_t(TILE) * dim), rows, scores + i * TILE);
    }
    for (int m = 0; m < rows; m++) {
        float* s = scores + m * KEYS;
        if (heads.softcap > 0)
            for (int i = first * TILE; i < n; i += W)
                store(s + i, set1(heads.softcap) * tanh(load(s + i) * set1(1 / heads.softcap)));
        const int from = heads.window ? std::clamp(positions[m] - heads.window + 1 - start, 0, n) : 0;
        const int to = std::clamp(positions[m] + 1 - start, 0, n);
        for (int i = 0; i < from; i++) s[i] = -INFINITY;
        for (int i = to; i < n; i++) s[i] = -INFINITY;
        Vec greatest_v = load(s);
        for (int i = W; i < n; i += W) greatest_v = max(greatest_v, load(s + i));
        const float most = scratch.most[m] = greatest(greatest_v);
        Vec total = set1(0);
        for (int i = 0; i < n; i += W) {
            Vec x = load(s + i);
            Vec e = most == -INFINITY ? set1(0) : unless_infinite(x, exp(x - set1(most)));
            store((Factor*)s + i, e);  // over scores that have been read
            total = total + load((Factor*)s + i);  // as they were rounded
        }
        scratch.total[m] = sum(total);
    }
    constexpr int KEPT = KEYS * sizeof(float) / sizeof(Factor);
    const Factor* weights = (const Factor*)scores + first * TILE;
    const auto filled = [&](int b) { return std::min(TILE, n_keys - b * TILE); };  // the rest of a block is whatever it held before
    if (sizeof(T) == 1)
        for (int b = first; b < n_blocks; b++) times_scales((const float*)(values(b) + size_t(TILE) * dim), rows, scores + b * TILE);
    int d = 0;
    for (; d + 4 * TILE <= dim; d += 4 * TILE) {
        const auto block = [&](int b) {
            const T* at = (const T*)values(first + b) + d;
            return Panel<T>{{at, at + TILE, at + 2 * TILE, at + 3 * TILE}, filled(first + b)};
        };
        by_64<T>(weights, KEPT, rows, n_blocks - first, block, dim, out + d, dim);
    }
    for (; d < dim; d += TILE)
        for (int b = first; b < n_blocks; b++)
            by_16(weights + (b - first) * TILE, KEPT, rows, (const T*)values(b) + d, dim, filled(b), out + d, dim, b > first);
}
