// One per Endpoint: the threads, the connections, the claims on destination bytes, the events for Python.
//
// Lives here: what connections share. Does not live here: one peer's session (connection.hpp), strangers
// (admission.hpp), the handshake (Python). Invariant: after close() no thread of the engine runs, every
// handle is done, every descriptor closed; in a forked child nothing of it is touched.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "backends/mover.hpp"
#include "base/event_loop.hpp"
#include "engine/connection.hpp"
#include "memory/busy.hpp"

namespace kvt::engine {

class Admission;

struct Options {
    std::string incarnation;
    unsigned movers = 2;
    std::vector<int> cpus;
    protocol::Time dead_after_ns = 2'000'000'000;
    protocol::Time ping_every_ns = 250'000'000;
    protocol::Time handshake_timeout_ns = 3'000'000'000;
    std::uint32_t max_pending = 64;
    std::uint64_t max_transfer_pieces = 16u << 20;
    std::uint64_t max_protocol_nbytes = 256u << 20;
    protocol::SessionConfig session;  // what every session begins with: the limits of Config
};

/// What Python's thread should hear of.
struct Event {
    enum class Kind { accepted, lost, log, dropped, channel } kind{};
    std::uint64_t listener = 0;
    std::uint64_t count = 0;              // dropped: messages of a lost session that nobody takes any more
    int fd = -1;                          // accepted: the receiver owns it
    std::string preamble;                 // accepted
    std::string session_id, cause, text;  // channel: cause is "up", "broke" or "refused", text says why
    int level = 0;
};

class Engine {
  public:
    explicit Engine(Options options);
    ~Engine();

    const Options& options() const noexcept { return options_; }
    EventLoop& reactor() noexcept { return *reactor_; }
    backends::Mover& mover(std::size_t i) noexcept { return *movers_[i % movers_.size()]; }
    std::vector<backends::Mover*> movers() noexcept;
    Admission& admission() noexcept { return *admission_; }
    std::vector<std::shared_ptr<Connection>> all_connections();
    /// Those to this peer, by its incarnation.
    std::vector<std::shared_ptr<Connection>> connections_to(const std::string& reader);
    Grants& grants() noexcept { return *grants_; }
    bool forked() const noexcept;
    bool closed() const noexcept { return closed_.load(std::memory_order_acquire); }
    /// Ends every connection (pending transfers: ConnectionClosed), joins the threads, closes the
    /// descriptors. Idempotent.
    void close();

    /// `session_id` may be a placeholder until rename(). Throws NotUsable when closed.
    std::shared_ptr<Connection> new_connection(std::string session_id);
    void rename(const std::shared_ptr<Connection>& connection, const std::string& session_id);
    std::shared_ptr<Connection> find(const std::string& session_id);
    void forget(const Connection& connection);
    std::shared_ptr<Pool> new_pool(std::string name, std::shared_ptr<const memory::PoolShape> shape,
                                   bool writable, std::vector<Pool::Segment> segments = {});
    bool close_pool(const std::shared_ptr<Pool>& pool, std::int64_t until);

    // For connections.
    void claim(TransferHandle& handle);
    void release(TransferHandle& handle) noexcept;
    /// Does `work` while the plan's bytes are claimed; throws as claim() does. `key` names who has them.
    void while_claimed(const std::string& key, const std::shared_ptr<const memory::StreamPlan>& plan,
                       const std::function<void()>& work);
    void need_by(protocol::Time deadline, const std::shared_ptr<Connection>& gated);
    void lost(const std::shared_ptr<Connection>& connection, protocol::Cause cause,
              const std::string& reason);
    void deliver(const std::shared_ptr<Connection>& from, std::vector<protocol::Bytes> messages);
    /// What became of all operations over a backend ("none": of posts that never saw a session). It stays
    /// where it is as long as the engine.
    Tally& tally(const std::string& backend);
    /// Between the two close() doesn't return.
    void visitor_comes() noexcept;
    void visitor_leaves() noexcept;

    // For Python.
    int event_fd();
    std::deque<Event> poll_events();
    void post_event(Event event);
    /// Connections that were accepted and that Python hasn't taken yet.
    std::size_t handed_over();
    bool drop_oldest_handed_over();
    void log(int level, std::string text);
    struct Delivered {
        std::string session_id;
        protocol::Bytes data;
    };
    std::vector<Delivered> recv_messages(std::int64_t until);
    std::map<std::string, Tally::Cells> tallies();

    /// The reactor's turn; returns when it wants the next.
    protocol::Time turn();

  private:
    std::uint64_t claim(const std::string& key, std::shared_ptr<const memory::StreamPlan> plan);
    void release(std::uint64_t claim) noexcept;
    [[noreturn]] void refuse(const memory::BusyTable::Conflict& conflict);
    void stop_threads();
    void wait_for_visitors();
    protocol::Time tick_all(protocol::Time now, bool heartbeat, bool resumed);
    protocol::Time poll_gated(protocol::Time now);
    using Waiting = std::pair<std::shared_ptr<Connection>, protocol::Bytes>;
    std::uint64_t waiting_nbytes() const noexcept;
    std::vector<Waiting> drop_of_lost();

    Options options_;
    std::uint64_t generation_;
    std::atomic<bool> closed_{false};
    std::unique_ptr<EventLoop> reactor_;
    std::vector<std::unique_ptr<backends::Mover>> movers_;
    std::unique_ptr<Admission> admission_;
    std::shared_ptr<Grants> grants_ = std::make_shared<Grants>(*this);

    std::mutex mutex_;  // connections, pools
    std::unordered_map<std::string, std::shared_ptr<Connection>> connections_;
    std::unordered_map<const Connection*, std::weak_ptr<Connection>> gated_;
    std::uint64_t next_pool_ = 1, next_claim_ = 1;

    memory::BusyTable busy_;
    std::mutex claims_mutex_;
    std::unordered_map<std::uint64_t, const std::string*> claimants_;  // their keys, until release()

    std::atomic<protocol::Time> next_deadline_{protocol::kNever}, planned_{0};
    protocol::Time next_heartbeat_ = 0, next_gate_poll_ = 0;

    std::mutex tallies_mutex_;
    std::map<std::string, Tally> tallies_;

    std::mutex visits_mutex_;
    std::condition_variable visits_over_;
    unsigned visits_ = 0;

    std::mutex events_mutex_;
    Fd events_;
    std::deque<Event> pending_events_;
    std::size_t handed_over_ = 0;  // of them

    std::mutex messages_mutex_;
    std::shared_ptr<Fd> messages_event_;  // null when closed
    std::deque<Waiting> messages_;
    std::uint64_t messages_nbytes_ = 0, drop_at_;                   // charges; when to look for what can go
    std::unordered_map<const Connection*, std::uint64_t> senders_;  // how many of each
};

}  // namespace kvt::engine
