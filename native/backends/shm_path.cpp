#include "backends/shm_path.hpp"

#include <system_error>
#include <utility>

namespace kvt::backends {

namespace {

constexpr unsigned kCopiesInARow = 4;

// Which path this thread drives.
thread_local const ShmPath* driven_here = nullptr;

class DrivenHere {
  public:
    explicit DrivenHere(const ShmPath* path) noexcept : before_(std::exchange(driven_here, path)) {}
    ~DrivenHere() { driven_here = before_; }
    DrivenHere(const DrivenHere&) = delete;
    DrivenHere& operator=(const DrivenHere&) = delete;

  private:
    const ShmPath* const before_;
};

}  // namespace

// One mover's share of the copying.
class ShmPath::Copier final : public Runnable {
  public:
    explicit Copier(std::weak_ptr<PathHost> host) : host_(std::move(host)) {}

    void set_link(const std::shared_ptr<ShmLink>& link) {
        const std::lock_guard lock(mutex_);
        link_ = link;
    }

    bool run() override {
        const auto host = host_.lock();
        if (!host) {
            return false;
        }
        const auto target = host->next_copy();
        if (!target) {
            return false;
        }
        copy_one(*host, *target);
        return true;
    }

    /// For who is in the host.
    void copy_one(const protocol::ChunkTarget& target) {
        if (const auto host = host_.lock()) {
            copy_one(*host, target);
        }
    }

    void failed(const std::exception& why) override {
        if (const auto host = host_.lock()) {
            host->give_up(why);
        }
    }

  private:
    void copy_one(PathHost& host, const protocol::ChunkTarget& target) {
        std::shared_ptr<ShmLink> link;
        {
            const std::lock_guard lock(mutex_);
            link = link_;
        }
        try {
            copy(host, link.get(), target);
        } catch (const protocol::Violation& violation) {
            host.chunk_end(target, {protocol::ChunkStatus::aborted}, false);
            host.lose(protocol::Cause::protocol_error, violation.what());
        } catch (const std::exception& here) {  // who ends the transfer waits for this copy
            host.chunk_end(target, {protocol::ChunkStatus::aborted}, false);
            host.give_up(here);
        }
        host.settle();
        if (link) {
            link->act();
        }
    }

    static void copy(PathHost& host, ShmLink* link, const protocol::ChunkTarget& target) {
        switch (link ? link->copy(*target.transfer, target.range) : Copied::broke) {
            case Copied::good: host.chunk_end(target, {}, true); break;
            case Copied::stale: host.chunk_end(target, {protocol::ChunkStatus::aborted}, false); break;
            case Copied::broke: host.copy_broke(target); break;
        }
    }

    std::weak_ptr<PathHost> host_;
    std::mutex mutex_;
    std::shared_ptr<ShmLink> link_;
};

ShmPath::ShmPath(const std::shared_ptr<PathHost>& host, EventLoop& reactor, std::vector<Mover*> movers,
                 std::shared_ptr<Path> stream)
    : host_(*host),
      keep_host_(host),
      reactor_(reactor),
      movers_(std::move(movers)),
      stream_(std::move(stream)) {
    for (std::size_t i = 0; i < movers_.size(); ++i) {
        copiers_.push_back(std::make_shared<Copier>(keep_host_));
    }
}

ShmPath::~ShmPath() = default;

std::shared_ptr<ShmLink> ShmPath::link() const {
    const std::lock_guard lock(mutex_);
    return link_;
}

std::optional<Located> ShmPath::locate(const SourceMemory& source) {
    const auto there = link();
    return there ? there->locate(source) : std::nullopt;
}

std::shared_ptr<Publication> ShmPath::publication() {
    const auto there = link();
    if (there && !there->up() && !there->closed()) {
        there->catch_up();  // the peer may ask by control what it makes possible by the channel
    }
    return there && there->up() ? there->publication() : nullptr;
}

std::shared_ptr<const FoundGrant> ShmPath::find_grant(const protocol::Token& token) {
    ShmLink* const there = there_.load(std::memory_order_acquire);
    return there != nullptr && there->up() ? there->find_grant(token) : nullptr;
}

void ShmPath::forget_pool(std::uint64_t pool) {
    if (const auto there = link()) {
        there->forget_pool(pool);
    }
}

void ShmPath::wake_movers() {
    for (std::size_t i = 0; i < movers_.size(); ++i) {
        movers_[i]->enqueue(copiers_[i]);
    }
}

void ShmPath::kick(std::uint64_t small_nbytes) {
    if (there_.load(std::memory_order_acquire) != nullptr) {
        driven_here == this ? copy_here() : wake_movers();
    }
    stream_->kick(small_nbytes);
}

// A thread that waits copies what there is for itself: a mover would have to wake up for it. Where that is
// more than one chunk movers come to help, and after some it goes back to the words of the peer.
void ShmPath::copy_here() {
    const DrivenHere not_again(nullptr);  // by what follows from a copy
    bool woken = false;
    for (unsigned i = 0; i < kCopiesInARow; ++i) {
        const auto target = host_.next_copy();
        if (!target) {
            return;
        }
        if (!woken && host_.has_copies()) {
            wake_movers();
            woken = true;
        }
        copiers_.front()->copy_one(*target);
    }
    if (!woken && host_.has_copies()) {
        wake_movers();
    }
}

bool ShmPath::drive(const StopCondition& stop, int wake_fd, std::int64_t until) {
    const DrivenHere here(this);
    return stream_->drive(stop, wake_fd, until);
}

void ShmPath::quiesce(const protocol::TransferPtr& transfer) {
    if (transfer->loan) {
        transfer->loan->end();  // from here on nothing that is read of it can be sealed
    }
    if (transfer->located && transfer->role == protocol::Role::destination) {
        host_.wait_inactive(transfer);  // a chunk's time
    }
    stream_->quiesce(transfer);
}

void ShmPath::close() {
    std::shared_ptr<ShmLink> there;
    {
        const std::lock_guard lock(mutex_);
        closed_ = true;
        there = link_;
    }
    if (there) {
        there->close();
    }
    stream_->close();
}

// ---- the channel

bool ShmPath::wants_channel() const {
    const std::lock_guard lock(mutex_);
    return !closed_ && !link_;
}

void ShmPath::add_channel(Fd fd) {
    std::shared_ptr<ShmLink> made;
    try {
        made = std::make_shared<ShmLink>(keep_host_, reactor_, std::move(fd));
    } catch (const protocol::Violation& violation) {
        refuse_channel(violation.what());
        return;
    } catch (const std::system_error& error) {
        refuse_channel(error.what());
        return;
    }
    {
        const std::lock_guard lock(mutex_);
        if (closed_ || link_) {
            return;
        }
        link_ = made;
        there_.store(made.get(), std::memory_order_release);
    }
    for (const auto& copier : copiers_) {
        copier->set_link(made);
    }
    made->start();  // where close() came first it lets go by itself
}

Path::Channel ShmPath::channel() const {
    if (ShmLink* const there = there_.load(std::memory_order_acquire)) {
        return there->up() ? Channel::up : there->closed() ? Channel::none : Channel::awaited;
    }
    const std::lock_guard lock(mutex_);
    return refusal_.empty() ? Channel::awaited : Channel::none;
}

std::string ShmPath::channel_refusal() const {
    if (const auto there = link()) {
        return there->why_not();
    }
    const std::lock_guard lock(mutex_);
    return refusal_;
}

void ShmPath::refuse_channel(const std::string& why) {
    {
        const std::lock_guard lock(mutex_);
        if (!refusal_.empty() || link_) {
            return;
        }
        refusal_ = why;
    }
    if (const auto host = keep_host_.lock()) {
        host->can_copy(false);
    }
}

}  // namespace kvt::backends
