// How descriptors of shared memory reach a peer on the same host: messages over a unix stream socket.
//
// Lives here: the messages, their reading and writing, whose process is at the other end. Not here: what is
// done about them, what a descriptor holds (shm_segment.hpp), any thread.
// Invariant: a message has exactly the descriptors that its type says, 0 or 1; whatever else arrives is a
// protocol::Violation, and every descriptor that came with it is closed.
#pragma once

#include <sys/types.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "backends/shm_segment.hpp"
#include "base/fd.hpp"

namespace kvt::backends {

inline constexpr std::size_t kShmMessageNbytes = 64;
inline constexpr std::size_t kShmQueuedFds = 64;
inline constexpr std::size_t kShmQueuedMessages = 4096;
inline constexpr std::size_t kShmPeerSegments = 1024;

enum class ShmType : std::uint32_t {
    segment = 1,    // id; a: its bytes; the memfd
    gone = 2,       // id of a segment: nothing in it will be offered again
    probe = 3,      // id; a: an address of the sender's; bytes: 16 that stand there
    probed = 4,     // id of a probe; bytes: 16 that were read there
    board = 5,      // a: its bytes; the memfd
    pool = 6,       // id; a: bytes of its description; a memfd with that
    pool_gone = 7,  // id of a pool
};

struct ShmMessage {
    ShmType type;
    std::uint64_t id = 0, a = 0, b = 0;
    std::array<std::byte, 32> bytes{};
};

/// What goes out. Its calls are made one at a time.
class ShmWriter {
  public:
    /// False, and nothing done, while as much as may wait is waiting; the descriptor is given away only
    /// then, and closed when it is sent. std::invalid_argument: not as many descriptors as the type has.
    bool push(const ShmMessage& message, Fd&& fd = Fd());
    /// Writes until all is sent (true) or the socket is full. Throws std::system_error.
    bool flush(int socket);
    bool empty() const noexcept { return queue_.empty(); }

  private:
    struct Waiting {
        std::array<std::byte, kShmMessageNbytes> bytes;
        Fd fd;
    };
    std::deque<Waiting> queue_;
    std::size_t sent_ = 0;  // of the first
    std::size_t fds_ = 0;
};

/// What comes in: room(), a read of at most so much, took(), and then perhaps next().
class ShmReader {
  public:
    /// For the rest of one message: a read of more could bring the next one's descriptor, too.
    std::span<std::byte> room() noexcept { return std::span(bytes_).subspan(have_); }
    /// `n` bytes came into room(), with these descriptors. Throws protocol::Violation.
    void took(std::size_t n, std::vector<Fd> fds);
    /// The message that is whole now.
    struct Received {
        ShmMessage message;
        Fd fd;
    };
    std::optional<Received> next();

  private:
    std::array<std::byte, kShmMessageNbytes> bytes_{};
    std::size_t have_ = 0;
    Fd fd_;  // of the message that isn't whole yet
};

enum class ShmRead { some, nothing_yet, ended };

/// One read of the socket, which needn't be non-blocking. Throws protocol::Violation, and std::system_error:
/// also where there are no descriptors left here.
ShmRead read_some(int socket, ShmReader& into);

/// The process at the other end of a unix socket; 0 where it can't be seen from here (another pid namespace).
/// Throws protocol::Violation where another user runs it.
pid_t same_user_pid(int socket);

/// Segments that a peer has announced. Threads share it; who holds one keeps it mapped.
class PeerSegments {
  public:
    /// Throws protocol::Violation where the id is in use, Excess beyond kShmPeerSegments.
    void add(std::uint64_t id, PeerSegment segment);
    /// Throws protocol::Violation where it isn't there.
    void remove(std::uint64_t id);
    std::shared_ptr<const PeerSegment> find(std::uint64_t id) const;  // or null

  private:
    mutable std::mutex mutex_;
    std::map<std::uint64_t, std::shared_ptr<const PeerSegment>> by_id_;
};

}  // namespace kvt::backends
