// The kernels, compiled once for each instruction set into a namespace of its own, behind three functions (api.cpp).
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
// System headers first: they must not land in the namespace.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "abi.h"
#include "pool.h"

namespace ISA {
#include "simd.h"
#include "dense.h"
#include "quantized.h"
#include "attention.h"
#include "step.h"
}  // namespace ISA

void* JOIN(danlu_open_, ISA)(const Model* model, int n_threads) { return new ISA::Step(*model, n_threads); }
void JOIN(danlu_close_, ISA)(void* step) { delete static_cast<ISA::Step*>(step); }
void JOIN(danlu_run_, ISA)(void* step, const Batch* batch) { static_cast<ISA::Step*>(step)->run(*batch); }
