// Threads that run one step together. Between steps they sleep; within a step they meet at barriers many times, where
// a wait is a few microseconds and sleeping would cost more.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

class Pool {
  public:
    explicit Pool(int n_threads) : n_threads_(n_threads), parts_(new Part[n_threads]) {
        for (int i = 1; i < n_threads; i++) threads_.emplace_back([this, i] { work(i); });
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
        begin_parts();
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job_number_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        job();
        barrier();
    }

    // Within a job: the items 0..n-1, a part of them for each thread and a chunk at a time. Items that follow each other
    // are neighbours in memory, which is fetched ahead. Who is done goes on with what others have not begun. A barrier
    // must follow.
    template <class Item>
    void share(int n, int chunk, const Item& item) {
        for (int i = 0; i < n_threads_; i++) {
            const int owner = (self() + i) % n_threads_;
            std::atomic<int>& next = parts_[owner].next;
            const int begin = int(int64_t(n) * owner / n_threads_), end = int(int64_t(n) * (owner + 1) / n_threads_);
            while (next.load(std::memory_order_relaxed) < end - begin) {
                const int from = begin + next.fetch_add(chunk, std::memory_order_relaxed);
                for (int item_number = from; item_number < std::min(from + chunk, end); item_number++) item(item_number);
            }
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
            begin_parts();
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

    struct alignas(64) Part {
        std::atomic<int> next{0};
    };

    // The calling thread's number; 0 where it is none of the pool's.
    static int& self() {
        static thread_local int number = 0;
        return number;
    }

    void begin_parts() {
        for (int i = 0; i < n_threads_; i++) parts_[i].next.store(0, std::memory_order_relaxed);
    }

    void work(int number) {
        self() = number;
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
    std::unique_ptr<Part[]> parts_;
    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_;
    const std::function<void()>* job_ = nullptr;
    bool closing_ = false;
    alignas(64) std::atomic<int> job_number_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> round_{0};
};
