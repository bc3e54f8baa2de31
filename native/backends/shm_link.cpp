#include "backends/shm_link.hpp"

#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

#include "backends/copy.hpp"

namespace kvt::backends {

using protocol::Cause;
using protocol::Range;
using protocol::Transfer;
using protocol::Violation;

namespace {

constexpr std::size_t kMostPools = 4096;
constexpr std::uint64_t kMostShape = 4u << 20;   // bytes of a pool's description: as many as there can be
constexpr std::uint64_t kMostKept = 256u << 20;  // bytes that all of its pools take here
constexpr std::uint64_t kProbeId = 1;

// Then others have a turn: a peer may write as fast as it is read. More than a socket holds.
constexpr unsigned kReadsInARow = 4096;

std::array<std::byte, 16> random_bytes() {
    std::array<std::byte, 16> bytes{};
    if (::getrandom(bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) {
        throw std::system_error(errno, std::generic_category(), "getrandom");
    }
    return bytes;
}

Fd duplicate(int fd) {
    const int copy = ::fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (copy < 0) {
        throw std::system_error(errno, std::generic_category(), "a descriptor of shared memory");
    }
    return Fd(copy);
}

// A transfer, as copy.hpp wants runs.
struct RunsOf {
    const Transfer& transfer;
    std::uint64_t runs(std::uint64_t begin, std::uint64_t end, iovec* out, std::size_t most,
                       std::size_t& count) const {
        return transfer.runs(begin, end, out, most, count);
    }
};

}  // namespace

// What is lent to the peer for one transfer: a guard, until it ends or goes.
class ShmLink::Borrowed final : public protocol::Loan {
  public:
    Borrowed(std::shared_ptr<ShmLink> link, Guard guard) : link_(std::move(link)), guard_(guard) {}
    ~Borrowed() override { end(); }
    void end() noexcept override {
        if (!over_.exchange(true)) {
            link_->end(guard_);
        }
    }

  private:
    const std::shared_ptr<ShmLink> link_;
    const Guard guard_;
    std::atomic<bool> over_{false};
};

// What a transfer's location was found to be.
class ShmLink::Found {
  public:
    std::shared_ptr<const ShmPool> pool;  // keeps its segments mapped
    std::shared_ptr<const memory::StreamPlan> plan;
    Guard guard{};
};

ShmLink::ShmLink(std::weak_ptr<PathHost> host, EventLoop& reactor, Fd channel)
    : host_(std::move(host)),
      reactor_(reactor),
      channel_(std::move(channel)),
      process_(PeerProcess::at_other_end(channel_.get())),
      nonce_(random_bytes()) {
    ::fcntl(channel_.get(), F_SETFL, ::fcntl(channel_.get(), F_GETFL) | O_NONBLOCK);
}

ShmLink::~ShmLink() = default;

void ShmLink::start() {
    const auto& segment = board_.segment();
    ShmMessage board{ShmType::board};
    board.a = segment.size();
    ShmMessage probe{ShmType::probe, kProbeId};
    probe.a = reinterpret_cast<std::uintptr_t>(nonce_.data());
    try {
        const std::lock_guard lock(tx_mutex_);
        send(board, duplicate(segment.fd()));
        send(probe);
        flush();
    } catch (const std::system_error& here) {  // no descriptor left
        failed(here);
        return;
    }
    if (const auto refused = reactor_.add(channel_.get(), EPOLLIN | EPOLLRDHUP, shared_from_this())) {
        failed(std::system_error(refused, "the channel of shared memory can't be watched"));
    }
    if (closed_.load()) {  // meanwhile: close() had nothing to remove yet
        reactor_.remove(channel_.get());
    }
}

void ShmLink::close() {
    if (closed_.exchange(true)) {
        return;
    }
    up_.store(false);
    {  // the board outlives this link where the peer has it mapped, and nobody could end them there then
        const std::lock_guard lock(board_mutex_);
        board_.end_grants();
        OwnBoard::fence();
    }
    reactor_.remove(channel_.get());
    ::shutdown(channel_.get(), SHUT_RDWR);
}

std::string ShmLink::why_not() const {
    const std::lock_guard lock(peer_mutex_);
    return why_not_;
}

// ---- the channel

void ShmLink::on_events(std::uint32_t events) {
    if ((events & EPOLLOUT) != 0) {
        const std::lock_guard lock(tx_mutex_);
        flush();
    }
    if ((events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0) {
        {
            const std::lock_guard lock(rx_mutex_);
            read_channel();
        }
        act();
    }
}

void ShmLink::failed(const std::exception& why) {
    {
        const std::lock_guard lock(rx_mutex_);
        news_.broke = true;
        news_.why = why.what();
    }
    act();
}

// A way that is broken isn't the session's end: what was to be copied comes by chunks.
void ShmLink::act() {
    News news;
    {
        const std::lock_guard lock(rx_mutex_);
        news = std::exchange(news_, {});
    }
    const auto host = host_.lock();
    if (news.broke || news.ends) {
        close();
        const std::lock_guard lock(peer_mutex_);
        why_not_ = news.why;
    }
    if (!host) {
        return;
    }
    if (news.ends) {
        host->lose(*news.ends, news.why);
    } else if (news.broke) {
        host->can_copy(false);
    } else if (news.came_up) {
        host->can_copy(true);
    }
}

// Under rx_mutex_. What the peer did wrong ends the session.
void ShmLink::read_channel() {
    const auto ends = [&](Cause cause, const std::exception& why) {
        news_.ends = cause;
        news_.why = why.what();
    };
    try {
        for (unsigned i = 0; i < kReadsInARow && !closed_.load() && !news_.broke && !news_.ends; ++i) {
            const ShmRead read = read_some(channel_.get(), reader_);
            if (read == ShmRead::ended) {
                news_.broke = true;
                news_.why = "the channel of shared memory was closed by the peer";
                return;
            }
            if (read == ShmRead::nothing_yet) {
                return;
            }
            while (auto received = reader_.next()) {
                take(std::move(*received));
            }
        }
    } catch (const Violation& violation) {
        ends(Cause::protocol_error, violation);
    } catch (const protocol::Excess& excess) {
        ends(Cause::resource_limit, excess);
    } catch (const std::system_error& here) {
        news_.broke = true;
        news_.why = here.what();
    }
}

void ShmLink::take(ShmReader::Received received) {
    const ShmMessage& message = received.message;
    switch (message.type) {
        case ShmType::segment:
            peer_segments_.add(message.id, PeerSegment::open(std::move(received.fd), message.a));
            return;
        case ShmType::gone: peer_segments_.remove(message.id); return;
        case ShmType::probe: answer_probe(message); return;
        case ShmType::probed: judge_probe(message); return;
        case ShmType::board: take_board(std::move(received)); return;
        case ShmType::pool: take_pool(std::move(received)); return;
        case ShmType::pool_gone: drop_pool(message.id); return;
    }
}

void ShmLink::take_board(ShmReader::Received received) {
    PeerBoard board = PeerBoard::open(std::move(received.fd), received.message.a);
    {
        const std::lock_guard lock(peer_mutex_);
        if (peer_board_) {
            throw Violation("a second board of shared memory");
        }
        peer_board_.emplace(std::move(board));
    }
    up_.store(true, std::memory_order_release);
    news_.came_up = true;
}

void ShmLink::take_pool(ShmReader::Received received) {
    if (received.message.a > kMostShape) {
        throw protocol::Excess("a pool of shared memory has too long a description");
    }
    const protocol::Bytes shape = [&] {  // a copy: the peer may still write to its file
        const PeerSegment file = PeerSegment::open(std::move(received.fd), received.message.a);
        return protocol::Bytes(file.data(), file.data() + file.size());
    }();
    auto pool = std::make_shared<const ShmPool>(decode_shm_pool(shape, peer_segments_));
    const std::lock_guard lock(peer_mutex_);
    if (peer_pools_.size() >= kMostPools) {
        throw protocol::Excess("the peer announces more than 4,096 pools of shared memory");
    }
    if (pool->kept_nbytes > kMostKept - kept_nbytes_) {
        throw protocol::Excess("the peer's pools of shared memory have too long descriptions");
    }
    const auto [known, fresh] = peer_pools_.emplace(received.message.id, std::move(pool));
    if (!fresh) {
        throw Violation("a pool of shared memory is announced twice");
    }
    kept_nbytes_ += known->second->kept_nbytes;
}

void ShmLink::drop_pool(std::uint64_t id) {
    std::shared_ptr<const ShmPool> last;  // unmapped without the lock
    const std::lock_guard lock(peer_mutex_);
    if (const auto known = peer_pools_.find(id); known != peer_pools_.end()) {
        last = std::move(known->second);
        kept_nbytes_ -= last->kept_nbytes;
        peer_pools_.erase(known);
        forget_found(last.get());
    }
}

void ShmLink::answer_probe(const ShmMessage& probe) {
    ShmMessage answer{ShmType::probed, probe.id};
    const iovec from{reinterpret_cast<void*>(static_cast<std::uintptr_t>(probe.a)), 16};
    const iovec to{answer.bytes.data(), 16};
    const auto error = read_pieces(process_.pid(), &to, 1, &from, 1, 16);
    answer.b = static_cast<std::uint64_t>(error.value());
    const std::lock_guard lock(tx_mutex_);
    send(answer);
    flush();
}

void ShmLink::judge_probe(const ShmMessage& probed) {
    const bool read = probed.id == kProbeId && std::equal(nonce_.begin(), nonce_.end(), probed.bytes.begin());
    if (!read) {
        const auto error = static_cast<int>(std::min<std::uint64_t>(probed.b, 4095));
        const std::lock_guard lock(peer_mutex_);
        why_not_ = "the peer can't read this process's memory: " +
                   std::string(error == 0       ? "it is another process's"
                               : error == ESRCH ? "it is in another pid namespace"
                                                : std::strerror(error));
    }
    peer_reads_us_.store(read, std::memory_order_release);
}

// ---- writing, under tx_mutex_

// False: so much waits for the peer to read that nothing more is taken.
bool ShmLink::send(const ShmMessage& message, Fd fd) {
    return writer_.push(message, std::move(fd)) || (flush() && writer_.push(message, std::move(fd)));
}

bool ShmLink::send_file(ShmType type, std::uint64_t id, const protocol::Bytes& content) {
    const OwnSegment file("kvtransport-pool", content.size());
    std::memcpy(file.data(), content.data(), content.size());
    ShmMessage message{type, id};
    message.a = content.size();
    return send(message, duplicate(file.fd()));
}

// True when all is in the socket. Where it is full the reactor goes on.
bool ShmLink::flush() {
    try {
        const bool all = writer_.flush(channel_.get());
        if (!closed_.load()) {
            reactor_.modify(channel_.get(),
                            EPOLLIN | EPOLLRDHUP | (all ? 0u : static_cast<unsigned>(EPOLLOUT)));
        }
        return all;
    } catch (const std::system_error&) {
        return false;  // the reading side finds out why
    }
}

// ---- source

// True: the peer has, or has in its socket, all that it needs to find the pool.
bool ShmLink::announce(const PoolMemory& source) {
    if (source.shape->segments() > kMostShmSegments) {
        return false;
    }
    const std::lock_guard lock(tx_mutex_);
    if (!told_pools_.contains(source.pool)) {
        const protocol::Bytes shape = encode_shm_pool(*source.shape, source.segments);
        auto& segments = segments_of_[source.pool];
        for (const auto& segment :
             shape[0] != std::byte{0} ? source.segments : std::vector<memory::SharedSegment>()) {
            if (told_segments_.contains(segment.id)) {
                continue;
            }
            ShmMessage message{ShmType::segment, segment.id};
            message.a = segment.nbytes;
            if (!send(message, duplicate(segment.fd))) {
                return false;
            }
            told_segments_.insert(segment.id);
            segments.push_back(segment.id);
        }
        if (!send_file(ShmType::pool, source.pool, shape)) {
            return false;
        }
        told_pools_.insert(source.pool);
    }
    return flush();
}

std::optional<Located> ShmLink::locate(const SourceMemory& source) {
    if (!up() || (!source.pool.mapped && !peer_reads_us())) {
        return std::nullopt;
    }
    try {
        if (!announce(source.pool)) {
            return std::nullopt;
        }
        std::optional<Guard> guard;
        {
            const std::lock_guard lock(board_mutex_);
            guard = board_.acquire();
        }
        if (!guard) {
            return std::nullopt;
        }
        Located located{encode_shm_location({source.pool.pool, *guard}, source.plan), nullptr};
        located.loan = std::make_shared<Borrowed>(shared_from_this(), *guard);
        if (located.location.size() > protocol::kMaxControlBodyNbytes) {
            return std::nullopt;  // more ids than a frame has room for
        }
        return located;
    } catch (const std::system_error&) {
        return std::nullopt;  // no descriptors or memory left for it: by chunks, then
    }
}

void ShmLink::end(Guard guard) noexcept {
    const std::lock_guard lock(board_mutex_);
    board_.end(guard);
    OwnBoard::fence();
}

void ShmLink::forget_pool(std::uint64_t pool) {
    const std::lock_guard lock(tx_mutex_);
    if (told_pools_.erase(pool) != 0) {
        send({ShmType::pool_gone, pool});
    }
    const auto told = segments_of_.extract(pool);  // also of a pool that was half told
    if (told.empty()) {
        return;
    }
    for (const std::uint64_t segment : told.mapped()) {
        told_segments_.erase(segment);
        send({ShmType::gone, segment});
    }
    flush();
}

// ---- destination

std::shared_ptr<ShmLink::Found> ShmLink::find(Transfer& to) {
    protocol::Reader in(to.location);
    const ShmLocation location = decode_shm_location(in);
    {
        const std::lock_guard lock(peer_mutex_);
        if (to.found) {
            return std::static_pointer_cast<Found>(to.found);
        }
    }
    auto pool = peer_pool(location.pool);
    if (!pool) {
        return nullptr;
    }
    auto found = std::make_shared<Found>();
    found->plan = decode_shm_plan(in, *pool, to.nbytes);
    found->pool = std::move(pool);
    found->guard = location.guard;
    const std::lock_guard lock(peer_mutex_);
    to.found = found;
    return found;
}

std::shared_ptr<const ShmPool> ShmLink::peer_pool(std::uint64_t id) {
    for (const bool last : {false, true}) {
        {
            const std::lock_guard lock(peer_mutex_);
            if (const auto known = peer_pools_.find(id); known != peer_pools_.end()) {
                return known->second;
            }
        }
        if (!last) {  // it is in the socket: the reactor hasn't come to it
            const std::lock_guard lock(rx_mutex_);
            read_channel();
        }
    }
    return nullptr;
}

Copied ShmLink::copy(Transfer& to, Range range) {
    if (!up()) {
        return Copied::broke;
    }
    const auto found = find(to);
    if (!found) {
        return Copied::broke;
    }
    if (found->pool->mapped) {
        copy_runs(*found->plan, RunsOf{to}, range.begin, range.end);
    } else if (const auto error = read_runs(process_.pid(), *found->plan, RunsOf{to}, range.begin,
                                            range.end)) {
        return judge(error);
    }
    return peer_board_->still(found->guard) && process_.alive() ? Copied::good : Copied::stale;
}

// Of process_vm_readv.
Copied ShmLink::judge(std::error_code error) const noexcept {
    if (!error) {
        return Copied::good;
    }
    if (error == std::errc::bad_address || error == std::errc::no_such_process) {
        return Copied::stale;  // it has given the memory back, or is gone: its last words say which
    }
    return Copied::broke;
}

}  // namespace kvt::backends
