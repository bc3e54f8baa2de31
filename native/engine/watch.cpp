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

ProcessWatch::ProcessWatch(Fd fd, const std::shared_ptr<Connection>& connection)
    : fd_(std::move(fd)),
      engine_(connection->engine()),
      reader_(connection->reader()),
      connection_(connection) {}

void ProcessWatch::failed(const std::exception& why) {
    if (const auto connection = connection_.lock()) {
        connection->give_up(why);
    }
}

void ProcessWatch::on_events(std::uint32_t) {
    engine_.reactor().remove(fd_.get());
    if (const auto connection = connection_.lock()) {
        if (const auto path = connection->path()) {
            path->read_last_words();
        }
        connection->lose(protocol::Cause::peer_lost, kProcessEnded);
    }
    engine_.grants().reader_gone(reader_, true);  // the connection may have been lost for another reason
}

}  // namespace kvt::engine
