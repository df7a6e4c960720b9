// Products summed in fp32: rows of activations with 16 columns of anything that loads as floats. Linear layers with
// float weights and both products of attention are this one kernel.
#pragma once
#include "simd.h"

#ifdef __AVX512F__
constexpr int ROWS = 16;  // of 32 registers; 48, the rows of attention, are three times as many
#else
constexpr int ROWS = 6;  // with two vectors of columns: 12 accumulators, the most that 16 registers allow
#endif

constexpr int STREAM = 4096;  // bytes: weights are asked for this long before they are used. The CPU alone asks too late

// How a product goes through its factors: DEPTH rows of the right one at a time, each times a number of the left one.
template <class A, class T>
struct Terms {
    static constexpr int DEPTH = 1;
    using Right = Vec;
    static Right load_right(const T* b) { return load(b); }
    static Vec add(Vec acc, const A* a, Right y) { return fma(set1(*a), y, acc); }
};

template <>
struct Terms<float, bf16_pair> {
    static constexpr int DEPTH = 2;
    struct Right {
        Vec first, second;
    };
    static Right load_right(const bf16_pair* b) {
        Right y;
        load(b, y.first, y.second);
        return y;
    }
    static Vec add(Vec acc, const float* a, Right y) { return fma(set1(a[1]), y.second, add_first(acc, a, y)); }
    static Vec add_first(Vec acc, const float* a, Right y) { return fma(set1(a[0]), y.first, acc); }
};

#ifdef __AVX512BF16__
template <>
struct Terms<bf16, bf16_pair> {
    static constexpr int DEPTH = 2;
    using Right = __m512i;
    static Right load_right(const bf16_pair* b) { return _mm512_loadu_si512(b); }
    static Vec add(Vec acc, const bf16* a, Right y) {
        int32_t both;
        std::memcpy(&both, a, 4);
        return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(both), (__m512bh)y);
    }
    static Vec add_first(Vec acc, const bf16* a, Right y) {
        const __m512i first = _mm512_and_si512(y, _mm512_set1_epi32(65535));
        return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(a->bits), (__m512bh)first);
    }
};
#endif

// out[m][0:16] (+)= sum_l a[m][l] * b[l][0:16], while what lies AHEAD of b is fetched (0: nothing is).
template <int AHEAD, int M, class A, class T>
inline void rows_by_16(const A* a, size_t lda, const T* b, size_t ldb, int len, float* out, size_t ldo, bool add) {
    using Terms = Terms<A, T>;
    constexpr int DEPTH = Terms::DEPTH;
    Vec acc[M * NV];
    unroll<M * NV>([&](int i) ALWAYS_INLINE { acc[i] = add ? load(out + i / NV * ldo + i % NV * W) : set1(0.0f); });
    const A* row[(M + 3) / 4];  // every fourth: the others are lda, 2 lda and 3 lda further, for want of registers
    for (int m = 0; m < M; m += 4) row[m / 4] = a + m * lda;
    const auto each = [&](int l, const auto& term) ALWAYS_INLINE {
        const T* at = b + l / DEPTH * ldb;
        if constexpr (AHEAD > 0) _mm_prefetch((const char*)at + AHEAD, _MM_HINT_T0);
        typename Terms::Right y[NV];
        unroll<NV>([&](int v) ALWAYS_INLINE { y[v] = Terms::load_right(at + v * W); });
        unroll<M>([&](int m) ALWAYS_INLINE {
            const A* x = row[m / 4] + m % 4 * lda + l;
            unroll<NV>([&](int v) ALWAYS_INLINE { acc[m * NV + v] = term(acc[m * NV + v], x, y[v]); });
        });
    };
    int l = 0;
    for (; l + DEPTH <= len; l += DEPTH) each(l, Terms::add);
    if constexpr (DEPTH == 2)
        if (l < len) each(l, Terms::add_first);
    unroll<M * NV>([&](int i) ALWAYS_INLINE { store(out + i / NV * ldo + i % NV * W, acc[i]); });
}

// The first of `rows`, as many as fit.
template <int AHEAD, class A, class T>
inline void first_rows(const A* a, size_t lda, int rows, const T* b, size_t ldb, int len, float* out, size_t ldo,
                       bool add) {
    as_constant<ROWS>(rows < ROWS ? rows : ROWS, [&](auto m) { rows_by_16<AHEAD, m>(a, lda, b, ldb, len, out, ldo, add); });
}

template <int AHEAD = 0, class A, class T>
inline void by_16(const A* a, size_t lda, int rows, const T* b, size_t ldb, int len, float* out, size_t ldo,
                  bool add) {
    first_rows<AHEAD>(a, lda, rows, b, ldb, len, out, ldo, add);
    for (int m = ROWS; m < rows; m += ROWS)
        first_rows<0>(a + m * lda, lda, rows - m, b, ldb, len, out + m * ldo, ldo, add);
}

// Right factors whose rows follow each other: 64 columns, 16 at each pointer, and how many rows.
template <class T>
struct Panel {
    const T* columns[4];
    int len;
};

// out[m][0:64] = sum_l a[m][l] * b[l][0:64], where b is panel(0) .. panel(n - 1). Every sum is taken in the order of by_16.
#ifdef __AVX512F__
constexpr int ROWS_BY_64 = 6;  // four sums of each fit in the registers

// At once: a number of the left factor is loaded for four sums, and those of a single row do not wait for each other.
template <int M, class T, class A, class Panels>
inline void rows_by_64(const A* a, size_t lda, int n, const Panels& panel, size_t ldb, float* out, size_t ldo) {
    using Terms = Terms<A, T>;
    constexpr int DEPTH = Terms::DEPTH;
    Vec acc[4 * M];
    unroll<4 * M>([&](int i) ALWAYS_INLINE { acc[i] = set1(0); });
    for (int p = 0; p < n; p++) {
        const Panel<T> b = panel(p);
        const auto each = [&](int l, const auto& term) ALWAYS_INLINE {
            typename Terms::Right y[4];
            unroll<4>([&](int j) ALWAYS_INLINE { y[j] = Terms::load_right(b.columns[j] + l / DEPTH * ldb); });
            unroll<M>([&](int m) ALWAYS_INLINE {
                unroll<4>([&](int j) ALWAYS_INLINE { acc[4 * m + j] = term(acc[4 * m + j], a + m * lda + l, y[j]); });
            });
        };
        int l = 0;
        for (; l + DEPTH <= b.len; l += DEPTH) each(l, Terms::add);
        if constexpr (DEPTH == 2)
            if (l < b.len) each(l, Terms::add_first);
        a += b.len;
    }
    unroll<4 * M>([&](int i) ALWAYS_INLINE { store(out + i / 4 * ldo + i % 4 * W, acc[i]); });
}

template <class T, class A, class Panels>
inline void by_64(const A* a, size_t lda, int rows, int n, const Panels& panel, size_t ldb, float* out, size_t ldo) {
    for (; rows >= ROWS_BY_64; rows -= ROWS_BY_64, a += ROWS_BY_64 * lda, out += ROWS_BY_64 * ldo)
        rows_by_64<ROWS_BY_64, T>(a, lda, n, panel, ldb, out, ldo);
    as_constant<ROWS_BY_64 - 1>(rows, [&](auto m) { rows_by_64<m, T>(a, lda, n, panel, ldb, out, ldo); });
}
#else
template <class T, class A, class Panels>
inline void by_64(const A* a, size_t lda, int rows, int n, const Panels& panel, size_t ldb, float* out, size_t ldo) {
    for (int p = 0; p < n; p++) {
        const Panel<T> b = panel(p);
        for (int j = 0; j < 4; j++) by_16(a, lda, rows, b.columns[j], ldb, b.len, out + 16 * j, ldo, p > 0);
        a += b.len;
    }
}
#endif
