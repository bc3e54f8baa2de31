// What a post returns: the engine's record of a transfer or a message, and the snapshot that its result is
// read from.
//
// Invariant: `result` is written once, before done() turns true, and never after.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine/completion.hpp"
#include "engine/pool.hpp"
#include "memory/plan.hpp"
#include "protocol/session.hpp"

namespace kvt::engine {

class Connection;
class GrantHandle;
class LayerGate;

struct Result {
    protocol::Outcome outcome;
    std::uint64_t nbytes = 0, blocks = 0, chunks = 0, resumed_nbytes = 0;
    std::int64_t seconds_ns = 0, wire_ns = 0, queued_ns = 0;
    std::string meta, backend;
    std::vector<memory::BlockOutcome> block_outcomes;  // destinations that failed
    std::vector<memory::GroupBlocks> corrupt;          // blocks whose digest failed
};

class TransferHandle final : public protocol::Transfer, public Handle {
  public:
    TransferHandle(std::shared_ptr<Connection> connection, std::shared_ptr<Pool> pool,
                   std::shared_ptr<const memory::StreamPlan> plan);
    ~TransferHandle() override;

    std::uint64_t runs(std::uint64_t begin, std::uint64_t end, iovec* out, std::size_t most,
                       std::size_t& count) const override;
    void reorder(const std::vector<std::uint32_t>& positions) override;
    std::optional<protocol::Bytes> locate() override;
    /// Contiguous runs of memory that the whole stream is; walks them all.
    std::uint64_t merged_runs() const { return memory::count_runs(*plan_); }

    std::shared_ptr<Connection> connection() const {
        const std::lock_guard lock(connection_mutex_);
        return connection_;
    }
    /// Another connection has taken the post over.
    void move_to(std::shared_ptr<Connection> connection) {
        const std::lock_guard lock(connection_mutex_);
        connection_ = std::move(connection);
    }
    const std::shared_ptr<Pool>& block_pool() const noexcept { return block_pool_; }
    const memory::StreamPlan& plan() const noexcept { return *plan_; }
    const std::shared_ptr<const memory::StreamPlan>& shared_plan() const noexcept { return plan_; }
    /// Under the session's lock, when the machine has finished it.
    void snapshot(const std::string& backend);
    /// Under the session's lock: tells those who wait for a layer that something has landed.
    void signal_progress() noexcept;

    Result result;
    bool key_is_text = true;                // the user's key was a str
    std::uint64_t claim_id = 0;             // in the engine's table of busy destination bytes; 0: none
    std::vector<Sink*> layer_waiters;       // under the lock of the session whose it is
    std::shared_ptr<GrantHandle> grant;     // of ours, by which the peer is served
    std::shared_ptr<LayerGate> layer_gate;  // `gate`, to be attached where the post is made

  private:
    mutable std::mutex connection_mutex_;
    std::shared_ptr<Connection> connection_;
    std::shared_ptr<Pool> block_pool_;
    std::shared_ptr<const memory::StreamPlan> plan_;
};

/// A lease on a peer's grant.
class LeaseHandle final : public protocol::Hold, public Handle {
  public:
    explicit LeaseHandle(std::shared_ptr<Connection> connection) : connection_(std::move(connection)) {}
    std::shared_ptr<Connection> connection() const {
        const std::lock_guard lock(connection_mutex_);
        return connection_;
    }
    void move_to(std::shared_ptr<Connection> connection) {
        const std::lock_guard lock(connection_mutex_);
        connection_ = std::move(connection);
    }
    void answered() noexcept override { answer.complete(); }
    Result result;
    Handle answer;  // done when it is held, or known not to be

  private:
    mutable std::mutex connection_mutex_;
    std::shared_ptr<Connection> connection_;
};

class MessageHandle final : public protocol::Message, public Handle {
  public:
    explicit MessageHandle(std::shared_ptr<Connection> connection) : connection_(std::move(connection)) {}
    const std::shared_ptr<Connection>& connection() const noexcept { return connection_; }
    Result result;
    std::uint64_t nbytes = 0;               // the machine lets the data go when it is sent
    std::shared_ptr<TransferHandle> after;  // the transfer whose error is ours, if it failed

  private:
    std::shared_ptr<Connection> connection_;
};

}  // namespace kvt::engine
