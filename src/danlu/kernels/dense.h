// Products in fp32: rows of activations with 16 columns of anything that loads as floats. Linear layers with float
// weights and both products of attention are this one kernel.
#pragma once
#include "simd.h"

#ifdef __AVX512F__
constexpr int ROWS = 12;  // 32 registers; more rows would not fill 48, the rows of attention
#else
constexpr int ROWS = 6;  // with two vectors of columns: 12 accumulators, the most that 16 registers allow
#endif

// out[m][0:16] (+)= sum_l a[m][l] * b[l][0:16]
template <int M, class T>
inline void rows_by_16(const float* a, size_t lda, const T* b, size_t ldb, int len, float* out, size_t ldo, bool add) {
    Vec acc[M * NV];
    unroll<M * NV>([&](int i) ALWAYS_INLINE { acc[i] = add ? load(out + i / NV * ldo + i % NV * W) : set1(0.0f); });
    for (int l = 0; l < len; l++) {
        Vec y[NV];
        unroll<NV>([&](int v) ALWAYS_INLINE { y[v] = load(b + l * ldb + v * W); });
        unroll<M>([&](int m) ALWAYS_INLINE {
            Vec x = set1(a[m * lda + l]);
            unroll<NV>([&](int v) ALWAYS_INLINE { acc[m * NV + v] = fma(x, y[v], acc[m * NV + v]); });
        });
    }
    unroll<M * NV>([&](int i) ALWAYS_INLINE { store(out + i / NV * ldo + i % NV * W, acc[i]); });
}

// The first of `rows`, as many as fit, M at most.
template <int M, class T>
inline void first_rows(const float* a, size_t lda, int rows, const T* b, size_t ldb, int len, float* out, size_t ldo,
                       bool add) {
    if (rows >= M) rows_by_16<M>(a, lda, b, ldb, len, out, ldo, add);
    else if constexpr (M > 1) first_rows<M - 1>(a, lda, rows, b, ldb, len, out, ldo, add);
}

template <class T>
inline void by_16(const float* a, size_t lda, int rows, const T* b, size_t ldb, int len, float* out, size_t ldo,
                  bool add) {
    for (int m = 0; m < rows; m += ROWS, a += ROWS * lda, out += ROWS * ldo)
        first_rows<ROWS>(a, lda, rows - m, b, ldb, len, out, ldo, add);
}
