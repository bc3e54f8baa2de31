#include "backends/shm_segment.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <limits>
#include <string>
#include <system_error>

#include "protocol/bytes.hpp"

#ifndef F_SEAL_FUTURE_WRITE  // since Linux 5.1; older headers lack it
#define F_SEAL_FUTURE_WRITE 0x0010
#endif
#ifndef MADV_POPULATE_READ  // since Linux 5.14
#define MADV_POPULATE_READ 22
#endif
#ifndef MFD_NOEXEC_SEAL  // since Linux 6.3
#define MFD_NOEXEC_SEAL 0x0008U
#endif

namespace kvt::backends {

namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL;

// A call that a signal interrupts gives back what it had allocated: where signals come often, a large one
// would never end.
constexpr std::size_t kAllocatedAtOnce = std::size_t{64} << 20;

[[noreturn]] void fail(int error, const char* what) {
    throw std::system_error(error, std::generic_category(), what);
}

Fd make_memfd(const char* name) {
    constexpr unsigned kFlags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
    int fd = ::memfd_create(name, kFlags | MFD_NOEXEC_SEAL);  // some systems ask for it
    if (fd < 0 && errno == EINVAL) {
        fd = ::memfd_create(name, kFlags);
    }
    if (fd < 0) {
        fail(errno, "memfd_create");
    }
    return Fd(fd);
}

void allocate(int fd, std::size_t nbytes) {
    rlimit limit{};
    // Beyond it the kernel would send SIGXFSZ, which ends a process that doesn't expect it.
    if (::getrlimit(RLIMIT_FSIZE, &limit) == 0 && nbytes > limit.rlim_cur) {
        fail(EFBIG, "shared memory beyond ulimit -f");
    }
    for (std::size_t at = 0; at < nbytes;) {
        const std::size_t n = std::min(kAllocatedAtOnce, nbytes - at);
        if (::fallocate(fd, 0, static_cast<off_t>(at), static_cast<off_t>(n)) == 0) {
            at += n;
        } else if (errno != EINTR) {
            fail(errno, "allocating shared memory");
        }
    }
}

Mapped map(int fd, std::size_t nbytes, int protection) {
    void* const data = ::mmap(nullptr, nbytes, protection, MAP_SHARED, fd, 0);
    if (data == MAP_FAILED) {
        fail(errno, "mapping shared memory");
    }
    return {static_cast<std::byte*>(data), nbytes};
}

// Where a huge page of the file can be one of the address space. Linux places maps so only where the system
// hands out huge pages of shared memory by itself.
Mapped map_to_read(int fd, std::size_t nbytes) {
    constexpr std::size_t kHugePage = 2 << 20;
    if (nbytes < kHugePage) {
        return map(fd, nbytes, PROT_READ);
    }
    const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    const std::size_t whole = (nbytes + page - 1) / page * page, reserved = whole + kHugePage;
    constexpr int kNothing = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* const place = ::mmap(nullptr, reserved, PROT_NONE, kNothing, -1, 0);
    if (place == MAP_FAILED) {
        return map(fd, nbytes, PROT_READ);
    }
    auto* const low = static_cast<std::byte*>(place);
    const std::size_t before = (kHugePage - reinterpret_cast<std::uintptr_t>(low) % kHugePage) % kHugePage;
    std::byte* const data = low + before;
    if (::mmap(data, nbytes, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
        const int error = errno;
        ::munmap(low, reserved);
        fail(error, "mapping shared memory");
    }
    if (before > 0) {
        ::munmap(low, before);
    }
    ::munmap(data + whole, kHugePage - before);
    return {data, nbytes};
}

[[noreturn]] void refuse(const std::string& why) {
    throw protocol::Violation("shared memory of the peer's is refused: " + why);
}

void check_seals(int fd) {
    const int seals = ::fcntl(fd, F_GET_SEALS);
    if (seals < 0) {
        refuse("its descriptor is no memfd");
    }
    if ((seals & kSeals) != kSeals) {
        refuse("it isn't sealed");
    }
}

// With the seals, holes can't be made; those that were never filled would be filled by our reading, at our
// expense.
void check_extent(int fd, std::uint64_t nbytes) {
    constexpr std::uint64_t kStatBlock = 512;  // stat(2)
    struct stat status{};
    if (::fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) {
        refuse("its descriptor is no file");
    }
    if (nbytes == 0 || status.st_size < 0 || static_cast<std::uint64_t>(status.st_size) != nbytes) {
        refuse("it has " + std::to_string(status.st_size) + " bytes, not the " + std::to_string(nbytes) +
               " that were announced");
    }
    if (static_cast<std::uint64_t>(status.st_blocks) < nbytes / kStatBlock) {
        refuse("some of its pages aren't there");
    }
}

}  // namespace

Mapped::~Mapped() {
    if (data_ != nullptr) {
        ::munmap(data_, size_);
    }
}

OwnSegment::OwnSegment(const char* name, std::size_t nbytes) {
    if (nbytes == 0 || nbytes > static_cast<std::size_t>(std::numeric_limits<off_t>::max())) {
        fail(EFBIG, "shared memory");
    }
    fd_ = make_memfd(name);
    allocate(fd_.get(), nbytes);
    mapped_ = map(fd_.get(), nbytes, PROT_READ | PROT_WRITE);
    seal(fd_.get());
}

void seal(int fd) {
    const int seals = ::fcntl(fd, F_GET_SEALS);
    if (seals >= 0 && (seals & kSeals) == kSeals) {
        return;
    }
    if (::fcntl(fd, F_ADD_SEALS, kSeals) != 0) {
        fail(errno, "sealing shared memory");
    }
}

PeerSegment PeerSegment::open(Fd fd, std::uint64_t nbytes) {
    check_seals(fd.get());
    check_extent(fd.get(), nbytes);
    return PeerSegment(map_to_read(fd.get(), nbytes));
}

void PeerSegment::read_ahead(std::size_t begin, std::size_t end) const noexcept {
    const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    end = std::min(end, size());
    begin = begin / page * page;
    if (begin < end) {
        ::madvise(mapped_.data() + begin, end - begin, MADV_POPULATE_READ);  // EINVAL before Linux 5.14
    }
}

}  // namespace kvt::backends
