#include "memory.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

namespace kvt_limits {
namespace {

[[noreturn]] void fail(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

void* map(size_t nbytes, int prot, int flags, int fd) {
    void* data = mmap(nullptr, nbytes, prot, flags, fd, 0);
    if (data == MAP_FAILED) fail("mmap");
    return data;
}

// Odd, so every index up to 2^64 gives another word, and none of them is zero.
uint64_t pattern(uint64_t index) { return (index + 1) * 0x9E3779B97F4A7C15ULL; }

}  // namespace

Mapping::Mapping(void* data, size_t size) : data_(static_cast<std::byte*>(data)), size_(size) {}

Mapping::Mapping(Mapping&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
}

Mapping::~Mapping() {
    if (data_ != nullptr) munmap(data_, size_);
}

Mapping Mapping::anonymous(size_t nbytes) {
    Mapping mapping(map(nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1), nbytes);
    madvise(mapping.data_, nbytes, MADV_HUGEPAGE);  // best effort: a kernel without THP refuses
    return mapping;
}

Mapping Mapping::shared(int fd, size_t nbytes, bool writable) {
    const int prot = writable ? PROT_READ | PROT_WRITE : PROT_READ;
    return {map(nbytes, prot, MAP_SHARED, fd), nbytes};
}

int make_memfd(const char* name, size_t nbytes) {
    const int fd = memfd_create(name, MFD_CLOEXEC);
    if (fd < 0) fail("memfd_create");
    if (ftruncate(fd, static_cast<off_t>(nbytes)) != 0) fail("ftruncate");
    return fd;
}

void fill(std::byte* arena, size_t nbytes) {
    auto* words = reinterpret_cast<uint64_t*>(arena);
    for (size_t i = 0; i < nbytes / sizeof(uint64_t); ++i) words[i] = pattern(i);
}

bool verify(const std::byte* dst, const std::vector<Piece>& pieces) {
    uint64_t wrong = 0;
    for (const Piece& piece : pieces) {
        const auto* words = reinterpret_cast<const uint64_t*>(dst + piece.dst);
        const uint64_t first = piece.src / sizeof(uint64_t);
        for (uint64_t i = 0; i < piece.len / sizeof(uint64_t); ++i) wrong |= words[i] ^ pattern(first + i);
    }
    return wrong == 0;
}

void wipe(std::byte* dst, const std::vector<Piece>& pieces) {
    for (const Piece& piece : pieces) std::memset(dst + piece.dst, 0, piece.len);
}

}  // namespace kvt_limits
