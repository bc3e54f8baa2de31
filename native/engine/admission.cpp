#include "engine/admission.hpp"

#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <span>
#include <string>
#include <system_error>
#include <utility>

#include "backends/path.hpp"
#include "base/clock.hpp"
#include "engine/engine.hpp"
#include "protocol/bytes.hpp"

namespace kvt::engine {

namespace {

constexpr char kMagic[8] = {'K', 'V', 'T', 'R', 'N', 'S', 'P', '1'};
constexpr char kJoinMagic[8] = {'K', 'V', 'T', 'J', 'O', 'I', 'N', '\0'};
constexpr std::uint8_t kRoleControl = 1;
constexpr std::uint8_t kRoleLane = 2;
constexpr std::uint8_t kRoleChannel = 3;  // of shared memory, over a unix socket
constexpr std::size_t kRoleAt = 12;
constexpr std::uint16_t kVersion = 1;
constexpr std::uint8_t kNullSuite = 1;
constexpr std::size_t kNamedAt = 20, kNamedNbytes = 4;  // in a JOIN: of the incarnation that it is for
constexpr std::uint32_t kJoined = 0, kRefused = 1, kElsewhere = 2;
constexpr protocol::Time kDeafFor = 100'000'000;      // a descriptor may be free by then
constexpr protocol::Time kQuietFor = 10'000'000'000;  // between two lines of the log

bool all_zero(std::span<const std::byte> bytes) noexcept {
    return std::all_of(bytes.begin(), bytes.end(), [](std::byte b) { return b == std::byte{0}; });
}

// The preamble and JOIN of a lane. What a control connection's has is for Python to read.
bool is_well_formed_lane(std::span<const std::byte> raw) noexcept {
    const auto lowest = protocol::load_le<std::uint16_t>(raw.data() + 8);
    const auto highest = protocol::load_le<std::uint16_t>(raw.data() + 10);
    const auto suites = static_cast<std::uint8_t>(raw[13]);
    return lowest >= 1 && lowest <= kVersion && highest >= kVersion && (suites & kNullSuite) != 0 &&
           all_zero(raw.subspan(14, 2)) && (suites != kNullSuite || all_zero(raw.subspan(16, 16))) &&
           all_zero(raw.subspan(Admission::kPreambleNbytes + 40, 24));
}

// It names another endpoint: who dialled has come to the wrong one behind a shared address.
bool is_for_another(std::span<const std::byte> join, const std::string& incarnation) noexcept {
    const auto named = join.subspan(kNamedAt, kNamedNbytes);
    return !all_zero(named) && incarnation.size() >= kNamedNbytes &&
           std::memcmp(named.data(), incarnation.data(), kNamedNbytes) != 0;
}

// False: it didn't go out whole, so the dialler tries again.
bool answer_join(int fd, std::uint32_t number, std::uint32_t status) noexcept {
    std::array<std::byte, Admission::kJoinAnswerNbytes> answer{};
    std::memcpy(answer.data(), kJoinMagic, sizeof kJoinMagic);
    protocol::store_le(answer.data() + 8, number);
    protocol::store_le(answer.data() + 12, status);
    const auto n = ::send(fd, answer.data(), answer.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    return n == static_cast<ssize_t>(answer.size());
}

}  // namespace

class Admission::Listener final : public Pollable {
  public:
    Listener(Admission& owner, std::uint64_t number, Fd socket)
        : id(number), fd(std::move(socket)), owner_(owner) {}
    void on_events(std::uint32_t) override { owner_.accept_all(*this); }
    void failed(const std::exception&) override {}  // what was accepted is closed again
    const std::uint64_t id;
    Fd fd;

  private:
    Admission& owner_;
};

class Admission::Stranger final : public Pollable {
  public:
    Stranger(Admission& owner, std::uint64_t from, Fd socket, protocol::Time until)
        : listener(from), fd(std::move(socket)), deadline(until), owner_(owner) {}

    void on_events(std::uint32_t) override {
        for (;;) {
            const std::size_t need = have < kPreambleNbytes ? kPreambleNbytes : kPreambleNbytes + kJoinNbytes;
            const auto n = ::recv(fd.get(), raw.data() + have, need - have, MSG_DONTWAIT);
            if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
                return;
            }
            if (n <= 0) {
                owner_.forget(*this);
                return;
            }
            have += static_cast<std::size_t>(n);
            if (have < need) {
                continue;
            }
            if (std::memcmp(raw.data(), kMagic, sizeof kMagic) != 0) {
                owner_.forget(*this);
                return;
            }
            const auto role = static_cast<std::uint8_t>(raw[kRoleAt]);
            const bool joins = role == kRoleLane || role == kRoleChannel;
            if (have == kPreambleNbytes && joins) {
                continue;
            }
            if (role == kRoleControl) {
                owner_.hand_over(*this);
            } else if (joins && is_well_formed_lane(raw)) {
                owner_.join(*this);
            } else {
                owner_.forget(*this);
            }
            return;
        }
    }

    void failed(const std::exception&) override { owner_.forget(*this); }

    const std::uint64_t listener;
    Fd fd;
    const protocol::Time deadline;
    std::array<std::byte, kPreambleNbytes + kJoinNbytes> raw{};
    std::size_t have = 0;
    bool parked = false;  // a lane whose session isn't open yet; under the owner's lock

  private:
    Admission& owner_;
};

Admission::Admission(Engine& engine) : engine_(engine), reserve_(::open("/dev/null", O_RDONLY | O_CLOEXEC)) {}

Admission::~Admission() = default;

std::uint64_t Admission::add_listener(Fd fd) {
    std::shared_ptr<Listener> listener;
    {
        const std::lock_guard lock(mutex_);
        listener = std::make_shared<Listener>(*this, next_listener_++, std::move(fd));
        listeners_[listener->id] = listener;
    }
    if (const auto refused = engine_.reactor().add(listener->fd.get(), EPOLLIN, listener)) {
        const std::lock_guard lock(mutex_);
        listeners_.erase(listener->id);
        throw std::system_error(refused, "epoll_ctl");
    }
    return listener->id;
}

void Admission::remove_listener(std::uint64_t id) {
    std::shared_ptr<Listener> listener;
    {
        const std::lock_guard lock(mutex_);
        if (const auto known = listeners_.find(id); known != listeners_.end()) {
            listener = known->second;
            listeners_.erase(known);
        }
    }
    if (listener) {
        engine_.reactor().remove(listener->fd.get());
    }
}

void Admission::accept_all(Listener& listener) {
    for (;;) {
        const int fd = ::accept4(listener.fd.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd >= 0) {
            admit(listener.id, fd);
            continue;
        }
        const int why = errno;
        if (why == EINTR || why == ECONNABORTED) {
            continue;
        }
        if (why == EMFILE || why == ENFILE) {
            if (refuse_one(listener)) {
                continue;
            }
        } else if (why !=
                   EAGAIN) {  // ENOMEM, ENOBUFS: level-triggered, it would spin for as long as that lasts
            const protocol::Time now = monotonic_ns();
            deafen(listener, now);
            say("out of memory for sockets: connections can't be accepted", now);
        }
        return;
    }
}

// Level-triggered: without taking the connection the listener would spin for as long as descriptors are
// short.
bool Admission::refuse_one(Listener& listener) {
    const protocol::Time now = monotonic_ns();
    reserve_.reset();
    const int refused = ::accept4(listener.fd.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (refused >= 0) {
        ::close(refused);
    } else if (errno == EMFILE || errno == ENFILE) {  // another thread was quicker than we, or the limit fell
        deafen(listener, now);
    }
    reserve_ = Fd(::open("/dev/null", O_RDONLY | O_CLOEXEC));
    say("out of file descriptors: a connection was refused; raise the limit (ulimit -n)", now);
    return refused >= 0;
}

void Admission::deafen(Listener& listener, protocol::Time now) {
    engine_.reactor().modify(listener.fd.get(), 0);
    deaf_until_ = now + kDeafFor;
}

void Admission::say(const char* what, protocol::Time now) {
    if (said_at_ == 0 || now - said_at_ > kQuietFor) {
        said_at_ = now;
        engine_.log(30, what);
    }
}

void Admission::listen_again(protocol::Time now) {
    if (now < deaf_until_) {
        return;
    }
    deaf_until_ = 0;
    if (!reserve_) {
        reserve_ = Fd(::open("/dev/null", O_RDONLY | O_CLOEXEC));
    }
    const std::lock_guard lock(mutex_);
    for (const auto& [id, listener] : listeners_) {
        engine_.reactor().modify(listener->fd.get(), EPOLLIN);
    }
}

void Admission::admit(std::uint64_t listener, int fd) {
    const protocol::Time now = monotonic_ns();
    auto stranger = std::make_shared<Stranger>(*this, listener, Fd(fd),
                                               now + engine_.options().handshake_timeout_ns);
    make_room();
    {
        const std::lock_guard lock(mutex_);
        if (closed_) {
            return;
        }
        strangers_.push_back(stranger);
    }
    if (engine_.reactor().add(stranger->fd.get(), EPOLLIN, stranger)) {
        forget(*stranger);
        say("out of memory or watches (epoll): a connection was refused", now);
    }
}

// While Python stands still those that it was handed wait, too: the oldest go.
void Admission::make_room() {
    std::shared_ptr<Stranger> oldest;
    {
        const std::size_t handed_over = engine_.handed_over();
        const std::lock_guard lock(mutex_);
        if (strangers_.size() + handed_over < engine_.options().max_pending) {
            return;
        }
        oldest = strangers_.empty() ? nullptr : strangers_.front();
    }
    if (!engine_.drop_oldest_handed_over() && oldest) {
        forget(*oldest);
    }
}

// True for one caller, whose the stranger is then, with its descriptor.
bool Admission::take(const Stranger& stranger) {
    std::shared_ptr<Stranger> last;
    const std::lock_guard lock(mutex_);
    const auto known = std::find_if(strangers_.begin(), strangers_.end(),
                                    [&](const auto& s) { return s.get() == &stranger; });
    if (known == strangers_.end()) {
        return false;
    }
    last = *known;
    strangers_.erase(known);
    return true;
}

// It is closed when the last who looks at it lets go.
void Admission::forget(Stranger& stranger) {
    if (take(stranger)) {
        engine_.reactor().remove(stranger.fd.get());
    }
}

void Admission::hand_over(Stranger& stranger) {
    if (!take(stranger)) {
        return;
    }
    engine_.reactor().remove(stranger.fd.get());
    Event event;
    event.kind = Event::Kind::accepted;
    event.listener = stranger.listener;
    event.preamble.assign(reinterpret_cast<const char*>(stranger.raw.data()), kPreambleNbytes);
    event.fd = stranger.fd.release();
    engine_.post_event(std::move(event));
}

// The dialler may be faster than our own Python thread: a lane whose session isn't open yet waits until its
// deadline.
void Admission::join(Stranger& stranger) {
    engine_.reactor().remove(stranger.fd.get());
    const std::byte* join = stranger.raw.data() + kPreambleNbytes;
    const std::string session_id(reinterpret_cast<const char*>(join), 16);
    if (is_for_another({join, kJoinNbytes}, engine_.options().incarnation)) {
        if (take(stranger)) {
            answer_join(stranger.fd.get(), protocol::load_le<std::uint32_t>(join + 16), kElsewhere);
        }
        return;
    }
    {
        const std::lock_guard lock(mutex_);
        stranger.parked = true;  // before the look: a session that opens meanwhile finds it
    }
    const auto connection = engine_.find(session_id);
    if (connection == nullptr || !connection->is_open()) {
        return;
    }
    {
        const std::lock_guard lock(mutex_);
        if (!std::exchange(stranger.parked, false)) {
            return;  // another thread joins it
        }
    }
    if (take(stranger)) {
        welcome(stranger, *connection);
    }
}

void Admission::welcome(Stranger& stranger, Connection& connection) {
    const auto number = protocol::load_le<std::uint32_t>(stranger.raw.data() + kPreambleNbytes + 16);
    Fd fd = std::exchange(stranger.fd, Fd());
    const auto path = connection.path();
    const bool channel = static_cast<std::uint8_t>(stranger.raw[kRoleAt]) == kRoleChannel;
    const bool welcome = path != nullptr &&
                         (channel ? number == 0 && path->wants_channel() : path->reserve_lane(number));
    const bool told = answer_join(fd.get(), number, welcome ? kJoined : kRefused);
    if (welcome && told) {
        channel ? path->add_channel(std::move(fd)) : path->add_lane(std::move(fd), number);
    } else if (welcome && !channel) {
        path->give_back_lane(number);  // the dialler doesn't know of its welcome, and tries again
    }
}

void Admission::retry_joins() {
    std::vector<std::shared_ptr<Stranger>> parked;
    {
        const std::lock_guard lock(mutex_);
        for (const auto& stranger : strangers_) {
            if (std::exchange(stranger->parked, false)) {
                parked.push_back(stranger);
            }
        }
    }
    for (const auto& stranger : parked) {
        join(*stranger);
    }
}

protocol::Time Admission::expire(protocol::Time now) {
    std::vector<std::shared_ptr<Stranger>> late;
    protocol::Time next = protocol::kNever;
    if (deaf_until_ != 0) {
        listen_again(now);
        next = deaf_until_ != 0 ? deaf_until_ : next;
    }
    {
        const std::lock_guard lock(mutex_);
        for (const auto& stranger : strangers_) {
            if (stranger->deadline <= now) {
                late.push_back(stranger);
            } else {
                next = std::min(next, stranger->deadline);
            }
        }
    }
    for (const auto& stranger : late) {
        forget(*stranger);
    }
    return next;
}

void Admission::close() {
    std::vector<std::uint64_t> ids;
    std::vector<std::shared_ptr<Stranger>> all;
    {
        const std::lock_guard lock(mutex_);
        closed_ = true;
        for (const auto& [id, listener] : listeners_) {
            ids.push_back(id);
        }
        all.assign(strangers_.begin(), strangers_.end());
    }
    for (const std::uint64_t id : ids) {
        remove_listener(id);
    }
    for (const auto& stranger : all) {
        forget(*stranger);
    }
}

}  // namespace kvt::engine
