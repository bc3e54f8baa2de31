#include "engine/watch.hpp"

#include <sys/syscall.h>
#include <unistd.h>

#include "engine/connection.hpp"
#include "engine/engine.hpp"

namespace kvt::engine {

std::shared_ptr<ProcessWatch> ProcessWatch::open(pid_t pid, const std::shared_ptr<Connection>& connection) {
#ifdef SYS_pidfd_open
    const int fd = static_cast<int>(::syscall(SYS_pidfd_open, pid, 0));
    if (fd >= 0) {
        return std::make_shared<ProcessWatch>(Fd(fd), connection);
    }
#endif
    return nullptr;
}

void ProcessWatch::failed(const std::exception& why) {
    if (const auto connection = connection_.lock()) {
        connection->give_up(why);
    }
}

void ProcessWatch::on_events(std::uint32_t) {
    const auto connection = connection_.lock();
    if (!connection) {
        return;
    }
    connection->engine().reactor().remove(fd_.get());
    if (const auto path = connection->path()) {
        path->read_last_words();
    }
    connection->lose(protocol::Cause::peer_lost, kProcessEnded);
}

}  // namespace kvt::engine
