// The plain C interface between Python (native.py, by ctypes) and the kernels. Field order is part of the interface:
// native.py declares the same structures.
#pragma once
#include <cstdint>

enum WeightKind : int32_t { F32, BF16, F16, Q8_0, Q4_0, Q4_1 };
enum CacheKind : int32_t { KV_F32, KV_BF16, KV_INT8 };
enum Activation : int32_t { SILU, GELU, GELU_TANH, RELU };
enum QkNorm : int32_t { NO_QK_NORM, PER_HEAD, FULL_WIDTH };

constexpr int TILE = 16;   // outputs a weight tile holds, and tokens a cache block holds
constexpr int BLOCK = 32;  // weights that share a scale

// A matrix of n outputs by k inputs in tiles of 16 outputs (pack.h), and its bias or null.
struct Weight {
    const uint8_t* data;
    const float* bias;
    int32_t kind, n, k;
};

// Norms are null where the family has none. window: 0 sees everything. rope: index into Batch.cos, -1: none.
struct Layer {
    Weight q, k, v, o, gate, up, down;
    const float *attention_norm, *mlp_norm, *post_attention_norm, *post_mlp_norm, *q_norm, *k_norm;
    float scale;
    int32_t group, layer_in_group, window, rope, interleaved;
};

struct Model {
    const Layer* layers;
    Weight embed, head;
    const float* norm;
    int32_t n_layers, dim, n_heads, n_kv_heads, head_dim, ffn_dim;
    int32_t activation, qk_norm, cache_kind;
    float norm_eps, attention_softcap, logit_softcap, embed_scale, head_scale;  // a cap of 0: none
};

// What an adapter adds to one matrix: y += B A x, both F32; a has rank outputs, b has rank inputs. a.data null: nothing.
struct LowRank {
    Weight a, b;
};

struct AdapterLayer {
    LowRank q, k, v, o, gate, up, down;
};

struct Adapter {
    const AdapterLayer* layers;
    LowRank head;
    int32_t rank;  // the largest of them
};

// The cache of one group of layers: (blocks, layers, kv heads, block), so that what is used lies together. How a block holds
// its values: attention.h. In int8 each block is followed by its 16 scales, fp32.
struct Cache {
    uint8_t *keys, *values;
    int64_t n_layers;
};

// danlu/engine/batch.py. Tokens before prompt_from continue answers. cos and sin: one (tokens, rotated / 2) array a rope.
struct Batch {
    int32_t n_tokens, n_sequences, n_rows, prompt_from;
    const int32_t *ids, *positions, *starts, *rows;
    const int32_t* const* tables;
    const int32_t* table_widths;
    const float* const* cos;
    const float* const* sin;
    const int32_t* rotated;
    const Cache* caches;
    float* logits;  // (rows, vocabulary), or null
    float* hidden;  // (rows, dim), or null
    const Adapter* const* adapters;  // of each sequence, null: none; or null where no sequence has one
};
