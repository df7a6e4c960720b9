// Products in fp32: rows of activations with 16 columns of anything that loads as floats. Linear layers with float
// weights and both products of attention are this one kernel.
#pragma once
#include "simd.h"

#ifdef __AVX512F__
constexpr int ROWS = 16;  // of 32 registers; 48, the rows of attention, are three times as many
#else
constexpr int ROWS = 6;  // with two vectors of columns: 12 accumulators, the most that 16 registers allow
#endif

constexpr int STREAM = 4096;  // bytes: weights are asked for this long before they are used. The CPU alone asks too late

// out[m][0:16] (+)= sum_l a[m][l] * b[l][0:16], while what lies AHEAD of b is fetched (0: nothing is).
template <int AHEAD, int M, class T>
inline void rows_by_16(const float* a, size_t lda, const T* b, size_t ldb, int len, float* out, size_t ldo, bool add) {
    Vec acc[M * NV];
    unroll<M * NV>([&](int i) ALWAYS_INLINE { acc[i] = add ? load(out + i / NV * ldo + i % NV * W) : set1(0.0f); });
    const float* row[(M + 3) / 4];  // every fourth: the others are lda, 2 lda and 3 lda further, for want of registers
    for (int m = 0; m < M; m += 4) row[m / 4] = a + m * lda;
    for (int l = 0; l < len; l++) {
        if constexpr (AHEAD > 0) _mm_prefetch((const char*)(b + l * ldb) + AHEAD, _MM_HINT_T0);
        Vec y[NV];
        unroll<NV>([&](int v) ALWAYS_INLINE { y[v] = load(b + l * ldb + v * W); });
        unroll<M>([&](int m) ALWAYS_INLINE {
            Vec x = set1(row[m / 4][m % 4 * lda + l]);
            unroll<NV>([&](int v) ALWAYS_INLINE { acc[m * NV + v] = fma(x, y[v], acc[m * NV + v]); });
        });
    }
    unroll<M * NV>([&](int i) ALWAYS_INLINE { store(out + i / NV * ldo + i % NV * W, acc[i]); });
}

// The first of `rows`, as many as fit.
template <int AHEAD, class T>
inline void first_rows(const float* a, size_t lda, int rows, const T* b, size_t ldb, int len, float* out, size_t ldo,
                       bool add) {
    as_constant<ROWS>(rows < ROWS ? rows : ROWS, [&](auto m) { rows_by_16<AHEAD, m>(a, lda, b, ldb, len, out, ldo, add); });
}

template <int AHEAD = 0, class T>
inline void by_16(const float* a, size_t lda, int rows, const T* b, size_t ldb, int len, float* out, size_t ldo,
                  bool add) {
    first_rows<AHEAD>(a, lda, rows, b, ldb, len, out, ldo, add);
    for (int m = ROWS; m < rows; m += ROWS)
        first_rows<0>(a + m * lda, lda, rows - m, b, ldb, len, out + m * ldo, ldo, add);
}

#ifdef __AVX512F__
constexpr int FEW_QUERIES = 6;  // four sums of each fit in the registers
#else
constexpr int FEW_QUERIES = 0;
#endif

// The same for a few rows and four b at once, whose columns follow each other in out: a row's one sum would wait for
// itself. Every sum is taken in the order of by_16.
template <int M, class T>
inline void rows_by_64(const float* a, size_t lda, const T* const (&b)[4], size_t ldb, int len, float* out, size_t ldo, bool add) {
    Vec acc[4 * M];
    unroll<4 * M>([&](int i) ALWAYS_INLINE { acc[i] = add ? load(out + i / 4 * ldo + i % 4 * W) : set1(0.0f); });
    for (int l = 0; l < len; l++) {
        Vec y[4];
        unroll<4>([&](int j) ALWAYS_INLINE { y[j] = load(b[j] + l * ldb); });
        unroll<M>([&](int m) ALWAYS_INLINE {
            Vec x = set1(a[m * lda + l]);
            unroll<4>([&](int j) ALWAYS_INLINE { acc[4 * m + j] = fma(x, y[j], acc[4 * m + j]); });
        });
    }
    unroll<4 * M>([&](int i) ALWAYS_INLINE { store(out + i / 4 * ldo + i % 4 * W, acc[i]); });
}

template <class T>
inline void by_64(const float* a, size_t lda, int rows, const T* const (&b)[4], size_t ldb, int len, float* out, size_t ldo, bool add) {
    as_constant<FEW_QUERIES>(rows, [&](auto m) { rows_by_64<m>(a, lda, b, ldb, len, out, ldo, add); });
}
