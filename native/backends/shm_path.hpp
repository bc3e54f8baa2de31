// Shared memory beside a stream: the peer's memory is copied where it can be, all else goes by the stream.
//
// Lives here: the two ways as one path, the movers' turns at copying. Does not live here: the copying
// (shm_link.hpp), the stream (another backend's path). Invariant: without a link, or with one that broke,
// this is the stream's path and nothing else.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "backends/mover.hpp"
#include "backends/path.hpp"
#include "backends/shm_link.hpp"

namespace kvt::backends {

class ShmPath final : public Path {
  public:
    ShmPath(const std::shared_ptr<PathHost>& host, EventLoop& reactor, std::vector<Mover*> movers,
            std::shared_ptr<Path> stream);
    ~ShmPath() override;

    const char* name() const noexcept override { return stream_->name(); }
    const char* name_of_copies() const noexcept override { return "shm"; }
    std::optional<Located> locate(const SourceMemory& source) override;
    std::shared_ptr<Publication> publication() override;
    std::shared_ptr<const FoundGrant> find_grant(const protocol::Token& token) override;
    void forget_pool(std::uint64_t pool) override;
    void flush_control() override { stream_->flush_control(); }
    void kick(std::uint64_t small_nbytes) override;
    void quiesce(const protocol::TransferPtr& transfer) override;
    bool drive(const StopCondition& stop, int wake_fd, std::int64_t until) override;
    void read_last_words() override { stream_->read_last_words(); }
    void close() override;

    bool reserve_lane(std::uint32_t number) override { return stream_->reserve_lane(number); }
    void give_back_lane(std::uint32_t number) override { stream_->give_back_lane(number); }
    void add_lane(Fd fd, std::uint32_t number) override { stream_->add_lane(std::move(fd), number); }
    unsigned lanes_up() const override { return stream_->lanes_up(); }
    bool wants_channel() const override;
    void add_channel(Fd fd) override;
    Channel channel() const override;
    std::string channel_refusal() const override;
    void refuse_channel(const std::string& why) override;

  private:
    class Copier;
    std::shared_ptr<ShmLink> link() const;
    void wake_movers();
    void copy_here();

    PathHost& host_;
    std::weak_ptr<PathHost> keep_host_;
    EventLoop& reactor_;
    std::vector<Mover*> movers_;
    const std::shared_ptr<Path> stream_;
    std::vector<std::shared_ptr<Copier>> copiers_;
    mutable std::mutex mutex_;
    std::shared_ptr<ShmLink> link_;         // set once
    std::atomic<ShmLink*> there_{nullptr};  // that one, for who has no time for the lock
    std::string refusal_;
    bool closed_ = false;
};

}  // namespace kvt::backends
