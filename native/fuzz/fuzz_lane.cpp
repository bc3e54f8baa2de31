// A lane's bytes, cut anywhere, into the memory of receives that are posted.
//
// The input is a program of eight-byte steps: chunks are put on the lane (well formed unless a step says how
// not), the lane is read a few bytes at a time as a socket would give them, receives are stopped in
// mid-chunk. Nothing may be stored outside of the ranges that the session let in, nothing after a receive is
// over, and with digests nothing but what the sender meant.
#include <cstring>
#include <memory>

#include "base/crc32c.hpp"
#include "fuzz/input.hpp"
#include "fuzz/mutator.hpp"
#include "fuzz/peer.hpp"
#include "fuzz/record.hpp"
#include "protocol/lane.hpp"

namespace kvt::fuzz {

using namespace protocol;

namespace {

constexpr std::size_t kReceives = 4;
constexpr std::size_t kMostStream = 1u << 16;
constexpr std::size_t kMostSteps = 200;
constexpr std::size_t kMostPieces = 8192;  // docs/reference/wire.md

/// What the sender means: byte `offset` of the transfer that `want` names.
std::byte meant(std::uint64_t want, std::uint64_t offset) {
    return static_cast<std::byte>((want * 131 + offset) * 2654435761u >> 13);
}

class Script final : public LaneHost {
  public:
    explicit Script(Input input) : input_(input), scratch_(300), ring_(700) {
        const Op op = input_.op();
        const DigestKind digest = (op.code & 1) != 0 ? DigestKind::crc32c : DigestKind::none;
        session_.open({.digest = digest}, now_);
        reader_ = std::make_unique<LaneReader>(*this, digest);
        digest_ = digest;
        staging_ = {scratch_.data(), scratch_.size(), (op.code & 2) != 0 ? ring_.data() : nullptr,
                    ring_.size()};
        const std::uint8_t shapes[] = {op.a, op.b, op.c, op.d};
        for (std::size_t i = 0; i < kReceives; ++i) {
            const bool large = i == 0 && (op.code & 4) != 0;  // it can be cut into more pieces than are kept
            const LocalPool& pool = local_pools()[large ? 1 : shapes[i] % local_pools().size()];
            const unsigned most = pool.piece_nbytes[0] > 1000 ? 2 : 24;  // small, so that inputs are many
            const unsigned blocks = large ? 4 : 1 + shapes[i] / 4 % most;
            Terms terms = terms_of(pool, static_cast<std::uint8_t>(blocks), 0, false);
            records_.push_back(
                std::make_shared<Record>(Role::destination, Peer::key_of(i), pool, std::move(terms)));
            records_.back()->limits = {kNever, kNever, kNever};
            session_.post(records_.back(), 1, now_);
        }
        session_.outbox().clear();
    }
    void run() {
        for (std::size_t i = 0; i < kMostSteps && !input_.empty() && !over_; ++i) step(input_.op());
        read(stream_.size());
        finish();
    }

    // LaneHost
    ChunkTarget chunk_begin(const Header& header) override {
        const ChunkTarget target = session_.chunk_begin(header, now_);
        auto& mine = static_cast<Record&>(*target.transfer);
        if (target.store) {
            demand(mine.outcomes == 0 && !mine.quiet, "a chunk is let in after the end");
            demand(target.range.end <= mine.nbytes && target.range.begin < target.range.end,
                   "a chunk beyond its transfer");
            demand(!mine.stored.overlaps(target.range), "bytes are let in twice");
            mine.stored.add(target.range);
            demand(mine.claimed.ranges().size() <= kMostPieces && mine.corrupt.ranges().size() <= kMostPieces,
                   "a transfer's pieces grow without bound");
        }
        now_target_ = target;
        return target;
    }
    void chunk_end(const ChunkTarget& target, const Trailer& trailer, bool verified) override {
        auto& mine = static_cast<Record&>(*target.transfer);
        if (target.store && trailer.status == ChunkStatus::ok && verified) mine.sealed.add(target.range);
        now_target_ = {};
        session_.chunk_end(target, trailer, verified, now_);
        collect();
    }
    void chunk_left(const ChunkJob&, bool, bool) override { broken("a reader says that a chunk has left"); }

  private:
    void step(const Op& op) {
        switch (op.code % 16) {
            case 14: stop(op.a % kReceives); break;
            case 15:
                most_runs_ = 3 + op.a % 12;
                most_nbytes_ = 1 + op.b * 8;
                break;
            case 8:
            case 9: read(1 + op.a % 16); break;
            case 10:
            case 11: read(op.a); break;
            case 12: read(op.a * 16u); break;
            case 13: put_comb(op); break;
            case 7: put_raw(op); break;
            default: put_chunk(op);
        }
    }

    // ---- the sender
    void put_chunk(const Op& op) {
        if (stream_.size() > kMostStream) return;
        Record& mine = *records_[op.a % kReceives];
        std::uint64_t& next = next_[op.a % kReceives];
        if ((op.d & 1) != 0)
            next = op.e * 64u % std::max<std::uint64_t>(mine.nbytes, 1);  // out of order, or again
        if (next >= mine.nbytes) next = 0;
        const std::uint64_t nbytes = std::min<std::uint64_t>(mine.nbytes - next,
                                                             1u + op.b + (op.c & 15u) * 256u);
        auto [frame, trailer] = chunk_of(mine, next, nbytes);
        next += nbytes;
        spoil(op, frame, trailer);
        append(frame, trailer);
    }
    // Every second byte, so that each is a piece of its own: from where the next chunk would begin.
    void put_comb(const Op& op) {
        if (stream_.size() > kMostStream) return;
        Record& mine = *records_[op.a % kReceives];
        std::uint64_t& next = next_[op.a % kReceives];
        const bool bad = (op.d & 1) != 0;
        for (std::size_t i = 0; i < 64u * (1u + op.b) && next < mine.nbytes; ++i, next += 2) {
            auto [frame, trailer] = chunk_of(mine, next, 1);
            if (bad) frame.body[0] ^= std::byte{1};
            append(frame, trailer);
        }
        tainted_ = tainted_ || (bad && digest_ == DigestKind::none);
    }
    std::pair<Frame, Trailer> chunk_of(const Record& mine, std::uint64_t offset, std::uint64_t nbytes) const {
        Frame frame{{.type = FrameType::chunk,
                     .attempt = 1,
                     .body_nbytes = static_cast<std::uint32_t>(nbytes),
                     .transfer = mine.want,
                     .offset = offset,
                     .total = mine.nbytes},
                    Bytes(nbytes)};
        for (std::uint64_t i = 0; i < nbytes; ++i) frame.body[i] = meant(mine.want, offset + i);
        Trailer trailer{ChunkStatus::ok, digest_, 0};
        if (digest_ == DigestKind::crc32c)
            trailer.digest = crc32c(digest_seed(frame.header), frame.body.data(), nbytes);
        return {std::move(frame), trailer};
    }
    void append(const Frame& frame, const Trailer& trailer) {
        Peer::append(stream_, frame);
        const auto tail = encode_trailer(trailer);
        stream_.insert(stream_.end(), tail.begin(), tail.end());
    }
    void spoil(const Op& op, Frame& frame, Trailer& trailer) {
        switch (op.code % 16) {
            case 3:
                Peer::spoil(frame, {op.code, op.a, op.b, op.c, op.d, op.e, op.f,
                                    static_cast<std::uint8_t>(192 + op.g % 14)});
                break;
            case 4: frame.body[op.f % frame.body.size()] ^= std::byte{1}; break;
            case 5:  // under another name: of the same length, so that only the seed can tell
                frame.header.transfer = records_[op.g % kReceives]->want;
                frame.header.total = records_[op.g % kReceives]->nbytes;
                frame.header.offset = op.f * 32u;
                break;
            case 6:
                trailer.status = static_cast<ChunkStatus>(op.e % 4);
                trailer.kind = static_cast<DigestKind>(op.f % 3);
                trailer.digest ^= op.g;
                break;
            default: return;
        }
        if (digest_ == DigestKind::none) tainted_ = true;  // nothing could tell
    }
    void put_raw(const Op& op) {
        if (stream_.size() > kMostStream) return;
        const auto raw = input_.take(kHeaderNbytes + op.b);
        const std::size_t at = stream_.size();
        stream_.insert(stream_.end(), raw.begin(), raw.end());
        if ((op.a & 1) != 0 && raw.size() >= kHeaderNbytes) {
            store_le(stream_.data() + at + 60, crc32c(0, stream_.data() + at, 60));
        }
        tainted_ = true;  // a sender may lie well
    }

    // ---- the socket
    void read(std::size_t nbytes) {
        while (nbytes > 0 && at_ < stream_.size() && !over_) {
            iovec iov[16];
            const std::size_t count = reader_->want(iov, most_runs_, most_nbytes_, staging_);
            demand(count > 0 && count <= most_runs_, "more runs than there is room for");
            std::size_t n = 0;
            for (std::size_t i = 0; i < count && nbytes > 0; ++i) {
                check_run(iov[i]);
                const std::size_t here = std::min({iov[i].iov_len, nbytes, stream_.size() - at_});
                std::memcpy(iov[i].iov_base, stream_.data() + at_, here);
                at_ += here;
                n += here;
                nbytes -= here;
            }
            if (n == 0) return;
            try {
                reader_->got(iov, count, n);
            } catch (const Violation&) {
                lose();
            } catch (const Excess&) {  // more pieces than are kept
                lose();
            }
        }
    }
    static bool within(const iovec& run, const void* from, std::size_t nbytes) noexcept {
        const auto* at = static_cast<const std::byte*>(run.iov_base);
        const auto* begin = static_cast<const std::byte*>(from);
        return at >= begin && at < begin + nbytes &&
               run.iov_len <= static_cast<std::size_t>(begin + nbytes - at);
    }
    void check_run(const iovec& run) const {
        demand(run.iov_len > 0, "an empty run");
        if (within(run, reader_.get(), sizeof *reader_) || within(run, scratch_.data(), scratch_.size()) ||
            within(run, ring_.data(), ring_.size())) {
            return;
        }
        demand(now_target_.store, "bytes would be stored that no chunk was let in for");
        const auto& mine = static_cast<const Record&>(*now_target_.transfer);
        const auto* at = static_cast<const std::byte*>(run.iov_base);
        const std::uint64_t begin = mine.offset_of(at), last = mine.offset_of(at + run.iov_len - 1);
        demand(begin >= now_target_.range.begin && last < now_target_.range.end,
               "bytes would be stored outside of the chunk's range");
        demand(last - begin == run.iov_len - 1, "a run crosses a guard");
        demand(!mine.quiet && mine.outcomes == 0, "bytes would be stored after the end");
    }

    // ---- the engine
    void stop(std::size_t which) {
        session_.stop(records_[which], {Cause::cancelled, Delivered::no, "stopped", {}}, now_);
        collect();
    }
    void lose() {
        over_ = true;
        session_.lost(Cause::protocol_error, "lost", now_);
        collect();
    }
    void collect() {
        for (const auto& transfer : session_.take_quiescing()) {
            if (reader_->uses(transfer.get())) {
                reader_->retarget();
                now_target_.store = false;
            }
            static_cast<Record&>(*transfer).quiet = true;
            session_.quiesced(transfer, now_);
        }
        for (const auto& transfer : session_.take_finished()) {
            auto& mine = static_cast<Record&>(*transfer);
            demand(++mine.outcomes == 1, "two outcomes");
            if (mine.outcome.cause == Cause::ok) {
                demand(mine.sealed.nbytes() == mine.nbytes, "received, and not all bytes have verified");
                check_bytes(mine);
            }
            as_it_ended_[&mine] = mine.memory();
        }
        session_.outbox().clear();
    }
    void check_bytes(const Record& mine) const {
        if (tainted_) return;
        for (std::uint64_t at = 0; at < mine.nbytes;) {
            iovec run;
            std::size_t count = 0;
            const std::uint64_t next = mine.runs(at, mine.nbytes, &run, 1, count);
            const auto* byte = static_cast<const std::byte*>(run.iov_base);
            for (; at < next; ++at, ++byte) demand(*byte == meant(mine.want, at), "sealed with other bytes");
        }
    }
    void finish() {
        if (!over_) lose();
        for (const auto& mine : records_) {
            demand(mine->outcomes == 1, "a transfer without an outcome");
            demand(as_it_ended_.contains(mine.get()) && as_it_ended_[mine.get()] == mine->memory(),
                   "memory changed after the end");
            // With what was let in taken out, it is as it was.
            std::vector<std::byte> rest = mine->memory();
            for (const Range& range : mine->stored.ranges()) {
                for (std::uint64_t at = range.begin; at < range.end;) {
                    iovec run;
                    std::size_t count = 0;
                    at = mine->runs(at, range.end, &run, 1, count);
                    std::memset(rest.data() + (static_cast<std::byte*>(run.iov_base) - mine->memory().data()),
                                std::to_integer<int>(kGuard), run.iov_len);
                }
            }
            demand(std::all_of(rest.begin(), rest.end(), [](std::byte byte) { return byte == kGuard; }),
                   "bytes were stored that no chunk was let in for");
        }
        demand(session_.unfinished() == 0, "a lost session keeps transfers");
    }

    Input input_;
    Time now_ = 1;
    Session session_;
    DigestKind digest_ = DigestKind::none;
    std::unique_ptr<LaneReader> reader_;
    std::vector<std::byte> scratch_, ring_;
    Staging staging_;
    std::size_t most_runs_ = 16, most_nbytes_ = 1u << 20;
    std::vector<std::shared_ptr<Record>> records_;
    std::uint64_t next_[kReceives] = {};
    Bytes stream_;
    std::size_t at_ = 0;
    ChunkTarget now_target_;
    bool tainted_ = false, over_ = false;
    std::map<const Record*, std::vector<std::byte>> as_it_ended_;
};

}  // namespace

}  // namespace kvt::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t nbytes) {
    kvt::fuzz::Script(kvt::fuzz::Input(data, nbytes)).run();
    return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t nbytes, std::size_t most,
                                               unsigned seed) {
    return kvt::fuzz::mutate_steps(data, nbytes, most, seed, {});
}
