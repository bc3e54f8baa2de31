#include "backends/tcp.hpp"

#include <utility>

#include "backends/tcp_tuning.hpp"

namespace kvt::backends {

namespace {

// A transfer of one chunk is written by the thread that posts it: no wake-up before the first byte.
constexpr std::uint64_t kWriteHereNbytes = 256u << 10;

}  // namespace

TcpPath::TcpPath(std::shared_ptr<PathHost> host, EventLoop& reactor, std::vector<Mover*> movers, Fd control,
                 TcpOptions options)
    : keep_host_(host),
      host_(*host),
      reactor_(reactor),
      movers_(std::move(movers)),
      options_(std::move(options)) {
    tune_control(control.get());
    control_ = std::make_shared<TcpControl>(host_, host, reactor_, std::move(control));
    reserved_.assign(options_.lanes, false);
}

TcpPath::~TcpPath() { close(); }

void TcpPath::start() { control_->start(); }

bool TcpPath::reserve_lane(std::uint32_t number) {
    const std::lock_guard lock(lanes_mutex_);
    if (closed_ || number >= reserved_.size() || reserved_[number]) {
        return false;
    }
    reserved_[number] = true;
    return true;
}

void TcpPath::give_back_lane(std::uint32_t number) {
    const std::lock_guard lock(lanes_mutex_);
    reserved_[number] = false;
}

void TcpPath::add_lane(Fd fd, std::uint32_t number) {
    const auto host = keep_host_.lock();
    if (!host) {
        return;
    }
    tune_lane(fd.get(), options_.socket_buffer_nbytes);
    auto lane = std::make_shared<TcpLane>(host_, host, *movers_[number % movers_.size()], std::move(fd),
                                          options_.digest);
    {
        const std::lock_guard lock(lanes_mutex_);
        if (closed_) {
            return;
        }
        lanes_.push_back(lane);
    }
    lane->start();
    lane->kick();  // payload may have been waiting for a lane
}

unsigned TcpPath::lanes_up() const {
    const std::lock_guard lock(lanes_mutex_);
    return static_cast<unsigned>(lanes_.size());
}

std::vector<std::shared_ptr<TcpLane>> TcpPath::lanes() const {
    const std::lock_guard lock(lanes_mutex_);
    return lanes_;
}

void TcpPath::kick(std::uint64_t small_nbytes) {
    const auto all = lanes();
    if (small_nbytes != 0 && small_nbytes <= kWriteHereNbytes) {
        for (const auto& lane : all) {
            if (lane->write_from_here()) {
                break;
            }
        }
        if (!host_.has_payload()) {
            return;
        }
    }
    for (const auto& lane : all) {
        lane->kick();
    }
}

void TcpPath::quiesce(const protocol::TransferPtr& transfer) {
    for (const auto& lane : lanes()) {
        lane->quiesce(transfer.get());
    }
}

void TcpPath::close() {
    if (generation_ != fork_generation()) {
        return;  // a child's: the numbers of these sockets and of the loops' are its own files by now
    }
    std::vector<std::shared_ptr<TcpLane>> all;
    {
        const std::lock_guard lock(lanes_mutex_);
        if (std::exchange(closed_, true)) {
            return;
        }
        all = lanes_;
    }
    for (const auto& lane : all) {
        lane->close();
    }
    control_->close();
}

}  // namespace kvt::backends
