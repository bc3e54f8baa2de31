// The arenas that the limits move bytes between. What lives here: mappings, the pattern, the check of every
// byte. Invariant: the source holds the pattern and never changes, so the receiver checks what arrived
// without it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "work.hpp"

namespace kvt_limits {

// An mmap of `nbytes`, unmapped when it goes.
class Mapping {
  public:
    Mapping() = default;
    Mapping(Mapping&& other) noexcept;
    Mapping& operator=(Mapping&& other) noexcept;
    ~Mapping();

    // Private anonymous memory with huge pages advised: what numpy gives its users for large arrays.
    static Mapping anonymous(size_t nbytes);
    static Mapping shared(int fd, size_t nbytes, bool writable);

    std::byte* data() const { return data_; }
    size_t size() const { return size_; }
    explicit operator bool() const { return data_ != nullptr; }

  private:
    Mapping(void* data, size_t size);
    std::byte* data_ = nullptr;
    size_t size_ = 0;
};

int make_memfd(const char* name, size_t nbytes);

// Every 8-byte word of the arena gets a value of its own.
void fill(std::byte* arena, size_t nbytes);

// True if each piece's destination holds the pattern of its source bytes. Offsets and lengths: multiples
// of 8.
bool verify(const std::byte* dst, const std::vector<Piece>& pieces);

// Sets each piece's destination bytes to something that no source word is.
void wipe(std::byte* dst, const std::vector<Piece>& pieces);

}  // namespace kvt_limits
