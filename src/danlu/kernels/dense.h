// Products in fp32: rows of activations with 16 columns of anything that loads as floats. Linear layers with float
// weights and both products of attention are this one kernel.
#pragma once
#include "simd.h"

constexpr int ROWS = 6;  // with two vectors of columns: 12 accumulators, the most that 16 registers allow

// out[m][0:16] (+)= sum_l a[m][l] * b[l][0:16]
template <int M, class T>
inline void rows_by_16(const float* a, size_t lda, const T* b, size_t ldb, int len, float* out, size_t ldo, bool add) {
    Vec acc[M][NV];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < NV; v++) acc[m][v] = add ? load(out + m * ldo + v * W) : set1(0.0f);
    for (int l = 0; l < len; l++) {
        Vec y[NV];
        for (int v = 0; v < NV; v++) y[v] = load(b + l * ldb + v * W);
        for (int m = 0; m < M; m++) {
            Vec x = set1(a[m * lda + l]);
            for (int v = 0; v < NV; v++) acc[m][v] = fma(x, y[v], acc[m][v]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < NV; v++) store(out + m * ldo + v * W, acc[m][v]);
}

template <class T>
inline void by_16(const float* a, size_t lda, int rows, const T* b, size_t ldb, int len, float* out, size_t ldo,
                  bool add) {
    for (int m = 0; m < rows; m += ROWS, a += ROWS * lda, out += ROWS * ldo) {
        switch (rows - m) {
            case 1: rows_by_16<1>(a, lda, b, ldb, len, out, ldo, add); break;
            case 2: rows_by_16<2>(a, lda, b, ldb, len, out, ldo, add); break;
            case 3: rows_by_16<3>(a, lda, b, ldb, len, out, ldo, add); break;
            case 4: rows_by_16<4>(a, lda, b, ldb, len, out, ldo, add); break;
            case 5: rows_by_16<5>(a, lda, b, ldb, len, out, ldo, add); break;
            default: rows_by_16<6>(a, lda, b, ldb, len, out, ldo, add);
        }
    }
}
