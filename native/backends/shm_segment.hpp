// Memory that one process writes and others read: a memfd that is sealed, so that nobody can take its pages.
//
// Lives here: making and sealing one of our own, and taking one that a peer made. Not here: how its
// descriptor travels (shm_channel.hpp), what lies in it (shm_board.hpp, or a pool's blocks).
// Invariant: a segment that exists has all its pages until it goes, so that no access to it is a SIGBUS: ours
// were allocated before the first of them was touched, a peer's can't shrink. Ours is mapped writable only by
// us, since before the seals; a peer's is never mapped writable here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "base/fd.hpp"

namespace kvt::backends {

/// A mapping that ends with its owner.
class Mapped {
  public:
    Mapped() noexcept = default;
    Mapped(std::byte* data, std::size_t size) noexcept : data_(data), size_(size) {}
    Mapped(Mapped&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
    Mapped& operator=(Mapped&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        return *this;
    }
    ~Mapped();

    std::byte* data() const noexcept { return data_; }
    std::size_t size() const noexcept { return size_; }

  private:
    std::byte* data_ = nullptr;
    std::size_t size_ = 0;
};

/// Bytes of ours that peers may map to read. They are zero at first.
class OwnSegment {
  public:
    OwnSegment() noexcept = default;
    /// Throws std::system_error: what there is no room for (ENOSPC, ENOMEM, EFBIG), or what this kernel
    /// doesn't know. `name` is what /proc shows.
    OwnSegment(const char* name, std::size_t nbytes);

    std::byte* data() const noexcept { return mapped_.data(); }
    std::size_t size() const noexcept { return mapped_.size(); }
    int fd() const noexcept { return fd_.get(); }  // -1 in a child of fork()

  private:
    Fd fd_;
    Mapped mapped_;
};

/// For memory that was made elsewhere: nobody resizes it or maps it writable from now on; mappings that are
/// there stay writable. Nothing where it is so already. Throws std::system_error where it can't be sealed.
void seal(int fd);

/// Bytes of a peer's, to be read.
class PeerSegment {
  public:
    PeerSegment() noexcept = default;
    /// Takes what a peer says is a segment of `nbytes` bytes; the descriptor is closed, whatever comes of it.
    /// Throws protocol::Violation: it isn't what was said, or its pages could still be taken away.
    /// std::system_error: no room here for the mapping.
    static PeerSegment open(Fd fd, std::uint64_t nbytes);

    const std::byte* data() const noexcept { return mapped_.data(); }
    std::size_t size() const noexcept { return mapped_.size(); }
    /// Fills the page tables of [begin, end), as far as there is such a range, so that copies don't fault:
    /// 66 ms a GiB of small pages, nothing much of huge ones. Any thread may do it, beside copies.
    void read_ahead(std::size_t begin, std::size_t end) const noexcept;

  private:
    explicit PeerSegment(Mapped mapped) noexcept : mapped_(std::move(mapped)) {}
    Mapped mapped_;
};

}  // namespace kvt::backends
