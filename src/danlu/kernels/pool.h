// Threads that run one step together. Between steps they sleep; within a step they meet at barriers many times, where
// a wait is a few microseconds and sleeping would cost more.
#pragma once
#include <immintrin.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

class Pool {
  public:
    explicit Pool(int n_threads) : n_threads_(n_threads) {
        for (int i = 1; i < n_threads; i++) threads_.emplace_back([this] { work(); });
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            closing_ = true;
            job_number_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        for (auto& thread : threads_) thread.join();
    }

    int size() const { return n_threads_; }

    // Runs job on every thread, the caller's included, and returns when all are done.
    void run(const std::function<void()>& job) {
        job_ = &job;
        next_.store(0, std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job_number_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        job();
        barrier();
    }

    // Within a job: the items 0..n-1 go to whichever thread is free. A barrier must follow.
    template <class Item>
    void share(int n, int chunk, const Item& item) {
        for (;;) {
            int start = next_.fetch_add(chunk, std::memory_order_relaxed);
            if (start >= n) return;
            for (int i = start; i < (start + chunk < n ? start + chunk : n); i++) item(i);
        }
    }

    void barrier() {
        barrier([] {});
    }

    // All wait for all; the last to come runs `last` before anyone goes on.
    template <class Last>
    void barrier(const Last& last) {
        int round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == n_threads_) {
            last();
            arrived_.store(0, std::memory_order_relaxed);
            next_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++) {
            if (spins < SPINS) _mm_pause();
            else std::this_thread::yield();  // the other thread has lost its core
        }
    }

  private:
    static constexpr int SPINS = 4000;
    static constexpr auto AWAKE = std::chrono::microseconds(500);  // steps follow each other while there is work

    void work() {
        for (int done = 0;;) {
            const auto since = std::chrono::steady_clock::now();
            while (job_number_.load(std::memory_order_acquire) == done && std::chrono::steady_clock::now() - since < AWAKE)
                for (int i = 0; i < 32; i++) _mm_pause();
            if (job_number_.load(std::memory_order_acquire) == done) {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return job_number_.load(std::memory_order_acquire) != done; });
            }
            done = job_number_.load(std::memory_order_acquire);
            if (closing_) return;
            (*job_)();
            barrier();
        }
    }

    const int n_threads_;
    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_;
    const std::function<void()>* job_ = nullptr;
    bool closing_ = false;
    alignas(64) std::atomic<int> job_number_{0};
    alignas(64) std::atomic<int> next_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> round_{0};
};
