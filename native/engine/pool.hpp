// The engine's view of a BlockPool: its shape, what a peer may know of it, who uses it.
//
// Invariant: a pool that somebody is closing takes no new transfer, and it is closed only when the last one
// is over: no close() succeeds before.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backends/path.hpp"
#include "base/fd.hpp"
#include "memory/segments.hpp"
#include "memory/shape.hpp"
#include "protocol/terms.hpp"

namespace kvt::engine {

class Pool {
  public:
    /// Shared memory that a pool may lie in: its descriptor, where it is mapped.
    struct Segment {
        Fd fd;
        std::uintptr_t base;
        std::uint64_t nbytes;
    };
    Pool(std::uint64_t id, std::string name, std::shared_ptr<const memory::PoolShape> shape, bool writable,
         std::vector<Segment> segments = {});

    std::uint64_t id() const noexcept { return id_; }
    bool writable() const noexcept { return writable_; }
    const std::shared_ptr<const memory::PoolShape>& shape() const noexcept { return shape_; }
    const protocol::PoolTerms& terms() const noexcept { return terms_; }
    /// For a path; as long as this lives.
    backends::PoolMemory memory() const noexcept { return {shape_, id_, shared_, mapped_}; }
    const std::vector<memory::SharedSegment>& segments() const noexcept { return shared_; }
    /// Whether all of its memory lies in them.
    bool mapped() const noexcept { return mapped_; }

    /// False when the pool is closed, or somebody is closing it.
    bool use();
    void unuse() noexcept;
    std::uint64_t in_use() const;
    /// Refuses new uses from now on and waits; false if it is still used at `until` (monotonic ns): then it
    /// stays open, and takes uses again when the last who is closing it has given up.
    bool close(std::int64_t until);
    /// Whether a close() has succeeded.
    bool closed() const;

    /// While it lives somebody is closing the pool: for who waits by several calls of close().
    class Closing {
      public:
        explicit Closing(Pool& pool);
        ~Closing();
        Closing(const Closing&) = delete;
        Closing& operator=(const Closing&) = delete;

      private:
        Pool& pool_;
    };

  private:
    std::uint64_t id_;
    bool writable_;
    std::shared_ptr<const memory::PoolShape> shape_;
    protocol::PoolTerms terms_;
    std::vector<Segment> segments_;
    std::vector<memory::SharedSegment> shared_;
    bool mapped_ = false;
    mutable std::mutex mutex_;
    std::condition_variable idle_;
    std::uint64_t uses_ = 0;
    unsigned closers_ = 0;
    bool closed_ = false;
};

}  // namespace kvt::engine
