#include "base/fd.hpp"

#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <mutex>
#include <system_error>
#include <unordered_set>

namespace kvt {

namespace {

// Never destroyed: descriptors are closed by static destructors of others, and by a child at any time.
struct Registry {
    std::mutex mutex;
    std::unordered_set<int> open;
    std::atomic<std::uint64_t> generation{0};
};

Registry& registry() {
    static Registry* const instance = new Registry;
    return *instance;
}

void before_fork() { registry().mutex.lock(); }
void in_parent() { registry().mutex.unlock(); }
void in_child() {
    Registry& all = registry();
    for (const int fd : all.open) {
        ::close(fd);
    }
    all.open.clear();
    all.generation.fetch_add(1);
    all.mutex.unlock();
}

Registry& armed_registry() {
    static const int armed = pthread_atfork(before_fork, in_parent, in_child);
    (void)armed;
    return registry();
}

}  // namespace

Fd::Fd(int fd) : fd_(fd) {
    if (fd >= 0) {
        Registry& all = armed_registry();
        const std::lock_guard lock(all.mutex);
        try {
            all.open.insert(fd);
        } catch (...) {
            ::close(fd);
            throw;
        }
    }
}

void Fd::reset() noexcept {
    const int fd = release();
    if (fd >= 0) {
        ::close(fd);
    }
}

// Closed only if still registered: in a child the number may be somebody else's by now.
int Fd::release() noexcept {
    const int fd = std::exchange(fd_, -1);
    if (fd < 0) {
        return -1;
    }
    Registry& all = registry();
    const std::lock_guard lock(all.mutex);
    return all.open.erase(fd) != 0 ? fd : -1;
}

Fd make_eventfd() {
    const int fd = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (fd < 0) {
        throw std::system_error(errno, std::generic_category(), "eventfd");
    }
    return Fd(fd);
}

std::uint64_t fork_generation() noexcept { return registry().generation.load(std::memory_order_relaxed); }

}  // namespace kvt
