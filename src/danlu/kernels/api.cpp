// What Python calls, compiled once for each instruction set, into a library of its own: no function compiled for one
// can come to be called in the name of another. No exception leaves: a function that can fail returns 0 or null.
#include <exception>

#include "abi.h"
#include "pack.h"
#include "step.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// A model that runs on n_threads threads; the structures it points to must outlive it.
EXPORT void* danlu_open(const Model* model, int n_threads) {
    try {
        return new Step(*model, n_threads);
    } catch (const std::exception&) {
        return nullptr;
    }
}

EXPORT int danlu_run(void* step, const Batch* batch) {
    try {
        static_cast<Step*>(step)->run(*batch);
        return 1;
    } catch (const std::exception&) {
        return 0;
    }
}

EXPORT void danlu_close(void* step) { delete static_cast<Step*>(step); }

// `to` has room for the rows rounded up to 16.
EXPORT void danlu_pack(int kind, const void* rows, int n, int k, void* to) {
    switch (kind) {
        case F32: pack_dense((const uint32_t*)rows, n, k, (uint32_t*)to); break;
        case BF16:
        case F16: pack_dense((const uint16_t*)rows, n, k, (uint16_t*)to); break;
        default: pack_quantized(kind, (const uint8_t*)rows, n, k, (uint8_t*)to);
    }
}
