#include "protocol/lane.hpp"

#include <algorithm>
#include <cstring>

#include "base/crc32c.hpp"

namespace kvt::protocol {

namespace {

// Runs shorter than this cost more as descriptors of a system call than as copies through a staging buffer
// that stays in cache. docs/explanation names the measurement.
constexpr std::uint64_t kStagedRunNbytes = 2048;
constexpr std::size_t kProbeRuns = 8;

// Zeros to send where a chunk must be padded.
const std::array<std::byte, 65'536>& padding() {
    static const std::array<std::byte, 65'536> zeros{};
    return zeros;
}

bool small_runs(const Transfer& transfer, std::uint64_t begin, std::uint64_t end) {
    iovec probe[kProbeRuns];
    std::size_t count = 0;
    const std::uint64_t reached = transfer.runs(begin, end, probe, kProbeRuns, count);
    return count == kProbeRuns && (reached - begin) / count < kStagedRunNbytes;
}

}  // namespace

// ---- writing

void LaneWriter::start(ChunkJob job) {
    job_ = std::move(job);
    abandoned_ = stale_ = false;
    header_ = encode_header(job_->header);
    out_ = digested_ = 0;
    digest_ = digest_seed(job_->header);
}

void LaneWriter::abandon() {
    if (!job_ || abandoned_) {
        return;
    }
    abandoned_ = true;
    const bool begun = out_ > 0;
    // Once the trailer is on its way it says OK, and what it speaks for has left.
    const bool whole = out_ > kHeaderNbytes + body_nbytes() && !stale_;
    host_.chunk_left(*job_, whole, begun);
    if (!begun) {
        job_.reset();
        return;
    }
    // The stream stays in step; the record goes, so that nothing keeps the transfer alive for a padded chunk.
    job_->transfer.reset();
}

std::size_t LaneWriter::gather(iovec* out, std::size_t most, std::size_t most_nbytes,
                               const Staging& staging) {
    std::size_t count = 0;
    if (out_ < kHeaderNbytes) {
        out[count++] = {header_.data() + out_, kHeaderNbytes - static_cast<std::size_t>(out_)};
    }
    const std::uint64_t body_at = out_ < kHeaderNbytes ? 0 : out_ - kHeaderNbytes;
    if (body_at < body_nbytes()) {
        count += payload(out + count, most - count - 1, most_nbytes, staging);
    }
    std::uint64_t planned = out_;
    for (std::size_t i = 0; i < count; ++i) {
        planned += out[i].iov_len;
    }
    const std::uint64_t trailer_at = kHeaderNbytes + body_nbytes();
    // What is read by a grant is looked at once more when all of it has been read, which only a system call
    // of its own can tell.
    const bool may_end = out_ >= trailer_at || abandoned_ || job_->transfer->ended == nullptr;
    if (planned >= trailer_at && may_end) {
        const std::size_t skip = static_cast<std::size_t>(planned - trailer_at);
        if (skip == 0) {
            stale_ = !abandoned_ && !job_->transfer->still_granted();
            const auto status = abandoned_ || stale_ ? ChunkStatus::aborted : ChunkStatus::ok;
            trailer_ = encode_trailer({status, digest_kind_, digest_kind_ == DigestKind::none ? 0 : digest_});
        }
        out[count++] = {trailer_.data() + skip, kTrailerNbytes - skip};
    }
    return count;
}

std::size_t LaneWriter::payload(iovec* out, std::size_t most, std::size_t most_nbytes,
                                const Staging& staging) {
    const std::uint64_t at = out_ < kHeaderNbytes ? 0 : out_ - kHeaderNbytes;
    const std::uint64_t left = body_nbytes() - at;
    if (abandoned_) {
        const std::size_t n = static_cast<std::size_t>(std::min<std::uint64_t>(left, padding().size()));
        out[0] = {const_cast<std::byte*>(padding().data()), n};
        return 1;
    }
    const std::uint64_t begin = job_->range.begin + at;
    std::uint64_t end = begin + std::min<std::uint64_t>(left, most_nbytes);
    std::size_t count = 0;
    std::uint64_t reached = begin;
    if (staging.ring != nullptr && small_runs(*job_->transfer, begin, end)) {
        end = std::min<std::uint64_t>(end, begin + staging.ring_nbytes);
        std::byte* to = staging.ring;
        while (reached < end) {
            iovec runs[64];
            std::size_t n = 0;
            reached = job_->transfer->runs(reached, end, runs, std::size(runs), n);
            for (std::size_t i = 0; i < n; ++i) {
                std::memcpy(to, runs[i].iov_base, runs[i].iov_len);
                to += runs[i].iov_len;
            }
        }
        out[0] = {staging.ring, static_cast<std::size_t>(reached - begin)};
        count = 1;
    } else {
        reached = job_->transfer->runs(begin, end, out, most, count);
    }
    if (digest_kind_ == DigestKind::crc32c) {
        digest(out, count, at);
    }
    return count;
}

// Of runs that begin at `offset` of the body. What a short write left over was digested before: only what
// lies beyond is new.
void LaneWriter::digest(const iovec* runs, std::size_t count, std::uint64_t offset) {
    for (std::size_t i = 0; i < count; ++i) {
        const std::uint64_t run_end = offset + runs[i].iov_len;
        if (run_end > digested_) {
            const auto skip = static_cast<std::size_t>(digested_ > offset ? digested_ - offset : 0);
            digest_ = crc32c(digest_, static_cast<const std::byte*>(runs[i].iov_base) + skip,
                             runs[i].iov_len - skip);
            digested_ = run_end;
        }
        offset = run_end;
    }
}

bool LaneWriter::wrote(std::size_t n) {
    out_ += n;
    if (out_ < kHeaderNbytes + body_nbytes() + kTrailerNbytes) {
        return false;
    }
    if (!abandoned_) {
        host_.chunk_left(*job_, !stale_, true);
    }
    job_.reset();
    return true;
}

// ---- reading

std::size_t LaneReader::want(iovec* out, std::size_t most, std::size_t most_nbytes, const Staging& staging) {
    staged_ = false;
    std::size_t count = 0;
    if (!in_chunk_) {
        out[count++] = {header_.data() + header_have_, kHeaderNbytes - header_have_};
        return count;
    }
    const std::uint64_t left = chunk_.body_nbytes - body_have_;
    std::uint64_t planned = 0;
    if (left > 0) {
        if (!target_.store) {
            planned = std::min<std::uint64_t>(left, staging.scratch_nbytes);
            out[count++] = {staging.scratch, static_cast<std::size_t>(planned)};
        } else {
            const std::uint64_t begin = target_.range.begin + body_have_;
            std::uint64_t end = begin + std::min<std::uint64_t>(left, most_nbytes);
            if (staging.ring != nullptr && small_runs(*target_.transfer, begin, end)) {
                staged_ = true;
                planned = std::min<std::uint64_t>(end - begin, staging.ring_nbytes);
                out[count++] = {staging.ring, static_cast<std::size_t>(planned)};
            } else {
                planned = target_.transfer->runs(begin, end, out, most - 2, count) - begin;
            }
        }
    }
    if (planned == left) {
        out[count++] = {trailer_.data() + trailer_have_, kTrailerNbytes - trailer_have_};
        out[count++] = {header_.data(), kHeaderNbytes};
    }
    return count;
}

void LaneReader::land(const iovec& run, std::size_t n) {
    if (staged_) {
        const auto* data = static_cast<const std::byte*>(run.iov_base);
        const std::uint64_t begin = target_.range.begin + body_have_;
        std::uint64_t reached = begin;
        while (reached < begin + n) {
            iovec runs[64];
            std::size_t count = 0;
            reached = target_.transfer->runs(reached, begin + n, runs, std::size(runs), count);
            for (std::size_t i = 0; i < count; ++i) {
                std::memcpy(runs[i].iov_base, data, runs[i].iov_len);
                data += runs[i].iov_len;
            }
        }
    }
    body_have_ += n;
}

void LaneReader::got(const iovec* stored, std::size_t count, std::size_t n) {
    for (std::size_t i = 0; i < count && n > 0; ++i) {
        const std::size_t here = std::min(n, stored[i].iov_len);
        n -= here;
        const auto* at = static_cast<const std::byte*>(stored[i].iov_base);
        if (at >= header_.data() && at < header_.data() + kHeaderNbytes) {
            header_have_ += here;
            if (header_have_ == kHeaderNbytes) {
                finish_header();
            }
        } else if (at >= trailer_.data() && at < trailer_.data() + kTrailerNbytes) {
            trailer_have_ += here;
            if (trailer_have_ == kTrailerNbytes) {
                finish_trailer();
            }
        } else {
            land(stored[i], here);
        }
    }
}

void LaneReader::finish_header() {
    header_have_ = 0;
    chunk_ = decode_header(std::span<const std::byte, kHeaderNbytes>(header_), true);
    target_ = host_.chunk_begin(chunk_);
    in_chunk_ = true;
    body_have_ = 0;
    trailer_have_ = 0;
}

// The digest is of the chunk's bytes where they lie now, not as they passed: what is sealed is what can be
// read. The chunk is small enough to be still in the second-level cache.
std::uint32_t LaneReader::digest_in_place() const {
    std::uint32_t digest = digest_seed(chunk_);
    std::uint64_t at = target_.range.begin;
    while (at < target_.range.end) {
        iovec runs[64];
        std::size_t count = 0;
        at = target_.transfer->runs(at, target_.range.end, runs, std::size(runs), count);
        for (std::size_t i = 0; i < count; ++i) {
            digest = crc32c(digest, runs[i].iov_base, runs[i].iov_len);
        }
    }
    return digest;
}

void LaneReader::finish_trailer() {
    const Trailer trailer = decode_trailer(std::span<const std::byte, kTrailerNbytes>(trailer_));
    bool verified = digest_kind_ == DigestKind::none;
    if (!verified && target_.store && trailer.status == ChunkStatus::ok) {
        verified = trailer.kind == digest_kind_ && trailer.digest == digest_in_place();
    }
    in_chunk_ = false;
    const ChunkTarget target = std::exchange(target_, {});
    host_.chunk_end(target, trailer, verified);
}

}  // namespace kvt::protocol
