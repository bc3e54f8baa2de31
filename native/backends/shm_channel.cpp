#include "backends/shm_channel.hpp"

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <system_error>

#include "protocol/bytes.hpp"

namespace kvt::backends {

namespace {

using protocol::load_le;
using protocol::store_le;
using protocol::Violation;

constexpr std::uint32_t kMagic = 0x314d'4853;  // "SHM1"
constexpr std::size_t kTypeAt = 4, kIdAt = 8, kAAt = 16, kBAt = 24, kBytesAt = 32;

bool known(std::uint32_t type) noexcept { return type >= 1 && type <= 7; }
bool has_fd(ShmType type) noexcept {
    return type == ShmType::segment || type == ShmType::board || type == ShmType::pool;
}

[[noreturn]] void fail(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

ShmMessage decode(const std::byte* from) {
    ShmMessage message{};
    message.type = static_cast<ShmType>(load_le<std::uint32_t>(from + kTypeAt));
    message.id = load_le<std::uint64_t>(from + kIdAt);
    message.a = load_le<std::uint64_t>(from + kAAt);
    message.b = load_le<std::uint64_t>(from + kBAt);
    std::memcpy(message.bytes.data(), from + kBytesAt, message.bytes.size());
    return message;
}

std::array<std::byte, kShmMessageNbytes> encode(const ShmMessage& message) noexcept {
    std::array<std::byte, kShmMessageNbytes> to;
    store_le(to.data(), kMagic);
    store_le(to.data() + kTypeAt, static_cast<std::uint32_t>(message.type));
    store_le(to.data() + kIdAt, message.id);
    store_le(to.data() + kAAt, message.a);
    store_le(to.data() + kBAt, message.b);
    std::memcpy(to.data() + kBytesAt, message.bytes.data(), message.bytes.size());
    return to;
}

ssize_t send_part(int socket, std::span<std::byte> bytes, int fd) noexcept {
    iovec part{bytes.data(), bytes.size()};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof fd)] = {};
    msghdr header{};
    header.msg_iov = &part;
    header.msg_iovlen = 1;
    if (fd >= 0) {
        header.msg_control = control;
        header.msg_controllen = sizeof control;
        cmsghdr* const rights = CMSG_FIRSTHDR(&header);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(sizeof fd);
        std::memcpy(CMSG_DATA(rights), &fd, sizeof fd);
    }
    return ::sendmsg(socket, &header, MSG_DONTWAIT | MSG_NOSIGNAL);
}

// All of them are owned before anything is said about them; also where memory is short.
std::vector<Fd> fds_of(msghdr& header) {
    std::vector<Fd> fds;
    std::exception_ptr error;
    for (cmsghdr* part = CMSG_FIRSTHDR(&header); part != nullptr; part = CMSG_NXTHDR(&header, part)) {
        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) {
            continue;
        }
        const std::size_t n = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (std::size_t i = 0; i < n; ++i) {
            int raw = -1;
            std::memcpy(&raw, CMSG_DATA(part) + i * sizeof raw, sizeof raw);
            try {
                Fd fd(raw);  // closes it where it throws
                fds.push_back(std::move(fd));
            } catch (...) {
                error = std::current_exception();
            }
        }
    }
    if (error) {
        std::rethrow_exception(error);
    }
    return fds;
}

}  // namespace

bool ShmWriter::push(const ShmMessage& message, Fd&& fd) {
    const bool with_fd = static_cast<bool>(fd);
    if (with_fd != has_fd(message.type)) {
        throw std::invalid_argument("a message of shared memory has as many descriptors as its type says");
    }
    if (queue_.size() >= kShmQueuedMessages || (with_fd && fds_ >= kShmQueuedFds)) {
        return false;
    }
    queue_.push_back({encode(message), std::move(fd)});
    fds_ += with_fd ? 1 : 0;
    return true;
}

bool ShmWriter::flush(int socket) {
    while (!queue_.empty()) {
        Waiting& first = queue_.front();
        const ssize_t n = send_part(socket, std::span(first.bytes).subspan(sent_), first.fd.get());
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
            return false;
        }
        if (n < 0) {
            fail("sending shared memory");
        }
        fds_ -= first.fd ? 1 : 0;
        first.fd.reset();  // it went with the first byte
        sent_ += static_cast<std::size_t>(n);
        if (sent_ == kShmMessageNbytes) {
            queue_.pop_front();
            sent_ = 0;
        }
    }
    return true;
}

void ShmReader::took(std::size_t n, std::vector<Fd> fds) {
    if (fds.size() + (fd_ ? 1 : 0) > 1) {
        throw Violation("descriptors came that no message of shared memory has");
    }
    if (!fds.empty()) {
        fd_ = std::move(fds.front());
    }
    have_ += n;
}

std::optional<ShmReader::Received> ShmReader::next() {
    if (have_ < kShmMessageNbytes) {
        return std::nullopt;
    }
    have_ = 0;
    Received received{decode(bytes_.data()), std::move(fd_)};
    if (load_le<std::uint32_t>(bytes_.data()) != kMagic) {
        throw Violation("what came on the socket of shared memory is no message of it");
    }
    if (!known(static_cast<std::uint32_t>(received.message.type))) {
        throw Violation("a message of shared memory of a type that there isn't");
    }
    if (static_cast<bool>(received.fd) != has_fd(received.message.type)) {
        throw Violation("a message of shared memory without its descriptor, or with one too many");
    }
    return received;
}

ShmRead read_some(int socket, ShmReader& into) {
    const std::span<std::byte> room = into.room();
    iovec part{room.data(), room.size()};
    alignas(cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))];  // one too many is seen, more aren't made
    msghdr header{};
    ssize_t n = 0;
    do {
        header.msg_iov = &part;
        header.msg_iovlen = 1;
        header.msg_control = control;
        header.msg_controllen = sizeof control;
        n = ::recvmsg(socket, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    } while (n < 0 && errno == EINTR);
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
        return ShmRead::nothing_yet;
    }
    if (n < 0) {
        fail("receiving shared memory");
    }
    std::vector<Fd> fds = fds_of(header);
    if ((header.msg_flags & MSG_CTRUNC) != 0) {
        if (fds.empty()) {  // there was room for two: this process has no number left
            throw std::system_error(EMFILE, std::generic_category(), "receiving shared memory");
        }
        throw Violation("descriptors came that no message of shared memory has");
    }
    into.took(static_cast<std::size_t>(n), std::move(fds));
    return n == 0 ? ShmRead::ended : ShmRead::some;
}

pid_t same_user_pid(int socket) {
    ucred peer{};
    socklen_t nbytes = sizeof peer;
    if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &nbytes) != 0) {
        fail("SO_PEERCRED");
    }
    if (peer.uid != ::geteuid()) {
        throw Violation("the other end of the socket of shared memory is run by user " +
                        std::to_string(peer.uid) + ", this one by " + std::to_string(::geteuid()) +
                        ": run both as one user");
    }
    return peer.pid;
}

void PeerSegments::add(std::uint64_t id, PeerSegment segment) {
    auto kept = std::make_shared<const PeerSegment>(std::move(segment));
    const std::lock_guard lock(mutex_);
    if (by_id_.size() >= kShmPeerSegments) {
        throw protocol::Excess("the peer shares more than " + std::to_string(kShmPeerSegments) +
                               " pieces of memory");
    }
    if (!by_id_.emplace(id, std::move(kept)).second) {
        throw Violation("the peer shares two pieces of memory under one number");
    }
}

void PeerSegments::remove(std::uint64_t id) {
    std::shared_ptr<const PeerSegment> last;  // unmapped without the lock
    const std::lock_guard lock(mutex_);
    const auto found = by_id_.find(id);
    if (found == by_id_.end()) {
        throw Violation("the peer takes back memory that it doesn't share");
    }
    last = std::move(found->second);
    by_id_.erase(found);
}

std::shared_ptr<const PeerSegment> PeerSegments::find(std::uint64_t id) const {
    const std::lock_guard lock(mutex_);
    const auto found = by_id_.find(id);
    return found == by_id_.end() ? nullptr : found->second;
}

}  // namespace kvt::backends
