// What Python calls. No exception leaves: a function that can fail returns 0 or null.
#include <exception>

#include "abi.h"
#include "pack.h"

#define EXPORT __attribute__((visibility("default")))

struct Path {
    const char* name;
    bool (*works)();
    void* (*open)(const Model*, int);
    void (*close)(void*);
    void (*run)(void*, const Batch*);
};

#define DECLARE(isa)                                \
    void* danlu_open_##isa(const Model*, int);      \
    void danlu_close_##isa(void*);                  \
    void danlu_run_##isa(void*, const Batch*);
DECLARE(avx2)

static bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

// The best first.
static const Path paths[] = {
    {"avx2", has_avx2, danlu_open_avx2, danlu_close_avx2, danlu_run_avx2},
};

struct Opened {
    const Path* path;
    void* step;
};

extern "C" {

EXPORT int danlu_paths() { return sizeof(paths) / sizeof(paths[0]); }
EXPORT const char* danlu_path_name(int i) { return paths[i].name; }
EXPORT int danlu_path_works(int i) { return paths[i].works(); }

// A model that runs on n_threads threads; the structures it points to must outlive it.
EXPORT void* danlu_open(const Model* model, int n_threads, int path) {
    try {
        return new Opened{&paths[path], paths[path].open(model, n_threads)};
    } catch (const std::exception&) {
        return nullptr;
    }
}

EXPORT int danlu_run(void* opened, const Batch* batch) {
    auto* it = static_cast<Opened*>(opened);
    try {
        it->path->run(it->step, batch);
        return 1;
    } catch (const std::exception&) {
        return 0;
    }
}

EXPORT void danlu_close(void* opened) {
    auto* it = static_cast<Opened*>(opened);
    it->path->close(it->step);
    delete it;
}

// `to` has room for the rows rounded up to 16.
EXPORT void danlu_pack(int kind, const void* rows, int n, int k, void* to) {
    switch (kind) {
        case F32: pack_dense((const uint32_t*)rows, n, k, (uint32_t*)to); break;
        case BF16:
        case F16: pack_dense((const uint16_t*)rows, n, k, (uint16_t*)to); break;
        default: pack_quantized(kind, (const uint8_t*)rows, n, k, (uint8_t*)to);
    }
}
}
