// Two endpoints in one process: the smallest complete memory backend.
//
// Control frames are handed over as bytes and parsed like a stranger's; payload is one copy from block to
// block, made by the destination's movers. It shows what the seam asks of a backend whose destination copies.
// Invariant: while a copy runs, the source's record is lent, and quiesce() waits for it: a chunk's time.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "backends/mover.hpp"
#include "backends/path.hpp"

namespace kvt::backends {

class InprocPath final : public Path, public std::enable_shared_from_this<InprocPath> {
  public:
    InprocPath(const std::shared_ptr<PathHost>& host, std::vector<Mover*> movers,
               protocol::DigestKind digest);
    ~InprocPath() override;

    /// Each becomes the other's peer. Before open().
    static void join(InprocPath& a, const std::shared_ptr<PathHost>& host_a, InprocPath& b,
                     const std::shared_ptr<PathHost>& host_b);

    const char* name() const noexcept override { return "inproc"; }
    std::optional<Located> locate(const SourceMemory&) override {
        return Located();  // it is found by its WANT
    }
    void flush_control() override;
    void kick(std::uint64_t small_nbytes) override;
    void quiesce(const protocol::TransferPtr& transfer) override { host_.wait_inactive(transfer); }
    bool drive(const StopCondition&, int, std::int64_t) override { return false; }
    void read_last_words() override {}
    void close() override;

  private:
    class Copier;
    static void deliver(PathHost& to, std::span<const std::byte> bytes);

    PathHost& host_;
    std::weak_ptr<PathHost> peer_;
    std::vector<Mover*> movers_;
    std::vector<std::shared_ptr<Copier>> copiers_;
    std::atomic<bool> again_{false}, busy_{false}, closed_{false};
};

}  // namespace kvt::backends
