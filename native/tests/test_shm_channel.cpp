// Messages with descriptors: whole however they are cut, refused with all their descriptors closed, bounded.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "backends/shm_channel.hpp"

#include <dirent.h>
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <system_error>

#include "protocol/bytes.hpp"

using namespace kvt;
using namespace kvt::backends;

namespace {

std::size_t open_fds() {
    DIR* const all = ::opendir("/proc/self/fd");
    std::size_t n = 0;
    while (::readdir(all) != nullptr) {
        ++n;
    }
    ::closedir(all);
    return n;
}

Fd null_fd() { return Fd(::open("/dev/null", O_RDONLY | O_CLOEXEC)); }

bool is_null_device(int fd) {
    struct stat status{};
    struct stat null{};
    return ::fstat(fd, &status) == 0 && ::stat("/dev/null", &null) == 0 && status.st_rdev == null.st_rdev;
}

struct Pair {
    Pair() {
        int ends[2];
        REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
        here = Fd(ends[0]);
        there = Fd(ends[1]);
    }
    // As a peer might that isn't ours.
    void send(const void* bytes, std::size_t n, std::size_t fds) const {
        const Fd null = null_fd();
        iovec part{const_cast<void*>(bytes), n};
        alignas(cmsghdr) char control[CMSG_SPACE(253 * sizeof(int))] = {};
        msghdr header{};
        header.msg_iov = &part;
        header.msg_iovlen = 1;
        if (fds > 0) {
            header.msg_control = control;
            header.msg_controllen = CMSG_SPACE(fds * sizeof(int));
            cmsghdr* const rights = CMSG_FIRSTHDR(&header);
            rights->cmsg_level = SOL_SOCKET;
            rights->cmsg_type = SCM_RIGHTS;
            rights->cmsg_len = CMSG_LEN(fds * sizeof(int));
            for (std::size_t i = 0; i < fds; ++i) {
                const int raw = null.get();
                std::memcpy(CMSG_DATA(rights) + i * sizeof raw, &raw, sizeof raw);
            }
        }
        REQUIRE(::sendmsg(there.get(), &header, 0) == static_cast<ssize_t>(n));
    }
    Fd here, there;
};

// As the wire has it, written down by hand.
std::array<std::byte, 64> raw(std::uint32_t type, std::uint32_t magic = 0x314d4853) {
    std::array<std::byte, 64> bytes{};
    protocol::store_le(bytes.data(), magic);
    protocol::store_le(bytes.data() + 4, type);
    for (std::uint64_t i = 1; i < 4; ++i) {
        protocol::store_le(bytes.data() + 8 * i, i << 40 | i);
    }
    for (std::size_t i = 32; i < 64; ++i) {
        bytes[i] = static_cast<std::byte>(i);
    }
    return bytes;
}

// Reads until nothing is left; the messages that were whole.
std::vector<ShmReader::Received> read_all(int socket, ShmReader& reader) {
    std::vector<ShmReader::Received> all;
    while (read_some(socket, reader) == ShmRead::some) {
        if (auto received = reader.next()) {
            all.push_back(std::move(*received));
        }
    }
    return all;
}

bool refused(const void* bytes, std::size_t n, std::size_t fds, std::size_t fds_later = 0) {
    const Pair pair;
    const auto before = open_fds();
    bool violation = false;
    {
        ShmReader reader;
        try {
            pair.send(bytes, fds_later > 0 ? 1 : n, fds);
            if (fds_later > 0) {
                pair.send(static_cast<const std::byte*>(bytes) + 1, n - 1, fds_later);
            }
            read_all(pair.here.get(), reader);
        } catch (const protocol::Violation&) {
            violation = true;
        }
    }
    CHECK(open_fds() == before);
    return violation;
}

}  // namespace

TEST_CASE("messages arrive as they were sent, each with its descriptor") {
    const Pair pair;
    const auto before = open_fds();
    ShmWriter writer;
    std::array<std::byte, 32> nonce;
    nonce.fill(std::byte{9});
    REQUIRE(writer.push({ShmType::segment, 7, 4096}, null_fd()));
    REQUIRE(writer.push({ShmType::gone, 7}));
    REQUIRE(writer.push({ShmType::probe, 8, 0xffff'0000'1234'5678, 3, nonce}));
    REQUIRE(writer.push({ShmType::board, 0, 1}, null_fd()));
    REQUIRE(writer.push({ShmType::probed, 8, 0, 0, nonce}));
    CHECK(writer.flush(pair.there.get()));
    CHECK(writer.empty());
    CHECK(open_fds() == before);  // those that were sent are closed here
    ShmReader reader;
    {
        const auto all = read_all(pair.here.get(), reader);
        REQUIRE(all.size() == 5);
        CHECK(
            (all[0].message.type == ShmType::segment && all[0].message.id == 7 && all[0].message.a == 4096));
        CHECK((is_null_device(all[0].fd.get()) && is_null_device(all[3].fd.get())));
        CHECK((::fcntl(all[0].fd.get(), F_GETFD) & FD_CLOEXEC) != 0);
        CHECK((!all[1].fd && !all[2].fd && !all[4].fd));
        CHECK((all[2].message.a == 0xffff'0000'1234'5678 && all[2].message.b == 3));
        CHECK((all[2].message.bytes == nonce && all[4].message.bytes == nonce));
    }
    CHECK(open_fds() == before);
    pair.send("x", 1, 0);
    REQUIRE(::shutdown(pair.there.get(), SHUT_RDWR) == 0);
    CHECK(read_some(pair.here.get(), reader) == ShmRead::some);
    CHECK(read_some(pair.here.get(), reader) == ShmRead::ended);
    CHECK_FALSE(reader.next());
}

TEST_CASE("a message is the same in one piece and byte by byte, and as the wire has it") {
    const auto bytes = raw(1);
    for (const std::size_t piece : {1u, 7u, 63u, 64u}) {
        const Pair pair;
        ShmReader reader;
        for (int twice = 0; twice < 2; ++twice) {
            for (std::size_t at = 0; at < bytes.size(); at += piece) {
                pair.send(bytes.data() + at, std::min(piece, bytes.size() - at), at == 0 ? 1 : 0);
            }
        }
        const auto all = read_all(pair.here.get(), reader);
        REQUIRE(all.size() == 2);
        for (const auto& [message, fd] : all) {
            CHECK(is_null_device(fd.get()));
            CHECK((message.type == ShmType::segment && message.id == (1ull << 40 | 1)));
            CHECK((message.a == (2ull << 40 | 2) && message.b == (3ull << 40 | 3)));
            CHECK(message.bytes[31] == std::byte{63});
        }
        ShmWriter writer;
        REQUIRE(writer.push(all[0].message, null_fd()));
        REQUIRE(writer.flush(pair.there.get()));
        std::array<std::byte, 64> sent{};
        REQUIRE(::recv(pair.here.get(), sent.data(), sent.size(), 0) == 64);
        CHECK(sent == bytes);
    }
}

TEST_CASE("a full socket is waited out without losing a byte or a descriptor") {
    const Pair pair;
    const auto before = open_fds();
    const int small = 2048;
    REQUIRE(::setsockopt(pair.there.get(), SOL_SOCKET, SO_SNDBUF, &small, sizeof small) == 0);
    {
        ShmWriter writer;
        ShmReader reader;
        std::uint64_t pushed = 0, got = 0;
        while (writer.push({ShmType::segment, pushed, 1}, null_fd())) {
            ++pushed;
        }
        CHECK(pushed == kShmQueuedFds);
        Fd kept = null_fd();
        CHECK_FALSE(writer.push({ShmType::segment, pushed, 1}, std::move(kept)));
        CHECK(kept);  // it wasn't taken
        while (writer.push({ShmType::gone, pushed})) {
            ++pushed;
        }
        CHECK(pushed == kShmQueuedMessages);
        CHECK_FALSE(writer.flush(pair.there.get()));
        for (bool done = false; !done;) {
            done = writer.flush(pair.there.get());
            for (const auto& [message, fd] : read_all(pair.here.get(), reader)) {
                REQUIRE(message.id == got++);
                REQUIRE(static_cast<bool>(fd) == (message.type == ShmType::segment));
            }
        }
        CHECK(got == pushed);
    }
    CHECK(open_fds() == before);
}

TEST_CASE("M17: what is no message is a violation, and every descriptor of it is closed") {
    const auto segment = raw(1), gone = raw(2);
    CHECK_FALSE(refused(segment.data(), 64, 1));
    CHECK_FALSE(refused(gone.data(), 64, 0));
    for (const std::size_t fds : {2u, 3u, 250u}) {
        CHECK(refused(segment.data(), 64, fds));
        CHECK(refused(segment.data(), 1, fds));  // before the message is whole
        CHECK(refused(segment.data(), 64, 1, fds));
    }
    CHECK(refused(segment.data(), 64, 1, 1));        // with the first byte and the second
    CHECK_FALSE(refused(segment.data(), 64, 0, 1));  // somewhere in it is enough
    CHECK(refused(segment.data(), 64, 0));
    CHECK(refused(gone.data(), 64, 1));
    for (const std::uint32_t type : {0u, 8u, ~0u}) {
        CHECK(refused(raw(type).data(), 64, 0));
        CHECK(refused(raw(type).data(), 64, 1));
    }
    CHECK(refused(raw(1, 0x314d4852).data(), 64, 1));
}

#if !defined(__SANITIZE_ADDRESS__)  // UBSan needs two descriptors to look at an exception
TEST_CASE("want of descriptors here is our error, not the peer's") {
    const Pair pair;
    pair.send(raw(1).data(), 64, 1);
    const auto before = open_fds();
    rlimit was{};
    REQUIRE(::getrlimit(RLIMIT_NOFILE, &was) == 0);
    const Fd next = null_fd();
    const rlimit none{static_cast<rlim_t>(next.get()), was.rlim_max};
    REQUIRE(::setrlimit(RLIMIT_NOFILE, &none) == 0);
    ShmReader reader;
    CHECK_THROWS_AS(read_some(pair.here.get(), reader), std::system_error);
    REQUIRE(::setrlimit(RLIMIT_NOFILE, &was) == 0);
    CHECK(open_fds() == before + 1);
}
#endif

TEST_CASE("misuse: a descriptor more or less than the type has") {
    ShmWriter writer;
    CHECK_THROWS_AS(writer.push({ShmType::segment}), std::invalid_argument);
    CHECK_THROWS_AS(writer.push({ShmType::probe}, null_fd()), std::invalid_argument);
    CHECK(writer.empty());
}

TEST_CASE("a closed socket is an error, and no signal") {
    Pair pair;
    pair.here.reset();
    ShmWriter writer;
    REQUIRE(writer.push({ShmType::gone, 1}));
    CHECK_THROWS_AS(writer.flush(pair.there.get()), std::system_error);
}

TEST_CASE("M19: who is at the other end, and that it is our user") {
    const Pair pair;
    CHECK(same_user_pid(pair.here.get()) == ::getpid());
    CHECK_THROWS_AS(same_user_pid(null_fd().get()), std::system_error);
    if (::geteuid() != 0) {
        MESSAGE("not run: another user's end needs root");
        return;
    }
    const Fd listener(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un any{};
    any.sun_family = AF_UNIX;
    REQUIRE(::bind(listener.get(), reinterpret_cast<sockaddr*>(&any), sizeof(sa_family_t)) == 0);
    socklen_t nbytes = sizeof any;
    REQUIRE(::getsockname(listener.get(), reinterpret_cast<sockaddr*>(&any), &nbytes) == 0);
    REQUIRE(::listen(listener.get(), 1) == 0);
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
        const int socket = ::socket(AF_UNIX, SOCK_STREAM, 0);
        const bool connected = ::setuid(65534) == 0 &&
                               ::connect(socket, reinterpret_cast<sockaddr*>(&any), nbytes) == 0;
        ::_exit(connected ? 0 : 1);
    }
    int status = 1;
    REQUIRE(::waitpid(child, &status, 0) == child);
    REQUIRE(status == 0);
    const Fd accepted(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
    CHECK_THROWS_WITH_AS(same_user_pid(accepted.get()), doctest::Contains("run by user 65534"),
                         protocol::Violation);
}

TEST_CASE("a peer's segments: by number, bounded, and mapped while somebody holds one") {
    PeerSegments segments;
    const auto make = [] {
        const OwnSegment own("test", 4096);
        return PeerSegment::open(Fd(::fcntl(own.fd(), F_DUPFD_CLOEXEC, 0)), 4096);
    };
    for (std::uint64_t id = 0; id < kShmPeerSegments; ++id) {
        segments.add(id, make());
    }
    CHECK_THROWS_AS(segments.add(kShmPeerSegments, make()), protocol::Excess);
    const auto held = segments.find(5);
    segments.remove(5);
    CHECK_FALSE(segments.find(5));
    CHECK(held->data()[4095] == std::byte{0});
    CHECK_THROWS_AS(segments.remove(5), protocol::Violation);
    CHECK_THROWS_AS(segments.add(6, make()), protocol::Violation);
    segments.add(5, make());
    CHECK(segments.find(5));
}
