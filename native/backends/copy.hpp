// Copying a range of a stream from memory to memory, run by run: what every backend does whose receiver can
// see the source.
//
// Lives here: the walk along the runs of both ends, and the copy. Not here: which runs (memory/plan.hpp),
// memory that can only be read by a system call (shm_copy.hpp), whether what was copied is good. Invariant:
// exactly the bytes of the range are loaded and stored, each once, in the order of the stream; what is
// contiguous at both ends is one copy.
#pragma once

#include <sys/uio.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace kvt::backends {

inline constexpr std::size_t kRunsAtOnce = 128;  // that are expanded; 2 KiB

/// What is fetched of the next run, at both ends, while one is copied: the processor itself doesn't look
/// beyond a run. Measured with random runs over 512 MiB, 1 / 2 threads on 2 cores (Zen 5), as a multiple of a
/// plain loop of memcpy in the same run: 64 KiB 1.03 / 1.01, 4 KiB 1.07 to 1.12 / 1.02 to 1.15, 1 KiB 1.07 /
/// 1.04; without it 0.99 / 1.00, 0.96 / 0.98, 0.92 / 0.94; half as much is as good, a quarter isn't.
/// Streaming stores instead of memcpy: 64 KiB 0.96 / 1.08, 4 KiB 0.74 / 0.89, 1 KiB 0.63 / 0.75, and what was
/// copied is then in no cache. A thread's share at a time (256 KiB to 4 MiB) makes no difference.
inline constexpr std::size_t kFetchedAhead = 1024;

/// A place in the runs of one end. `Runs` has runs() as memory::StreamPlan has it.
template <class Runs>
class RunCursor {
  public:
    RunCursor(const Runs& runs, std::uint64_t begin, std::uint64_t end)
        : runs_(runs), reached_(begin), end_(end) {}

    /// The run here, at least a byte. std::out_of_range where the stream ends before the range.
    const iovec& run() {
        if (at_ == count_) {
            reached_ = runs_.runs(reached_, end_, run_, kRunsAtOnce, count_);
            at_ = 0;
            if (count_ == 0) {
                throw std::out_of_range("a range beyond the stream's end");
            }
        }
        return run_[at_];
    }
    /// At most to this run's end.
    void advance(std::size_t n) noexcept {
        run_[at_].iov_base = static_cast<std::byte*>(run_[at_].iov_base) + n;
        run_[at_].iov_len -= n;
        at_ += run_[at_].iov_len == 0 ? 1 : 0;
    }
    /// The bytes here, if they are known already.
    iovec ahead() const noexcept { return at_ < count_ ? run_[at_] : iovec{}; }

  private:
    const Runs& runs_;
    std::uint64_t reached_;
    const std::uint64_t end_;
    std::size_t at_ = 0, count_ = 0;
    iovec run_[kRunsAtOnce];
};

/// Always inline: gcc takes a function that only prefetches for one that does nothing, and drops its calls.
template <int kForWriting>
[[gnu::always_inline]] inline void fetch(const iovec& run) noexcept {
    constexpr std::size_t kLine = 64;
    const auto* const from = static_cast<const std::byte*>(run.iov_base);
    const std::size_t nbytes = std::min(run.iov_len, kFetchedAhead);
    for (std::size_t i = 0; i < nbytes; i += kLine) {
        __builtin_prefetch(from + i, kForWriting);
    }
}

/// Copies [begin, end) of the stream from the runs of `source` to those of `destination`;
/// copied(from, to, nbytes) is called after each piece.
template <class Source, class Destination, class Copied>
void copy_runs(const Source& source, const Destination& destination, std::uint64_t begin, std::uint64_t end,
               const Copied& copied) {
    RunCursor from(source, begin, end);
    RunCursor to(destination, begin, end);
    for (std::uint64_t left = end - begin; left > 0;) {
        const iovec a = from.run(), b = to.run();
        const std::size_t n = std::min(a.iov_len, b.iov_len);
        from.advance(n);
        to.advance(n);
        fetch<0>(from.ahead());
        fetch<1>(to.ahead());
        std::memcpy(b.iov_base, a.iov_base, n);
        copied(a.iov_base, b.iov_base, n);
        left -= n;
    }
}

template <class Source, class Destination>
void copy_runs(const Source& source, const Destination& destination, std::uint64_t begin, std::uint64_t end) {
    copy_runs(source, destination, begin, end, [](const void*, const void*, std::size_t) {});
}

}  // namespace kvt::backends
