#include "memory/gather.hpp"

#include <cstring>

namespace kvt::memory {

void gather(const iovec* runs, std::size_t n, std::byte* out) noexcept {
    for (std::size_t i = 0; i < n; out += runs[i++].iov_len)
        std::memcpy(out, runs[i].iov_base, runs[i].iov_len);
}

void scatter(const std::byte* in, const iovec* runs, std::size_t n) noexcept {
    for (std::size_t i = 0; i < n; in += runs[i++].iov_len)
        std::memcpy(runs[i].iov_base, in, runs[i].iov_len);
}

}  // namespace kvt::memory
