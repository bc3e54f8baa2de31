// Shared memory with one peer: the channel, the boards, the peer's pools, and copying from them.
//
// Theory of operation. Each side sends its board and, before the first transfer that needs it, a pool: its
// segments and then its shape (in a sealed memfd of its own, since messages are short). A location that comes
// by the session's control stream may overtake none of these: they were in the socket before it was said, so
// that whoever finds something missing reads the channel first. A source's bytes are the destination's to
// copy while a guard of the source's board holds; what was copied is good if it still held afterwards.
//
// Lives here: both roles. Does not live here: which transfer is next (the session), threads. Invariants: what
// is found in a peer's memory decides nothing that wasn't checked; a copy is good only if its guard held
// after its last byte was read; close() ends every guard.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "backends/path.hpp"
#include "backends/shm_board.hpp"
#include "backends/shm_channel.hpp"
#include "backends/shm_copy.hpp"
#include "backends/shm_pool.hpp"
#include "base/event_loop.hpp"

namespace kvt::backends {

class ShmLink final : public Pollable, public std::enable_shared_from_this<ShmLink> {
  public:
    /// Takes a channel that has joined. Throws protocol::Violation (another user's process),
    /// std::system_error (no room for the board, or its process has gone).
    ShmLink(std::weak_ptr<PathHost> host, EventLoop& reactor, Fd channel);
    ~ShmLink() override;

    void start();
    void on_events(std::uint32_t events) override;
    void failed(const std::exception& why) override;
    void close();

    /// The peer's board is here, so that its memory can be copied.
    bool up() const noexcept { return up_.load(std::memory_order_acquire); }
    /// It broke, or its path is closed: it won't come up again.
    bool closed() const noexcept { return closed_.load(); }
    /// Whether the peer can read memory of ours that isn't shared; known soon after up().
    bool peer_reads_us() const noexcept { return peer_reads_us_.load(std::memory_order_acquire); }
    std::string why_not() const;

    /// What was read of the channel may concern the session: nobody who holds a lock, or is in a copy, may
    /// tell it. Call this afterwards.
    void act();

    // As a source.
    std::optional<Located> locate(const SourceMemory& source);
    void forget_pool(std::uint64_t pool);
    std::shared_ptr<Publication> publication();
    /// Reads what the peer has put into the channel, without waiting for the reactor to come to it.
    void catch_up();

    // As a destination. Any number of threads at once.
    Copied copy(protocol::Transfer& to, protocol::Range range);
    std::shared_ptr<const FoundGrant> find_grant(const protocol::Token& token);

  private:
    class Borrowed;
    class Found;
    class Published;
    class Telling;
    struct FoundHere;

    void read_channel();
    void take(ShmReader::Received received);
    void take_board(ShmReader::Received received);
    void take_pool(ShmReader::Received received);
    void drop_pool(std::uint64_t id);
    void answer_probe(const ShmMessage& probe);
    void judge_probe(const ShmMessage& probed);
    bool announce(const PoolMemory& pool);
    bool send(const ShmMessage& message, Fd fd = Fd());
    bool send_file(ShmType type, std::uint64_t id, const protocol::Bytes& content);
    bool flush();
    std::shared_ptr<Found> find(protocol::Transfer& to);
    std::shared_ptr<const ShmPool> peer_pool(std::uint64_t id);
    Copied judge(std::error_code error) const noexcept;
    void end(Guard guard) noexcept;
    std::optional<GrantPlace> publish(const OpenGrant& grant);
    void end(GrantPlace place) noexcept;
    std::shared_ptr<const FoundHere> find_on_board(const protocol::Token& token);
    void keep(const protocol::Token& token, std::shared_ptr<const FoundHere> grant);
    void forget_found(const ShmPool* pool);
    Copied copy_granted(const FoundHere& grant, const memory::StreamPlan& from,
                        const memory::StreamPlan& to) const;

    std::weak_ptr<PathHost> host_;
    EventLoop& reactor_;
    Fd channel_;
    PeerProcess process_;
    std::atomic<bool> up_{false}, peer_reads_us_{false}, closed_{false};
    const std::array<std::byte, 16> nonce_;

    struct News {
        bool came_up = false, broke = false;
        std::optional<protocol::Cause> ends;  // the session
        std::string why;
    };
    std::mutex rx_mutex_;
    ShmReader reader_;
    News news_;

    std::mutex tx_mutex_;
    ShmWriter writer_;
    std::set<std::uint64_t> told_segments_, told_pools_;
    std::map<std::uint64_t, std::vector<std::uint64_t>> segments_of_;  // of a told pool

    std::mutex board_mutex_;
    OwnBoard board_;

    mutable std::mutex peer_mutex_;
    std::optional<PeerBoard> peer_board_;  // set once
    PeerSegments peer_segments_;
    std::map<std::uint64_t, std::shared_ptr<const ShmPool>> peer_pools_;
    std::uint64_t kept_nbytes_ = 0;  // by all of them
    std::map<protocol::Token, std::shared_ptr<const FoundHere>> found_;
    std::size_t found_ids_ = 0;  // block ids of all of them
    std::string why_not_;
};

}  // namespace kvt::backends
