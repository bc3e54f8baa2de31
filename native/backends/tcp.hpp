// TCP and unix stream sockets: one control connection and N lanes to one peer.
//
// Lives here: sockets, partial reads and writes, which thread does them. Does not live here: dialling and
// accepting (Python, engine/admission), frames' meaning (protocol). Invariants: each socket has one owner
// (the reactor for control, a mover for each lane) and each direction one lock; whoever holds it does the
// work. Payload goes straight between socket and blocks.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "backends/mover.hpp"
#include "backends/path.hpp"
#include "base/event_loop.hpp"
#include "base/fd.hpp"
#include "protocol/frame_stream.hpp"

namespace kvt::backends {

struct TcpOptions {
    unsigned lanes = 2;
    int socket_buffer_nbytes = 0;
    protocol::DigestKind digest = protocol::DigestKind::none;
    std::string name = "tcp";
};

class TcpPath;

/// The control stream's socket.
class TcpControl final : public Pollable, public std::enable_shared_from_this<TcpControl> {
  public:
    TcpControl(PathHost& host, std::shared_ptr<void> keep_host, EventLoop& reactor, Fd fd);

    void start();
    void on_events(std::uint32_t events) override;
    void failed(const std::exception& why) override {
        if (const auto host = keep_host_.lock()) {
            host_.give_up(why);
        }
    }
    void flush();
    bool drive(const Path::StopCondition& stop, int wake_fd, std::int64_t until);
    void read_last_words();
    void close();

  private:
    enum class Read { progress, nothing, dead };
    Read read_frames();
    bool receive_next();
    bool read_here();
    void write_out();
    void set_interest();

    PathHost& host_;
    std::weak_ptr<void> keep_host_;
    EventLoop& reactor_;
    Fd fd_;

    std::mutex rx_mutex_;  // held by whoever reads and acts on frames
    protocol::FrameReader frames_;

    std::mutex tx_mutex_;
    std::atomic<bool> tx_again_{false};
    protocol::Bytes tx_;
    std::size_t tx_at_ = 0;

    std::mutex interest_mutex_;
    bool driven_ = false, blocked_ = false, closed_ = false;
};

/// One lane's socket.
class TcpLane final : public Pollable,
                      public Runnable,
                      public protocol::LaneHost,
                      public std::enable_shared_from_this<TcpLane> {
  public:
    TcpLane(PathHost& host, std::shared_ptr<void> keep_host, Mover& mover, Fd fd,
            protocol::DigestKind digest);

    void start();
    void kick();
    void on_events(std::uint32_t events) override;
    bool run() override;
    void failed(const std::exception& why) override;
    /// Writes one whole chunk from the calling thread, if the lane is idle; true if a chunk was taken.
    bool write_from_here();
    void quiesce(const protocol::Transfer* transfer);
    void close();

    protocol::ChunkTarget chunk_begin(const protocol::Header& header) override {
        return host_.chunk_begin(header);
    }
    void chunk_end(const protocol::ChunkTarget& target, const protocol::Trailer& trailer,
                   bool verified) override;
    void chunk_left(const protocol::ChunkJob& job, bool whole, bool begun) override;

  private:
    enum class Turn { idle, more, dead };
    struct Broken {
        protocol::Cause cause;  // peer_lost: its socket ended
        std::string reason;
    };
    bool start_next();
    bool wait_for_room(bool& full);
    Turn read_turn();
    std::size_t read_once(iovec* iov, std::optional<Broken>& broken);
    void take(const iovec* iov, std::size_t count, std::size_t nbytes, std::optional<Broken>& broken);
    Turn write_turn(const protocol::Staging& staging, std::size_t budget, bool one_chunk);
    void broke(const Broken& how);

    PathHost& host_;
    std::weak_ptr<void> keep_host_;
    Mover& mover_;
    Fd fd_;
    std::size_t io_nbytes_;
    std::mutex rx_mutex_, tx_mutex_;
    protocol::LaneReader reader_;
    protocol::LaneWriter writer_;
    std::atomic<bool> readable_{true}, writable_{true}, dirty_{false}, closed_{false};
    std::atomic<bool> ended_{false};  // the peer's side of the socket: what is unread ends with that
};

class TcpPath final : public Path {
  public:
    TcpPath(std::shared_ptr<PathHost> host, EventLoop& reactor, std::vector<Mover*> movers, Fd control,
            TcpOptions options);
    ~TcpPath() override;

    void start();
    bool reserve_lane(std::uint32_t number) override;
    void give_back_lane(std::uint32_t number) override;
    void add_lane(Fd fd, std::uint32_t number) override;
    unsigned lanes_up() const override;

    const char* name() const noexcept override { return options_.name.c_str(); }
    void flush_control() override { control_->flush(); }
    void kick(std::uint64_t small_nbytes) override;
    void quiesce(const protocol::TransferPtr& transfer) override;
    bool drive(const StopCondition& stop, int wake_fd, std::int64_t until) override {
        return control_->drive(stop, wake_fd, until);
    }
    void read_last_words() override { control_->read_last_words(); }
    void close() override;

  private:
    std::vector<std::shared_ptr<TcpLane>> lanes() const;

    std::weak_ptr<PathHost> keep_host_;
    PathHost& host_;
    EventLoop& reactor_;
    std::vector<Mover*> movers_;
    TcpOptions options_;
    std::shared_ptr<TcpControl> control_;
    mutable std::mutex lanes_mutex_;
    std::vector<std::shared_ptr<TcpLane>> lanes_;
    std::vector<bool> reserved_;
    bool closed_ = false;
    const std::uint64_t generation_ = fork_generation();
};

}  // namespace kvt::backends
