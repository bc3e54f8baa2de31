// Strangers: accepting, the 32-byte preamble, lanes that join. Natively, so that nobody waits for the GIL
// before a deadline.
//
// Lives here: listeners, the fixed-size reads before a handshake, their limits. Does not live here: the
// handshake (Python). Invariant: nothing but fixed-size bytes is read from a stranger, every stranger is gone
// by its deadline, and there are max_pending of them at most, those that Python hasn't taken yet counted.
#pragma once

#include <array>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "base/event_loop.hpp"
#include "base/fd.hpp"
#include "protocol/transfer.hpp"

namespace kvt::engine {

class Connection;
class Engine;

class Admission {
  public:
    explicit Admission(Engine& engine);
    ~Admission();

    std::uint64_t add_listener(Fd fd);
    void remove_listener(std::uint64_t id);
    /// Closes strangers whose time is over; returns when to look again.
    protocol::Time expire(protocol::Time now);
    /// A session has opened: lanes that came before it may join now.
    void retry_joins();
    void close();
    /// When the reactor has ended, which alone gives it up and takes it back.
    void close_reserve() noexcept { reserve_.reset(); }

    static constexpr std::size_t kPreambleNbytes = 32;
    static constexpr std::size_t kJoinNbytes = 64;
    static constexpr std::size_t kJoinAnswerNbytes = 16;

  private:
    class Listener;
    class Stranger;
    void accept_all(Listener& listener);
    bool refuse_one(Listener& listener);
    void deafen(Listener& listener, protocol::Time now);
    void listen_again(protocol::Time now);
    void admit(std::uint64_t listener, int fd);
    void make_room();
    void say(const char* what, protocol::Time now);
    bool take(const Stranger& stranger);
    void forget(Stranger& stranger);
    void hand_over(Stranger& stranger);
    void join(Stranger& stranger);
    void welcome(Stranger& stranger, Connection& connection);

    Engine& engine_;
    std::mutex mutex_;
    bool closed_ = false;
    std::uint64_t next_listener_ = 1;
    std::unordered_map<std::uint64_t, std::shared_ptr<Listener>> listeners_;
    std::list<std::shared_ptr<Stranger>> strangers_;  // oldest first; whoever takes one out may end it
    // On the reactor's thread only. The reserve is given up for a moment when descriptors run out, so that
    // the queue can be emptied; where that doesn't help the listeners are deaf for a while.
    Fd reserve_;
    protocol::Time deaf_until_ = 0, said_at_ = 0;
};

}  // namespace kvt::engine
