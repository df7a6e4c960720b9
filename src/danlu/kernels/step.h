// One step of a decoder: embedding, layers, head, for the new tokens of several sequences. Every thread runs the same
// code; between two parts that depend on each other they meet at a barrier.
#pragma once
#include <algorithm>

#include "abi.h"
#include "attention.h"
#include "dense.h"
#include "low_rank.h"
#include "pool.h"
#include "quantized.h"
#ifdef __AMX_BF16__
#include "amx.h"
#endif

constexpr int ROW_BLOCK = 64;        // rows that share a weight tile while it is in the first cache
constexpr int ATTENTION_ROWS = 48;   // query rows that share a block of keys
constexpr int MOST_HEAD_DIM = 1024;
constexpr int FEW_ROWS = 4;          // below, work on rows is done by one thread at the barrier itself

inline void rms_norm(const float* x, const float* weight, int dim, float eps, float* out) {
    Vec squares = set1(0);
    int i = 0;
    for (; i + W <= dim; i += W) squares = fma(load(x + i), load(x + i), squares);
    float total = sum(squares);
    for (; i < dim; i++) total += x[i] * x[i];
    float scale = 1 / std::sqrt(total / dim + eps);
    for (i = 0; i + W <= dim; i += W) store(out + i, load(x + i) * set1(scale) * load(weight + i));
    for (; i < dim; i++) out[i] = x[i] * scale * weight[i];
}

inline Vec activate(Vec x, int kind) {
    switch (kind) {
        case SILU: return x / (set1(1) + exp(set1(0) - x));
        case GELU_TANH: return set1(0.5f) * x * (set1(1) + tanh(set1(0.7978845608f) * fma(x * x * x, set1(0.044715f), x)));
        case RELU: return max(x, set1(0));
        default: {
            float each[W];
            store(each, x);
            for (float& e : each) e = 0.5f * e * (1 + std::erf(e * 0.70710678f));
            return load(each);
        }
    }
}

inline size_t matrix_tile_bytes(const Weight& w) {
    return w.kind <= F16 ? size_t(TILE) * w.k * (w.kind == F32 ? 4 : 2) : w.k / BLOCK * tile_bytes(w.kind);
}

// One row of a matrix as floats: an embedding.
inline void unpack_row(const Weight& w, int row, float* out) {
    const uint8_t* tile = w.data + row / TILE * matrix_tile_bytes(w);
    int c = row % TILE;
    if (w.kind <= F16) {
        for (int i = 0; i < w.k; i++) {
            size_t at = size_t(i) * TILE + c;
            out[i] = w.kind == F32 ? ((const float*)tile)[at] : w.kind == BF16 ? to_float(((const bf16*)tile)[at]) : to_float(((const f16*)tile)[at]);
        }
        return;
    }
    for (int b = 0; b < w.k / BLOCK; b++, tile += tile_bytes(w.kind), out += BLOCK) {
        const f16* scales = (const f16*)(tile + (w.kind == Q8_0 ? 512 : 256));
        float d = to_float(scales[c]), m = w.kind == Q4_1 ? to_float(scales[TILE + c]) : w.kind == Q4_0 ? -8 * d : 0;
        for (int i = 0; i < BLOCK; i++) {
            if (w.kind == Q8_0) out[i] = d * int8_t(tile[i / 4 * 64 + c * 4 + i % 4]);
            else {
                uint8_t both = tile[i % 16 / 4 * 64 + c * 4 + i % 4];
                out[i] = d * (i < 16 ? both & 15 : both >> 4) + m;
            }
        }
    }
}

class Step {
  public:
    Step(const Model& model, int n_threads) : model_(model), pool_(n_threads) {
        for (int l = 0; l < model.n_layers; l++) {
            const Layer& layer = model.layers[l];
            for (const Weight* w : {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down})
                (w->kind <= F16 ? dense_ : quantized_) = true;
        }
        (model.head.kind <= F16 ? dense_ : quantized_) = true;
        q_dim_ = model.n_heads * model.head_dim, kv_dim_ = model.n_kv_heads * model.head_dim;
        block_bytes_ = cache_block_bytes(model.cache_kind, model.head_dim);
    }

    void run(const Batch& batch) {
        batch_ = &batch;
        const int n = batch.n_tokens, widest = std::max({model_.dim, q_dim_, model_.ffn_dim});
        fit(x_, size_t(n) * model_.dim), fit(branch_, size_t(n) * model_.dim), fit(qkv_, size_t(n) * (q_dim_ + 2 * kv_dim_));
        fit(attended_, size_t(n) * q_dim_), fit(ffn_, size_t(n) * model_.ffn_dim);
        fit(input_, size_t(n) * widest);
#ifdef __AMX_BF16__
        if (batch.prompt_from < n) fit(rounded_, size_t(input_blocks(n)) * 2 * TILE * input_blocks(widest));
#endif
        if (quantized_) {
            const size_t inputs = size_t(n + ROW_GROUP - 1) / ROW_GROUP * ROW_GROUP * widest;
            for (Codes* codes : {&codes_, &rest_}) codes->fit(inputs);
        }
        pieces_.clear();
        const int group = model_.n_heads / model_.n_kv_heads, tokens = std::max(1, ATTENTION_ROWS / group);
        for (int s = 0; s < batch.n_sequences; s++)
            for (int t = batch.starts[s]; t < batch.starts[s + 1]; t += tokens)
                pieces_.push_back({s, t, std::min(t + tokens, batch.starts[s + 1])});
        exact_rows_ = int(std::count_if(batch.rows, batch.rows + batch.n_rows, [&](int t) { return t < batch.prompt_from; }));
        const int items = int(pieces_.size()) * model_.n_kv_heads;
        splits_ = items >= 4 * pool_.size() ? 1 : (4 * pool_.size() + items - 1) / items;
        if (splits_ > 1) {
            const int longest = *std::max_element(batch.positions, batch.positions + n);
            const size_t parts = size_t(last_chunk(longest) + 1) * n * model_.n_heads;
            fit(most_, parts), fit(total_, parts), fit(parts_, parts * model_.head_dim);
        }
        sequence_of_.resize(n);
        for (int s = 0; s < batch.n_sequences; s++)
            std::fill(sequence_of_.begin() + batch.starts[s], sequence_of_.begin() + batch.starts[s + 1], s);
        const auto adapter_of = [&](int t) { return batch.adapters ? batch.adapters[sequence_of_[t]] : nullptr; };
        updates_.plan(n, adapter_of);
        wanted_.clear();
        if (batch.n_rows < n) {
            for (int r = 0; r < batch.n_rows; r++) wanted_.push_back({sequence_of_[batch.rows[r]], batch.rows[r], batch.rows[r] + 1});
            wanted_updates_.plan(batch.n_rows, [&](int r) { return adapter_of(batch.rows[r]); });
        }
        head_updates_.plan(batch.n_rows, [&](int r) {
            const Adapter* adapter = adapter_of(batch.rows[r]);
            return adapter && adapter->head.a.data ? adapter : nullptr;
        });
        pool_.run([this] { work(); });
    }

  private:
    struct Piece {
        int sequence, begin, end;  // tokens of one sequence
    };

    // What a part of a layer works on: all tokens, or those whose results are wanted, close together.
    struct Rows {
        int n, exact;  // from `exact` on they are of prompts
        LowRankUpdates& updates;
    };

    struct Codes {
        std::vector<int8_t> codes;
        std::vector<float> scales, sums;

        void fit(size_t n) { Step::fit(codes, n), Step::fit(scales, n / BLOCK), Step::fit(sums, n / BLOCK); }
        operator Quantized() { return {codes.data(), scales.data(), sums.data()}; }
    };

    template <class T>
    static void fit(std::vector<T>& buffer, size_t n) {
        if (buffer.size() < n) buffer.resize(n);
    }

    // ---- what all threads run

    void work() {
        const int n = batch_->n_tokens;
#ifdef __AMX_BF16__
        std::optional<TileRegisters> registers;
        if (batch_->prompt_from < n) registers.emplace(), unpacked().forget();
#endif
        if (model_.n_layers) {
            pool_.share(n, rows_at_once(n), [&](int t) { embed(t), prepare(t, x_.data(), model_.layers[0].attention_norm, model_.dim, batch_->prompt_from, true); });
            pool_.barrier();
        }
        const bool fewer = batch_->n_rows < n;  // results are wanted than there are tokens
        const Rows all{n, batch_->prompt_from, updates_}, wanted{batch_->n_rows, exact_rows_, wanted_updates_};
        for (int l = 0; l < model_.n_layers; l++) {
            const Layer& layer = model_.layers[l];
            const bool last = l + 1 == model_.n_layers, leaves = last && fewer;
            project_qkv(layer);
            rows(n, [&](int t) { turn_and_keep(layer, t); });
            attention(layer, leaves ? wanted_ : pieces_);
            if (leaves) only_wanted(layer);  // of the others, keys and values are all that is ever asked for
            else rows(n, [&](int t) { join(layer, t), prepare(t, attended_.data(), nullptr, q_dim_, all.exact); });
            const Rows& now = leaves ? wanted : all;
            add_to_stream(layer.o, now, attended_.data(), {l, 1, {&AdapterLayer::o}}, layer.post_attention_norm, layer.mlp_norm, false);
            feed_forward(layer, now);
            rows(now.n, [&](int t) { prepare(t, ffn_.data(), nullptr, model_.ffn_dim, now.exact); });
            add_to_stream(layer.down, now, ffn_.data(), {l, 1, {&AdapterLayer::down}}, layer.post_mlp_norm, last ? nullptr : model_.layers[l + 1].attention_norm, !last);
        }
        rows(batch_->n_rows, [&](int r) { finish(r, fewer ? r : batch_->rows[r]); });
        if (batch_->logits) head();
        pool_.barrier();
    }

    // After a part: everyone waits, then `item` is done for each row.
    template <class Item>
    void rows(int n, const Item& item) {
        if (n < FEW_ROWS) {
            pool_.barrier([&] {
                for (int i = 0; i < n; i++) item(i);
            });
        } else {
            pool_.barrier();
            pool_.share(n, rows_at_once(n), item);
            pool_.barrier();
        }
    }

    // Rows are short work: threads that take them one by one wait for each other, and write to the same cache lines.
    int rows_at_once(int n) const { return std::clamp(n / pool_.size(), 1, 2 * TILE); }

    void embed(int t) {
        float* x = x_.data() + size_t(t) * model_.dim;
        unpack_row(model_.embed, batch_->ids[t], x);
        if (model_.embed_scale != 1)
            for (int i = 0; i < model_.dim; i++) x[i] *= model_.embed_scale;
    }

    // Row t of `from`, normalised where there is a norm, as the input of the next products; those of values take more bits.
    void prepare(int t, const float* from, const float* norm, int dim, [[maybe_unused]] int exact, bool of_values = false) {
        const float* row = from + size_t(t) * dim;
        float* input = input_.data() + size_t(t) * dim;
        if (norm) rms_norm(row, norm, dim, model_.norm_eps, input);
        else if (dense_) std::copy_n(row, dim, input);
#ifdef __AMX_BF16__
        if (t >= exact) return round_row(norm ? input : row, dim, rounded_row(t, dim));
#endif
        if (!quantized_) return;
        const Quantized rest = rest_;
        quantize_row(norm ? input : row, dim, codes_, t, of_values ? &rest : nullptr);
    }

#ifdef __AMX_BF16__
    // A row's place in the first of its tiles.
    TileRow* rounded_row(int t, int k) {
        return rounded_.data() + size_t(t / TILE) * input_blocks(k) * TILE + t % TILE;
    }

    static UnpackedTiles& unpacked() {
        static thread_local UnpackedTiles tiles;
        return tiles;
    }
#endif

    // Outputs 16 * tile .. of rows row0.. : (rows, 16), WIDE apart. Of packed weights with these codes of the input.
    void tile_product(const Weight& w, int tile, int row0, int rows, const Quantized& codes, float* out) {
        const uint8_t* data = w.data + tile * matrix_tile_bytes(w);
        const float* x = input_.data() + size_t(row0) * w.k;
        switch (w.kind) {
            case F32: by_16<STREAM>(x, w.k, rows, (const float*)data, TILE, w.k, out, WIDE, false); break;
            case BF16: by_16<STREAM>(x, w.k, rows, (const bf16*)data, TILE, w.k, out, WIDE, false); break;
            case F16: by_16<STREAM>(x, w.k, rows, (const f16*)data, TILE, w.k, out, WIDE, false); break;
            case Q8_0: quantized_tile<Q8_0>(data, w.k, codes, row0, rows, out); break;
            case Q4_0: quantized_tile<Q4_0>(data, w.k, codes, row0, rows, out); break;
            default: quantized_tile<Q4_1>(data, w.k, codes, row0, rows, out);
        }
    }

    // Outputs WIDE * span .. of rows row0.. : (rows, WIDE). Columns beyond the matrix are 0.
    void product(const Weight& w, int span, int row0, int rows, float* out, [[maybe_unused]] int exact) {
        const int first = span * SPAN, end = std::min(first + SPAN, tiles(w));
        if (end - first < SPAN) std::fill_n(out, rows * WIDE, 0.0f);
        int few = rows;
#ifdef __AMX_BF16__
        if (row0 + rows > exact && w.kind != F32) {
            const size_t bytes = matrix_tile_bytes(w);
            const TileRow* ready[SPAN] = {};
            for (int t = first; t < end; t++) ready[t - first] = unpacked().get(w.kind, w.k, w.data + t * bytes);
            tile_products(rounded_row(row0, w.k), ready[0], ready[1], w.k, rows, out);
            few = std::max(0, exact - row0);  // those before the prompts are done again
        }
#endif
        for (int t = first; few && t < end; t++) tile_product(w, t, row0, few, codes_, out + (t - first) * TILE);
        if (w.bias)
            for (int m = 0; m < rows; m++)
                for (int c = 0; c < std::min(WIDE, w.n - span * WIDE); c++)
                    out[m * WIDE + c] += w.bias[span * WIDE + c];
    }

    // Of values what 8 bits leave of the input counts too: their rounding enters the stream as it is, and is a sixth of the
    // error of all products for 3 % of the work.
    void add_rest(const Weight& w, int span, int row0, int rows, float* out, [[maybe_unused]] int exact) {
        if (w.kind <= F16) return;
#ifdef __AMX_BF16__
        rows = std::min(rows, std::max(0, exact - row0));
#endif
        alignas(64) float more[ROW_BLOCK * WIDE];
        const int first = span * SPAN, end = std::min(first + SPAN, tiles(w));
        for (int t = first; rows && t < end; t++) tile_product(w, t, row0, rows, rest_, more + (t - first) * TILE);
        add(more, rows, (end - first) * TILE, out, WIDE);
    }

    static int tiles(const Weight& w) { return (w.n + TILE - 1) / TILE; }
    static int spans(const Weight& w) { return (w.n + WIDE - 1) / WIDE; }

    // Shares the spans of one or more matrices; `item(span, row0, rows)`. Block of rows by block of rows, whose results
    // then stay near the thread that goes on with them; with AMX span by span, since weights are unpacked for it.
    template <class Item>
    void share_spans(int n_spans, int n, const Item& item) {
        const int n_blocks = (n + ROW_BLOCK - 1) / ROW_BLOCK;
        const int chunk = n_blocks > 1 ? 4 : std::max(1, n_spans / (pool_.size() * 8));
        pool_.share(n_spans * n_blocks, chunk, [&](int i) {
#ifdef __AMX_BF16__
            const int span = i / n_blocks, row0 = i % n_blocks * ROW_BLOCK;
#else
            const int span = i % n_spans, row0 = i / n_spans * ROW_BLOCK;
#endif
            item(span, row0, std::min(ROW_BLOCK, n - row0));
        });
    }

    int number(const Layer& layer) const { return int(&layer - model_.layers); }

    // A x of the matrices that take this input; the products that follow add B times that.
    void begin_updates(LowRankUpdates& updates, const AdaptedMatrices& matrices, const float* input) {
        if (!updates.any()) return;
        pool_.share(updates.items(matrices), 1, [&](int item) { updates.down(item, matrices, input); });
        pool_.barrier();
    }

    // What product() has put out, with its updates.
    void add_updates(LowRankUpdates& updates, int matrix, const AdaptedMatrices& matrices, const Weight& w, int span, int row0, int rows, float* out) {
        if (updates.any()) updates.up(matrix, matrices, span * SPAN, std::min((span + 1) * SPAN, tiles(w)), row0, rows, out, WIDE);
    }

    static void put(const float* results, int rows, int columns, float* to, size_t ld) {
        for (int m = 0; m < rows; m++, results += WIDE, to += ld)
            if (columns == WIDE) unroll<WIDE / W>([&](int v) ALWAYS_INLINE { store(to + v * W, load(results + v * W)); });
            else std::copy_n(results, columns, to);
    }

    static void add(const float* results, int rows, int columns, float* to, size_t ld) {
        for (int m = 0; m < rows; m++, results += WIDE, to += ld)
            if (columns == WIDE) unroll<WIDE / W>([&](int v) ALWAYS_INLINE { store(to + v * W, load(to + v * W) + load(results + v * W)); });
            else for (int c = 0; c < columns; c++) to[c] += results[c];
    }

    void project_qkv(const Layer& layer) {
        const int n = batch_->n_tokens, width = q_dim_ + 2 * kv_dim_, nq = spans(layer.q), nk = spans(layer.k);
        const AdaptedMatrices adapted{number(layer), 3, {&AdapterLayer::q, &AdapterLayer::k, &AdapterLayer::v}};
        begin_updates(updates_, adapted, input_.data());
        share_spans(nq + 2 * nk, n, [&](int span, int row0, int rows) {
            bool is_q = span < nq, is_k = span < nq + nk;
            const Weight& w = is_q ? layer.q : is_k ? layer.k : layer.v;
            int own = is_q ? span : is_k ? span - nq : span - nq - nk;
            int column = (is_q ? 0 : is_k ? q_dim_ : q_dim_ + kv_dim_) + own * WIDE;
            alignas(64) float out[ROW_BLOCK * WIDE];
            product(w, own, row0, rows, out, batch_->prompt_from);
            if (!is_q && !is_k) add_rest(w, own, row0, rows, out, batch_->prompt_from);
            add_updates(updates_, is_q ? 0 : is_k ? 1 : 2, adapted, w, own, row0, rows, out);
            put(out, rows, std::min(WIDE, w.n - own * WIDE), qkv_.data() + size_t(row0) * width + column, width);
        });
    }

    // Normalises and turns queries and keys of a token, and keeps its keys and values.
    void turn_and_keep(const Layer& layer, int t) {
        const int dim = model_.head_dim;
        float* q = qkv_.data() + size_t(t) * (q_dim_ + 2 * kv_dim_);
        float *k = q + q_dim_, *v = k + kv_dim_;
        if (model_.qk_norm == FULL_WIDTH) {
            rms_norm(q, layer.q_norm, q_dim_, model_.norm_eps, q);
            rms_norm(k, layer.k_norm, kv_dim_, model_.norm_eps, k);
        }
        for (int h = 0; h < model_.n_heads + model_.n_kv_heads; h++) {
            float* x = q + h * dim;
            if (model_.qk_norm == PER_HEAD)
                rms_norm(x, h < model_.n_heads ? layer.q_norm : layer.k_norm, dim, model_.norm_eps, x);
            if (layer.rope >= 0) turn(x, layer, t);
        }
        const Cache& cache = batch_->caches[layer.group];
        const int position = batch_->positions[t];
        for (int h = 0; h < model_.n_kv_heads; h++) {
            size_t at = cache_offset(layer, cache, block_of(layer.group, sequence_of_[t], position), h);
            keep(cache.keys + at, position % TILE, k + h * dim, true);
            keep(cache.values + at, position % TILE, v + h * dim, false);
        }
    }

    void turn(float* x, const Layer& layer, int t) {
        const int half = batch_->rotated[layer.rope] / 2;
        const float *cos = batch_->cos[layer.rope] + size_t(t) * half, *sin = batch_->sin[layer.rope] + size_t(t) * half;
        int i = 0;
        if (!layer.interleaved)
            for (; i + W <= half; i += W) {
                const Vec a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
                store(x + i, a * c - b * s);
                store(x + half + i, b * c + a * s);
            }
        for (; i < half; i++) {
            float &a = layer.interleaved ? x[2 * i] : x[i], &b = layer.interleaved ? x[2 * i + 1] : x[half + i];
            float turned = a * cos[i] - b * sin[i];
            b = b * cos[i] + a * sin[i];
            a = turned;
        }
    }

    void keep(uint8_t* block, int place, const float* x, bool key) {
        switch (model_.cache_kind) {
            case KV_F32: write_cache<float>(block, place, x, model_.head_dim, key); break;
            case KV_BF16: write_cache<bf16_pair>(block, place, x, model_.head_dim, key); break;
            default: write_cache<int8_t>(block, place, x, model_.head_dim, key);
        }
    }

    int block_of(int group, int sequence, int position) const {
        return batch_->tables[group][size_t(sequence) * batch_->table_widths[group] + position / TILE];
    }

    size_t cache_offset(const Layer& layer, const Cache& cache, int64_t block, int head) const {
        return ((block * cache.n_layers + layer.layer_in_group) * model_.n_kv_heads + head) * block_bytes_;
    }

    // Where there are few pieces of work the keys are split too, and join() adds the parts up.
    void attention(const Layer& layer, const std::vector<Piece>& pieces) {
        const int group = model_.n_heads / model_.n_kv_heads, dim = model_.head_dim, width = q_dim_ + 2 * kv_dim_;
        const Cache& cache = batch_->caches[layer.group];
        pool_.share(int(pieces.size()) * model_.n_kv_heads * splits_, 1, [&](int i) {
            static thread_local AttentionScratch scratch;
            const int split = i % splits_, kv_head = i / splits_ % model_.n_kv_heads;
            const Piece& piece = pieces[i / splits_ / model_.n_kv_heads];
            const int n_rows = (piece.end - piece.begin) * group;
            int positions[ATTENTION_ROWS + 256];
            scratch.fit(n_rows, dim);
            for (int t = piece.begin, m = 0; t < piece.end; t++)
                for (int h = 0; h < group; h++, m++) {
                    positions[m] = batch_->positions[t];
                    const float* q = qkv_.data() + size_t(t) * width + (kv_head * group + h) * dim;
                    switch (model_.cache_kind) {
                        case KV_F32: put_query<float>(q, layer.scale, m, dim, scratch); break;
                        case KV_BF16: put_query<bf16_pair>(q, layer.scale, m, dim, scratch); break;
                        default: put_query<int8_t>(q, layer.scale, m, dim, scratch);
                    }
                }
            size_t base = cache_offset(layer, cache, 0, kv_head);
            Heads heads{cache.keys + base, cache.values + base, cache.n_layers * model_.n_kv_heads * block_bytes_,
                        batch_->tables[layer.group] + size_t(piece.sequence) * batch_->table_widths[layer.group],
                        dim, layer.window, model_.attention_softcap};
            // This split's share of the chunks, each kept for join(), or all of them, added up here.
            const int first = first_chunk(heads, positions[0]), n = last_chunk(positions[n_rows - 1]) + 1 - first;
            const int begin = first + n * split / splits_, end = first + n * (split + 1) / splits_;
            if (splits_ == 1) scratch.clear(n_rows, dim);
            for (int chunk = begin; chunk < end; chunk++) {
                switch (model_.cache_kind) {
                    case KV_F32: attend<float>(heads, positions, n_rows, chunk, scratch); break;
                    case KV_BF16: attend<bf16_pair>(heads, positions, n_rows, chunk, scratch); break;
                    default: attend<int8_t>(heads, positions, n_rows, chunk, scratch);
                }
                for (int t = piece.begin, m = 0; t < piece.end; t++)
                    for (int h = kv_head * group; h < (kv_head + 1) * group; h++, m++) {
                        const float* out = scratch.out.data() + m * dim;
                        if (splits_ == 1) {
                            absorb(scratch.all_most[m], scratch.all_total[m], scratch.all_out.data() + m * dim,
                                   scratch.most[m], scratch.total[m], out, dim);
                        } else {
                            size_t part = (size_t(chunk) * batch_->n_tokens + t) * model_.n_heads + h;
                            most_[part] = scratch.most[m], total_[part] = scratch.total[m];
                            std::copy_n(out, dim, parts_.data() + part * dim);
                        }
                    }
            }
            if (splits_ > 1) return;
            for (int t = piece.begin, m = 0; t < piece.end; t++)
                for (int h = kv_head * group; h < (kv_head + 1) * group; h++, m++)
                    finish_head(scratch.all_out.data() + m * dim, scratch.all_total[m], t, h);
        });
    }

    // Adds the chunks of a token up where they were split.
    void join(const Layer& layer, int t) {
        if (splits_ == 1) return;
        const int dim = model_.head_dim, position = batch_->positions[t];
        const int first = layer.window ? std::max(0, position - layer.window + 1) / KEYS : 0;
        for (int h = 0; h < model_.n_heads; h++) {
            float most = -INFINITY, total = 0, out[MOST_HEAD_DIM] = {};
            for (int chunk = first; chunk <= last_chunk(position); chunk++) {
                size_t part = (size_t(chunk) * batch_->n_tokens + t) * model_.n_heads + h;
                absorb(most, total, out, most_[part], total_[part], parts_.data() + part * dim, dim);
            }
            finish_head(out, total, t, h);
        }
    }

    void finish_head(const float* sums, float total, int t, int head) {
        const int dim = model_.head_dim;
        float* to = attended_.data() + size_t(t) * q_dim_ + head * dim;
        for (int d = 0; d < dim; d += W) store(to + d, load(sums + d) * set1(1 / total));
    }

    // Moves the wanted rows of the stream and of what they attended to to the front; in buffers of which nothing is needed
    // any more, since a row may lie where another one goes.
    void only_wanted(const Layer& layer) {
        const int dim = model_.dim;
        rows(batch_->n_rows, [&](int r) {
            const int t = batch_->rows[r];
            join(layer, t);
            std::copy_n(x_.data() + size_t(t) * dim, dim, branch_.data() + size_t(r) * dim);
            std::copy_n(attended_.data() + size_t(t) * q_dim_, q_dim_, qkv_.data() + size_t(r) * q_dim_);
            prepare(r, qkv_.data(), nullptr, q_dim_, exact_rows_);
        });
        pool_.barrier([&] { x_.swap(branch_), attended_.swap(qkv_); });
    }

    void feed_forward(const Layer& layer, const Rows& of) {
        const int n = of.n, width = model_.ffn_dim;
        const AdaptedMatrices adapted{number(layer), 2, {&AdapterLayer::gate, &AdapterLayer::up}};
        begin_updates(of.updates, adapted, input_.data());
        share_spans(spans(layer.gate), n, [&](int span, int row0, int rows) {
            alignas(64) float gate[ROW_BLOCK * WIDE], up[ROW_BLOCK * WIDE];
            product(layer.gate, span, row0, rows, gate, of.exact);
            product(layer.up, span, row0, rows, up, of.exact);
            add_updates(of.updates, 0, adapted, layer.gate, span, row0, rows, gate);
            add_updates(of.updates, 1, adapted, layer.up, span, row0, rows, up);
            for (int i = 0; i < rows * WIDE; i += W) store(gate + i, activate(load(gate + i), model_.activation) * load(up + i));
            put(gate, rows, std::min(WIDE, width - span * WIDE), ffn_.data() + size_t(row0) * width + span * WIDE, width);
        });
    }

    // x += w input, with the branch's own norm where there is one; then the input of the next branch.
    void add_to_stream(const Weight& w, const Rows& of, const float* input, const AdaptedMatrices& adapted, const float* post_norm, const float* next_norm, bool before_attention) {
        const int n = of.n, dim = model_.dim;
        begin_updates(of.updates, adapted, input);
        share_spans(spans(w), n, [&](int span, int row0, int rows) {
            alignas(64) float out[ROW_BLOCK * WIDE];
            product(w, span, row0, rows, out, of.exact);
            add_updates(of.updates, 0, adapted, w, span, row0, rows, out);
            int columns = std::min(WIDE, dim - span * WIDE);
            float* to = (post_norm ? branch_ : x_).data() + size_t(row0) * dim + span * WIDE;
            (post_norm ? put : add)(out, rows, columns, to, dim);
        });
        rows(n, [&](int t) {
            float* x = x_.data() + size_t(t) * dim;
            if (post_norm) {
                float* y = branch_.data() + size_t(t) * dim;
                rms_norm(y, post_norm, dim, model_.norm_eps, y);
                for (int i = 0; i < dim; i++) x[i] += y[i];
            }
            prepare(t, x_.data(), next_norm, dim, of.exact, before_attention);
        });
    }

    // The final norm of a wanted row, which lies at this place of the stream; branch_ is free to hold them, close together.
    void finish(int r, int place) {
        const int dim = model_.dim;
        float* hidden = branch_.data() + size_t(r) * dim;
        rms_norm(x_.data() + size_t(place) * dim, model_.norm, dim, model_.norm_eps, hidden);
        if (batch_->hidden) std::copy_n(hidden, dim, batch_->hidden + size_t(r) * dim);
        if (model_.head_scale != 1)
            for (int i = 0; i < dim; i++) hidden[i] *= model_.head_scale;
        if (batch_->logits) prepare(r, branch_.data(), nullptr, dim, exact_rows_);
    }

    void head() {
        const int n = batch_->n_rows, width = model_.head.n;
        const AdaptedMatrices adapted{-1, 1, {}};
        begin_updates(head_updates_, adapted, branch_.data());
        share_spans(spans(model_.head), n, [&](int span, int row0, int rows) {
            alignas(64) float out[ROW_BLOCK * WIDE];
            product(model_.head, span, row0, rows, out, exact_rows_);
            add_updates(head_updates_, 0, adapted, model_.head, span, row0, rows, out);
            if (model_.logit_softcap > 0)
                for (int i = 0; i < rows * WIDE; i += W)
                    store(out + i, set1(model_.logit_softcap) * tanh(load(out + i) * set1(1 / model_.logit_softcap)));
            put(out, rows, std::min(WIDE, width - span * WIDE), batch_->logits + size_t(row0) * width + span * WIDE, width);
        });
    }

    const Model model_;
    Pool pool_;
    const Batch* batch_ = nullptr;
    bool dense_ = false, quantized_ = false;
    int q_dim_, kv_dim_, exact_rows_ = 0, splits_ = 1;
    size_t block_bytes_;
    std::vector<float> x_, branch_, qkv_, attended_, ffn_, input_, most_, total_, parts_;
    Codes codes_, rest_;  // of the input, and of what the first leave of it
#ifdef __AMX_BF16__
    std::vector<TileRow> rounded_;
#endif
    std::vector<Piece> pieces_, wanted_;  // of all tokens; of those whose results are wanted, where these are fewer
    std::vector<int> sequence_of_;
    LowRankUpdates updates_, wanted_updates_, head_updates_;  // of the tokens; of those whose results are wanted, and their logits
};
