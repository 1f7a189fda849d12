// Threads that share the chunks of a loop.
//
// Not OpenMP: at the end of its loops everybody waits for everybody. When another process holds one of the
// cores, that is a time slice per loop, and there are hundreds of loops in a step. Here whoever runs takes
// chunks, and the caller waits only for chunks that somebody has begun; a helper that sleeps or is not
// scheduled holds up nothing. Helpers look out for work for a moment, then sleep.
#pragma once

#include <atomic>
#include <csignal>
#include <cstdint>
#include <thread>
#include <vector>

class Pool {
public:
    // One caller at a time. threads: the caller included; helpers beyond it stay asleep.
    void set_threads(int threads) {
        for (; helpers_ + 1 < threads; helpers_++) start();
        threads_ = threads;
    }

    int threads() const { return threads_; }

    // Call f(i) for every i below n, in any order, on any thread.
    template <class F> void run(int n, const F& f) {
        if (threads_ == 1 || n <= 1) {
            for (int i = 0; i < n; i++) f(i);
            return;
        }
        call_.store([](const void* f, int i) { (*static_cast<const F*>(f))(i); }, std::memory_order_relaxed);
        body_.store(&f, std::memory_order_relaxed);
        count_.store(n, std::memory_order_relaxed);
        done_.store(0, std::memory_order_relaxed);
        const uint32_t job = job_.load(std::memory_order_relaxed) + 1;
        ticket_.store(static_cast<uint64_t>(job) << 32, std::memory_order_release);
        job_.store(job, std::memory_order_release);
        job_.notify_all();  // a system call only if somebody sleeps
        help(job);
        for (int spins = 0; done_.load(std::memory_order_acquire) < n; spins++) {
            if (spins < SPINS) pause();
            else std::this_thread::yield();
        }
    }

private:
    static constexpr int SPINS = 4000;  // some 50 us

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }

    void start() {
        sigset_t all, before;  // signals are for the thread that knows what to do about them
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        std::thread([this, number = helpers_ + 1] { serve(number); }).detach();
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    void serve(int number) {
        for (uint32_t seen = 0;;) {
            uint32_t job = job_.load(std::memory_order_acquire);
            for (int spins = 0; job == seen && spins < SPINS; spins++) {
                pause();
                job = job_.load(std::memory_order_acquire);
            }
            if (job == seen) {
                job_.wait(seen, std::memory_order_acquire);
                continue;
            }
            seen = job;
            if (number < threads_) help(job);
        }
    }

    // Take chunks of `job` until none is left. The ticket is (job, next chunk): taking one succeeds only while
    // that job is under way, and then what was read of it before is still what it was.
    void help(uint32_t job) {
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        while (ticket >> 32 == job) {
            const auto call = call_.load(std::memory_order_relaxed);
            const void* body = body_.load(std::memory_order_relaxed);
            const int chunk = static_cast<int>(ticket & 0xffffffff);
            if (chunk >= count_.load(std::memory_order_relaxed)) return;
            if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
            call(body, chunk);
            done_.fetch_add(1, std::memory_order_acq_rel);
            ticket = ticket_.load(std::memory_order_acquire);
        }
    }

    std::atomic<int> threads_{1};
    int helpers_ = 0;
    std::atomic<uint32_t> job_{0};
    std::atomic<uint64_t> ticket_{0};
    std::atomic<void (*)(const void*, int)> call_{nullptr};
    std::atomic<const void*> body_{nullptr};
    std::atomic<int> count_{0}, done_{0};
};

// Never destroyed: helpers may still look at it while the process ends.
inline Pool& pool = *new Pool;

// Room for n elements: a vector that is made smaller and larger again is filled with zeros each time.
template <class T> T* grow(std::vector<T>& room, int64_t n) {
    if (static_cast<int64_t>(room.size()) < n) room.resize(n);
    return room.data();
}

// Call f(begin, end) for parts of [0, n) of at least `least`; one call if there is no more than that.
template <class F> void share(int64_t n, int64_t least, const F& f) {
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(n / std::max<int64_t>(1, least), pool.threads() * 4));
    pool.run(static_cast<int>(parts), [&](int i) { f(n * i / parts, n * (i + 1) / parts); });
}
