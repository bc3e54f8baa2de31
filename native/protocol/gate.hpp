// Which layers of a pool may be sent: marked one by one, or released as a prefix by a word that anybody may
// store to.
//
// Lives here: the atomics. Does not live here: who is woken by a mark (engine), who polls the word (engine).
// Invariant: a layer, once released, stays so; a gate that failed releases nothing further.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

namespace kvt::protocol {

class Gate {
  public:
    explicit Gate(std::uint32_t num_layers)
        : num_layers_(num_layers), marks_(new std::atomic<bool>[num_layers]()) {}
    virtual ~Gate() = default;

    std::uint32_t num_layers() const noexcept { return num_layers_; }
    /// The word is stored by code that knows nothing of us (a captured CUDA graph, a C extension): read with
    /// acquire, so that what was written before the store is seen after the load.
    bool released(std::uint32_t layer) const noexcept {
        return word()->load(std::memory_order_acquire) > layer ||
               (layer < num_layers_ && marks_[layer].load(std::memory_order_acquire));
    }
    void mark(std::uint32_t layer) noexcept { marks_[layer].store(true, std::memory_order_release); }
    void fail(std::string reason) {
        const std::lock_guard lock(mutex_);
        if (!failed_.load(std::memory_order_relaxed)) {
            reason_ = std::move(reason);
            failed_.store(true, std::memory_order_release);
        }
    }
    bool failed() const noexcept { return failed_.load(std::memory_order_acquire); }
    std::string reason() const {
        const std::lock_guard lock(mutex_);
        return reason_;
    }
    std::atomic<std::uint64_t>* word() noexcept { return &word_; }
    const std::atomic<std::uint64_t>* word() const noexcept { return &word_; }

  private:
    std::uint32_t num_layers_;
    std::unique_ptr<std::atomic<bool>[]> marks_;
    alignas(64) std::atomic<std::uint64_t> word_{0};
    alignas(64) std::atomic<bool> failed_{false};
    mutable std::mutex mutex_;
    std::string reason_;
};

}  // namespace kvt::protocol
