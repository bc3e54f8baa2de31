// Shared memory: what of a peer's is mapped and what is refused, and what the seals keep everybody from.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "backends/shm_segment.hpp"

#include <dirent.h>
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <system_error>
#include <vector>

#include "protocol/bytes.hpp"

using namespace kvt;
using namespace kvt::backends;

namespace {

constexpr std::size_t kNbytes = (1 << 20) + 4096;
constexpr int kFutureWrite = 0x0010;
constexpr int kEverySeal = F_SEAL_SHRINK | F_SEAL_GROW | kFutureWrite | F_SEAL_SEAL;

std::size_t open_fds() {
    DIR* const all = ::opendir("/proc/self/fd");
    std::size_t n = 0;
    while (::readdir(all) != nullptr) {
        ++n;
    }
    ::closedir(all);
    return n;
}

Fd duplicate(int fd) { return Fd(::fcntl(fd, F_DUPFD_CLOEXEC, 0)); }

Fd memfd(std::size_t nbytes, int seals, bool filled = true) {
    Fd fd(::memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    REQUIRE(::ftruncate(fd.get(), static_cast<off_t>(nbytes)) == 0);
    if (filled) {
        REQUIRE(::fallocate(fd.get(), 0, 0, static_cast<off_t>(nbytes)) == 0);
    }
    if (seals != 0) {
        REQUIRE(::fcntl(fd.get(), F_ADD_SEALS, seals) == 0);
    }
    return fd;
}

std::string refusal(Fd fd, std::uint64_t nbytes) {
    REQUIRE(fd);
    try {
        PeerSegment::open(std::move(fd), nbytes);
    } catch (const protocol::Violation& violation) {
        return violation.what();
    }
    return "";
}

bool says(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST_CASE("what the owner writes after sealing is what the peer reads, also when the owner has gone") {
    OwnSegment own("test", kNbytes);
    REQUIRE(own.size() == kNbytes);
    const PeerSegment peer = PeerSegment::open(duplicate(own.fd()), kNbytes);
    REQUIRE(peer.size() == kNbytes);
    CHECK(peer.data()[kNbytes - 1] == std::byte{0});
    own.data()[0] = std::byte{1};
    own.data()[kNbytes - 1] = std::byte{2};
    CHECK(peer.data()[0] == std::byte{1});
    own = OwnSegment();
    CHECK(peer.data()[kNbytes - 1] == std::byte{2});
}

TEST_CASE("a large one is mapped where huge pages can be, and read ahead wherever it is asked") {
    constexpr std::size_t kLarge = (5 << 20) + 1;
    const OwnSegment own("test", kLarge);
    const PeerSegment peer = PeerSegment::open(duplicate(own.fd()), kLarge);
    CHECK(reinterpret_cast<std::uintptr_t>(peer.data()) % (2 << 20) == 0);
    own.data()[kLarge - 1] = std::byte{3};
    peer.read_ahead(0, kLarge);
    peer.read_ahead(4097, ~std::size_t{0});
    peer.read_ahead(kLarge, kLarge + 1);
    peer.read_ahead(~std::size_t{0}, 0);
    std::vector<unsigned char> there((kLarge + 4095) / 4096);
    REQUIRE(::mincore(const_cast<std::byte*>(peer.data()), kLarge, there.data()) == 0);
    CHECK(std::count(there.begin(), there.end(), 0) == 0);
    CHECK(peer.data()[kLarge - 1] == std::byte{3});
}

TEST_CASE("M17: what is no sealed memfd of the announced size is refused, and closed") {
    const std::size_t before = open_fds();
    CHECK(says(refusal(Fd(::open("/dev/zero", O_RDWR | O_CLOEXEC)), kNbytes), "no memfd"));
    CHECK(says(refusal(Fd(::open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC)), kNbytes), "no memfd"));
    CHECK(says(refusal(Fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)), kNbytes), "no memfd"));
    CHECK(says(refusal(Fd(::open("/proc/self/exe", O_RDONLY | O_CLOEXEC)), kNbytes), "no memfd"));
    CHECK(says(refusal(memfd(kNbytes, 0), kNbytes), "isn't sealed"));
    for (const int missing : {F_SEAL_SHRINK, F_SEAL_GROW, kFutureWrite, F_SEAL_SEAL}) {
        CHECK(says(refusal(memfd(kNbytes, kEverySeal & ~missing), kNbytes), "isn't sealed"));
    }
    for (const std::uint64_t announced : {kNbytes + 1, kNbytes - 1, std::size_t{0}, ~std::size_t{0}}) {
        CHECK(says(refusal(memfd(kNbytes, kEverySeal), announced), "not the"));
    }
    CHECK(says(refusal(memfd(0, kEverySeal, false), 0), "not the"));
    CHECK(says(refusal(memfd(kNbytes, kEverySeal, false), kNbytes), "aren't there"));
    CHECK(refusal(memfd(kNbytes, kEverySeal), kNbytes).empty());
    CHECK(open_fds() == before);
}

TEST_CASE("M18: who holds the descriptor can neither take pages away nor write") {
    const OwnSegment own("test", kNbytes);
    const Fd fd = duplicate(own.fd());
    CHECK(::ftruncate(fd.get(), 0) != 0);
    CHECK(::ftruncate(fd.get(), 2 * kNbytes) != 0);
    CHECK(::fallocate(fd.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096) != 0);
    CHECK(::pwrite(fd.get(), "x", 1, 0) < 0);
    CHECK(::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_WRITE) != 0);
    CHECK(::mmap(nullptr, kNbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0) == MAP_FAILED);
    void* const readable = ::mmap(nullptr, kNbytes, PROT_READ, MAP_SHARED, fd.get(), 0);
    REQUIRE(readable != MAP_FAILED);
    CHECK(::mprotect(readable, kNbytes, PROT_READ | PROT_WRITE) != 0);
    CHECK(::madvise(readable, kNbytes, MADV_REMOVE) != 0);
    CHECK(::munmap(readable, kNbytes) == 0);
}

TEST_CASE("memory that was made elsewhere is sealed once, and stays writable where it is mapped") {
    const Fd fd = memfd(kNbytes, 0);
    void* const data = ::mmap(nullptr, kNbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
    REQUIRE(data != MAP_FAILED);
    seal(fd.get());
    seal(fd.get());
    const PeerSegment peer = PeerSegment::open(duplicate(fd.get()), kNbytes);
    std::memset(data, 7, kNbytes);
    CHECK(peer.data()[kNbytes / 2] == std::byte{7});
    ::munmap(data, kNbytes);
    const Fd zero(::open("/dev/zero", O_RDWR | O_CLOEXEC));
    CHECK_THROWS_AS(seal(zero.get()), std::system_error);
    const Fd closed_for_seals = memfd(kNbytes, F_SEAL_SEAL);
    CHECK_THROWS_AS(seal(closed_for_seals.get()), std::system_error);
}

TEST_CASE("want of room is an error, of the limits too, and leaves no descriptor") {
    const std::size_t before = open_fds();
    const auto error_of = [](std::size_t nbytes) {
        try {
            const OwnSegment own("test", nbytes);
        } catch (const std::system_error& error) {
            return error.code().value();
        }
        return 0;
    };
    CHECK(error_of(0) == EFBIG);
    CHECK(error_of(~std::size_t{0}) == EFBIG);
    rlimit was{};
    REQUIRE(::getrlimit(RLIMIT_FSIZE, &was) == 0);
    const rlimit small{kNbytes, was.rlim_max};
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
    CHECK(error_of(kNbytes + 1) == EFBIG);  // and no SIGXFSZ
    CHECK(error_of(kNbytes) == 0);
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &was) == 0);
    CHECK(open_fds() == before);
}
