// What adapters add to products: y += B A x, for the rows of sequences that have one. A product takes two parts: A x
// of all rows, shared over the threads, and behind a barrier B times that, which is added where W x is made. All in
// fp32, by the kernel of dense.h: a row's sums are in the same order whatever rows are beside it.
#pragma once
#include <algorithm>
#include <array>
#include <vector>

#include "abi.h"
#include "dense.h"

// The matrices that take one input, three at most (q, k and v): those of a layer, or the head.
struct AdaptedMatrices {
    int layer, n;  // layer -1: the head
    std::array<LowRank AdapterLayer::*, 3> which;

    const LowRank& of(const Adapter& adapter, int matrix) const {
        return layer < 0 ? adapter.head : adapter.layers[layer].*which[matrix];
    }
};

// What computes is never inlined: the loops of a step are compiled as if there were no adapters, which most steps have not.
class LowRankUpdates {
  public:
    // Rows of one adapter that follow each other, ordered by adapter: its tiles are used again while they are near.
    // `adapter_of(row)`: null for none.
    template <class AdapterOf>
    void plan(int n_rows, const AdapterOf& adapter_of) {
        runs_.clear();
        width_ = 0;
        for (int row = 0; row < n_rows; row++) {
            const Adapter* adapter = adapter_of(row);
            if (!adapter) continue;
            bool goes_on = !runs_.empty() && runs_.back().adapter == adapter && runs_.back().end == row;
            if (goes_on && row - runs_.back().begin < LONGEST) runs_.back().end++;
            else runs_.push_back({adapter, row, row + 1});
            width_ = std::max(width_, (adapter->rank + TILE - 1) / TILE * TILE);
        }
        std::stable_sort(runs_.begin(), runs_.end(), [](const Run& a, const Run& b) { return a.adapter < b.adapter; });
        n_rows_ = n_rows;
        const size_t most = std::tuple_size_v<decltype(AdaptedMatrices::which)> * n_rows * width_;
        if (low_.size() < most) low_.resize(most);
    }

    bool any() const { return !runs_.empty(); }

    // Parts of A x to share: a tile of its columns, for a run of rows and one of the matrices.
    int items(const AdaptedMatrices& matrices) const { return int(runs_.size()) * matrices.n * (width_ / TILE); }

    // x: (rows, k).
    __attribute__((noinline)) void down(int item, const AdaptedMatrices& matrices, const float* x) {
        const int n_tiles = width_ / TILE, tile = item % n_tiles, matrix = item / n_tiles % matrices.n;
        const Run& run = runs_[item / n_tiles / matrices.n];
        const Weight& a = matrices.of(*run.adapter, matrix).a;
        if (!a.data || tile * TILE >= a.n) return;
        by_16(x + size_t(run.begin) * a.k, a.k, run.end - run.begin, tile_of(a, tile), TILE, a.k,
              low(matrix, run.begin) + tile * TILE, width_, false);
    }

    // Adds to rows row0.. of outputs 16 * first .. 16 * end, `ld` apart.
    __attribute__((noinline)) void up(int matrix, const AdaptedMatrices& matrices, int first, int end, int row0, int rows, float* out, int ld) {
        for (const Run& run : runs_) {
            const int from = std::max(run.begin, row0), to = std::min(run.end, row0 + rows);
            if (from >= to) continue;
            const Weight& b = matrices.of(*run.adapter, matrix).b;
            if (!b.data) continue;
            for (int tile = first; tile < end; tile++)
                by_16(low(matrix, from), width_, to - from, tile_of(b, tile), TILE, b.k,
                      out + size_t(from - row0) * ld + (tile - first) * TILE, ld, true);
        }
    }

  private:
    static constexpr int LONGEST = 48;  // rows of a run: a prompt is shared by the threads

    struct Run {
        const Adapter* adapter;
        int begin, end;
    };

    static const float* tile_of(const Weight& w, int tile) { return (const float*)w.data + size_t(tile) * TILE * w.k; }
    float* low(int matrix, int row) { return low_.data() + (size_t(matrix) * n_rows_ + row) * width_; }

    std::vector<Run> runs_;
    std::vector<float> low_;  // (matrix, row, width): A x
    int width_ = 0, n_rows_ = 0;
};
