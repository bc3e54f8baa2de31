// One peer: a session, the path that moves its bytes, and the one lock between them.
//
// Lives here: posting, waiting, acting on the session's output (settle), loss. Does not live here: sockets
// (backends), the state machine (protocol), Python (bindings). Invariants: the session is touched only under
// `mutex_`; nothing that blocks, writes a socket or takes a path's lock happens under it; every call that
// changes the session is followed by settle(). Lock order: a path's locks, then the engine's, then mutex_,
// then a handle's.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "backends/path.hpp"
#include "base/fd.hpp"
#include "engine/done_read.hpp"
#include "engine/gate.hpp"
#include "engine/grants.hpp"
#include "engine/handle.hpp"
#include "engine/tally.hpp"
#include "memory/busy.hpp"

namespace kvt::engine {

class Engine;
class ProcessWatch;

/// Posting was refused: the connection is lost, or the pool is closed.
struct NotUsable : std::runtime_error {
    NotUsable(protocol::Cause why, const std::string& what) : std::runtime_error(what), cause(why) {}
    protocol::Cause cause;
};

struct PostArgs {
    protocol::Role role{};
    std::shared_ptr<Pool> pool;
    std::vector<std::shared_ptr<const memory::Ids>> ids;
    std::optional<std::vector<std::uint32_t>> layers;
    memory::Heads heads = memory::Heads::every();
    std::string key, meta;
    bool key_is_text = true;
    std::shared_ptr<protocol::GrantUse> use;  // one-sided; the key is its token as the user has it
    std::shared_ptr<LayerGate> gate;
    protocol::Limits limits;
    std::shared_ptr<Queue> queue;
    std::uint64_t tag = 0;
    std::shared_ptr<const memory::StreamPlan> plan;  // of them, once made
};

class Connection final : public backends::PathHost,
                         public protocol::GrantHost,
                         public std::enable_shared_from_this<Connection> {
  public:
    Connection(Engine& engine, std::string session_id);
    ~Connection() override;

    /// The handshake is over: what was posted meanwhile starts.
    void open(std::shared_ptr<backends::Path> path, const protocol::SessionConfig& config) {
        prepare(std::move(path), config);
        begin();
    }
    /// The two halves of open(), for a path whose other end must be prepared before the first frame. A
    /// connection that has ended meanwhile closes the path.
    void prepare(std::shared_ptr<backends::Path> path, const protocol::SessionConfig& config);
    void begin();
    /// Takes over what was posted on a connection that never opened, and ends that one.
    void adopt(const std::shared_ptr<Connection>& other);
    std::shared_ptr<TransferHandle> post(PostArgs args);
    /// A read that needs nobody is done at once; null: to be posted. Throws as post() does.
    std::shared_ptr<DoneRead> read_now(PostArgs& args);
    std::shared_ptr<MessageHandle> post_message(protocol::Bytes data, std::shared_ptr<TransferHandle> after,
                                                std::shared_ptr<Queue> queue, std::uint64_t tag);
    std::shared_ptr<LeaseHandle> hold(const protocol::Token& token, std::uint32_t wait_ms,
                                      std::shared_ptr<Queue> queue, std::uint64_t tag, bool mapped = false);
    void let_go(const std::shared_ptr<LeaseHandle>& lease);
    bool is_held(const LeaseHandle& lease) const {
        const std::lock_guard lock(mutex_);
        return lease.state == protocol::Hold::State::held;
    }
    /// The grant of the peer's where it shows it to us; null: it doesn't.
    std::shared_ptr<const backends::FoundGrant> shown(const protocol::Token& token);
    void cancel(const std::shared_ptr<TransferHandle>& handle);
    void refuse(const protocol::Token& token, const std::string& reason, protocol::Time remember_ns);
    void refuse(const std::string& key, const std::string& reason, protocol::Time remember_ns);
    /// Waits until done; false at `until` or when a signal handler ran. Drives the connection while it waits.
    bool wait(Handle& handle, std::int64_t until);
    /// Waits until the layer (by the pool's index) has landed or the transfer is over. `waiting`: time, a
    /// signal handler, or the transfer is another connection's now.
    enum class LayerState { landed, over, waiting, unknown };
    LayerState wait_layer(const std::shared_ptr<TransferHandle>& handle, std::uint32_t layer,
                          std::int64_t until);
    void close(protocol::Cause cause, const std::string& reason, bool tell);
    /// From here on the end of the peer's process, on this host, is the end of the connection.
    void watch_process(int pid);
    void forget_pool(std::uint64_t pool_id);
    void messages_taken(std::uint64_t nbytes);

    // The reactor's: deadlines, heartbeats, gates.
    protocol::Time on_tick(protocol::Time now, bool heartbeat, bool resumed);
    bool poll_gates();
    bool gates_wait() const;
    /// A gate has failed: ends what waits for it, matched or not.
    void fail_gates();

    // PathHost
    void settle() override { settle(0); }
    bool take_control(protocol::Bytes& out) override;
    void receive(const protocol::Header& header, std::span<const std::byte> body) override;
    void receive_inline(const protocol::Header& header, std::span<const std::byte> payload,
                        const protocol::Trailer& trailer) override;
    std::optional<protocol::ChunkJob> next_chunk() override;
    std::optional<protocol::ChunkTarget> next_copy() override;
    bool has_payload() override;
    bool has_copies() override;
    void heard() noexcept override;
    /// For how long nothing has come from the peer.
    protocol::Time silent_ns() const noexcept;
    void spoke() noexcept override;
    void lose(protocol::Cause cause, const std::string& reason) override { close(cause, reason, false); }
    void lane_broke(const std::string& reason) override;
    void can_copy(bool can) override;
    /// Until memory is shared with the peer, isn't going to be, or `until`.
    void wait_channel(std::int64_t until);
    void copy_broke(const protocol::ChunkTarget& target) override;
    bool is_lost() const noexcept override { return lost_.load(std::memory_order_acquire); }
    bool enter() noexcept override;
    void leave() noexcept override;
    // LaneHost
    protocol::ChunkTarget chunk_begin(const protocol::Header& header) override;
    void chunk_end(const protocol::ChunkTarget& target, const protocol::Trailer& trailer,
                   bool verified) override;
    void chunk_left(const protocol::ChunkJob& job, bool whole, bool begun) override;

    /// Shows the grant to the peer, who then reads without asking; nothing where it can't, or mayn't.
    void show(const GrantHandlePtr& grant);

    // For Grants: what follows from the end of a grant of ours, or its beginning.
    void grant_came(const protocol::Token& token);
    void hold_ended(const protocol::Token& token);
    /// Returns when no byte of it is stored any more.
    void stop_served(const std::shared_ptr<TransferHandle>& transfer);
    // GrantHost
    Service serve_read(const protocol::ReadBody& read, const protocol::PoolTerms& theirs) override;
    Service serve_write(const protocol::WriteBody& write, const protocol::PoolTerms& theirs) override;
    Holding hold(const protocol::Token& token, bool mapped) override;
    void release(const protocol::Token& token, const Holding& holding, bool mapped) override;
    void took(const protocol::TookBody& what) override;
    bool await(const protocol::Token& token) override;
    void await_no_more(const protocol::Token& token) override;

    protocol::TransferPtr lend(std::uint64_t want) override;
    void returned(const protocol::TransferPtr& transfer) override;
    void wait_inactive(const protocol::TransferPtr& transfer) override;

    /// The session's question, under its lock.
    std::optional<protocol::Bytes> locate(TransferHandle& source);

    std::string session_id() const {
        const std::lock_guard lock(mutex_);
        return session_id_;
    }
    /// Once, by Engine::rename, before open().
    void set_session_id(std::string id) {
        const std::lock_guard lock(mutex_);
        session_id_ = std::move(id);
    }
    Engine& engine() noexcept { return engine_; }
    /// In a child of fork(): the locks may be held for ever, and the descriptors' numbers are others'.
    bool forked() const noexcept { return generation_ != fork_generation(); }
    std::shared_ptr<backends::Path> path() const;
    std::string backend() const;
    /// The peer's incarnation: by that it is let in to grants. Once, before open().
    void set_reader(std::string incarnation) {
        const std::lock_guard lock(mutex_);
        reader_ = std::move(incarnation);
        session_.set_grants(this);
    }
    std::string reader() const {
        const std::lock_guard lock(mutex_);
        return reader_;
    }
    /// Who the peer is, for errors.
    void set_label(std::string label) {
        const std::lock_guard lock(mutex_);
        label_ = std::move(label);
    }
    std::string label() const {
        const std::lock_guard lock(mutex_);
        return label_;
    }
    bool is_open() const noexcept { return open_.load(std::memory_order_acquire); }
    protocol::Cause lost_cause() const;
    std::string lost_reason() const;
    protocol::Session::Counters counters() const;
    const Tally& tally() const noexcept { return tally_; }
    std::size_t unfinished() const;
    std::string state_of(const TransferHandle& handle) const;
    /// Bytes landed (of a source: written) and bytes in all.
    std::pair<std::uint64_t, std::uint64_t> progress_of(const TransferHandle& handle) const;

  private:
    /// What the session wants done, taken at one moment.
    struct Output {
        std::vector<protocol::TransferPtr> quiescing, finished;
        std::vector<protocol::MessagePtr> messages;
        std::vector<protocol::HoldPtr> holds;
        std::shared_ptr<backends::Path> path;
        bool control = false, payload = false, gated = false, inbox = false;
        protocol::Time deadline = protocol::kNever;
    };
    Output take_output();
    std::string way_of(const TransferHandle& handle) const;
    std::shared_ptr<TransferHandle> make_handle(PostArgs& args);
    std::shared_ptr<Connection> heir() const;
    /// Does `work` under the lock, unless there is an heir whose it is; returns that.
    template <class Work>
    std::shared_ptr<Connection> unless_inherited(Work&& work) {
        const std::lock_guard lock(mutex_);
        if (!heir_) {
            std::forward<Work>(work)();
        }
        return heir_;
    }
    std::shared_ptr<Connection> place(const std::shared_ptr<LeaseHandle>& lease);
    /// Hands a post to the session, or to the heir's; returns whose.
    std::shared_ptr<Connection> place(const std::shared_ptr<TransferHandle>& handle, std::uint64_t pool_id);
    void show(const GrantHandlePtr& grant, const std::shared_ptr<backends::Path>& way,
              const std::string& reader);
    const memory::StreamPlan& plan(PostArgs& args);
    std::optional<memory::StreamPlan> plan_now(const backends::FoundGrant& grant, const PostArgs& args);
    std::shared_ptr<DoneRead> copy_now(const backends::FoundGrant& grant, PostArgs& args,
                                       const char* backend);
    void settle(std::uint64_t small_nbytes);
    bool settle_once(std::uint64_t small_nbytes);
    void put_inline();
    bool lane_grace_over(protocol::Time now);
    void unwatch_process();
    void deliver_messages();
    void complete(const protocol::TransferPtr& transfer);
    void complete(const protocol::MessagePtr& message, bool counted = true);
    static void complete(const protocol::HoldPtr& hold);
    Service plan_service(const GrantHandlePtr& grant, const protocol::GrantUse& use,
                         const protocol::Terms& terms, const protocol::PoolTerms& theirs,
                         protocol::Role role);
    void count(Operation operation, const Result& result);
    void take_over_rest(Connection& other, protocol::Time now);
    bool take_over(TransferHandle& handle, const protocol::TransferPtr& transfer, protocol::Time now);
    void attach_gate(TransferHandle& handle);
    void claim(const std::shared_ptr<TransferHandle>& handle);
    void defer(const std::shared_ptr<MessageHandle>& message);
    bool undefer(const std::shared_ptr<MessageHandle>& message);
    void release_message(const std::shared_ptr<MessageHandle>& message,
                         const std::shared_ptr<TransferHandle>& after);

    Engine& engine_;
    const std::uint64_t generation_ = fork_generation();
    std::string session_id_;
    Tally tally_;
    std::atomic<Tally*> control_tally_;  // the engine's, of the backend by which messages go
    std::atomic<Tally*> copies_tally_;   // and of that by which this side copies
    mutable std::mutex mutex_;
    std::condition_variable inactive_;
    protocol::Session session_;
    bool could_copy_ = false;    // memory was shared until now
    std::mutex delivery_mutex_;  // before mutex_
    protocol::DigestKind digest_ = protocol::DigestKind::none;
    std::shared_ptr<backends::Path> path_;  // null before open() and after close()
    std::shared_ptr<ProcessWatch> watch_;   // as path_
    std::string backend_ = "none", backend_of_copies_ = "none", label_, reader_;
    std::atomic<bool> open_{false}, lost_{false};
    std::atomic<protocol::Time> heard_at_, spoke_at_;
    protocol::Time dead_after_;
    protocol::Time lane_broken_until_ = protocol::kNever;
    std::string lane_broken_reason_;
    protocol::Cause lost_cause_ = protocol::Cause::ok;
    std::string lost_reason_;
    bool ending_ = false;  // a close has begun; `lost_` follows once its goodbye is on its way
    struct {
        std::uint64_t pool = 0;                           // of ours
        std::shared_ptr<const protocol::PoolTerms> with;  // the peer's
        std::vector<std::uint32_t> layers;
    } paired_;  // that agree, all layers of ours in their order with these of the peer's
    std::vector<std::shared_ptr<MessageHandle>> dependents_;  // messages that wait for a transfer
    std::shared_ptr<Connection> heir_;                        // has adopted what was posted here
};

}  // namespace kvt::engine
