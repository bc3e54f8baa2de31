// Control frames of a hostile peer into a session that is in the middle of things.
//
// The input is a program of eight-byte steps: the peer's frames (well formed unless a step says how not) and
// our own side's doings between them. Only Violation and Excess may come out of what the peer sends, nothing
// at all out of the rest; after each step the invariants of the design are looked at. An input needs no seed:
// see peer.hpp.
#include <sanitizer/allocator_interface.h>

#include <deque>
#include <memory>

#include "fuzz/input.hpp"
#include "fuzz/mutator.hpp"
#include "fuzz/peer.hpp"
#include "fuzz/record.hpp"
#include "protocol/frame_stream.hpp"
#include "protocol/session.hpp"

namespace kvt::fuzz {

using namespace protocol;

namespace {

constexpr std::size_t kMostRecords = 64;
constexpr std::size_t kMostSteps = 120;
constexpr std::uint64_t kPeerMayCostNbytes = 16u << 20;  // generous: what is unbounded passes any bound
constexpr std::size_t kOursNbytes = 256u << 10;          // of frames that our own user's doings made

class Script {
  public:
    Script(Input input, std::size_t base) : input_(input), base_nbytes_(base), peer_() {
        const Op op = input_.op();
        session_.set_grants(&grants_);
        config_ = {
            .capabilities = ((op.code & 1) != 0 ? kCanCopy : 0) | ((op.code & 16) == 0 ? kCanGrant : 0),
            .pulls = (op.code & 1) != 0,
            .digest = (op.code & 2) != 0 ? DigestKind::crc32c : DigestKind::none,
            .chunk_nbytes = 64u + op.a * 16u,
            .unmatched = 1u + op.b % 8u,
            .peer_unmatched = 1u + op.b / 8u % 8u,
            .regions = 2u + op.c % 8u,
            .peer_regions = (op.c & 64) != 0 ? 2u + op.c % 8u : 1024u,
            .message_window_nbytes = 2048,
            .message_queue_nbytes = 4096,
            .outbox_nbytes = 8192,
            .answers_nbytes = 16384,
            .peer_state_nbytes = 256u << 10};
        lazy_ = (op.code & 4) != 0;
        if ((op.code & 8) == 0) session_.open(config_, now_);
        opened_ = (op.code & 8) == 0;
    }
    void run() {
        for (std::size_t i = 0; i < kMostSteps && !input_.empty() && !over_; ++i) {
            step(input_.op());
            after_step();
        }
        end();
    }

  private:
    using RecordPtr = std::shared_ptr<Record>;

    // ---- what a step does
    void step(const Op& op) {
        if (op.code % 32 < 16) {
            const unsigned times = op.code >= 128 ? op.f : 1;
            for (unsigned i = 0; i < times && !over_; ++i) from_peer(op, i);
        } else if (op.code % 32 < 24) {
            local(op);
        } else {
            engine(op);
        }
    }
    void from_peer(const Op& op, unsigned nth) {
        if (!opened_) {
            session_.open(config_, now_);
            opened_ = true;
        }
        Op mine = op;
        if (nth > 0) mine.a = static_cast<std::uint8_t>(op.a + nth);
        Frame frame = frame_of(mine);
        if (op.g >= 192) Peer::spoil(frame, op);
        Bytes raw;
        Peer::append(raw, frame);
        if (frame.header.type == FrameType::chunk) {
            const auto tail = encode_trailer(trailer_of(op));
            raw.insert(raw.end(), tail.begin(), tail.end());
        }
        deliver(raw, mine);
    }
    Frame frame_of(const Op& op) {
        const Record* mine = record(op.a);
        switch (op.code % 32) {
            case 0: return peer_.pool(op);
            case 1: return peer_.close_pool(op);
            case 2: return peer_.want(op, can_copy() && (op.f & 1) == 0);
            case 3: return peer_.offer(op);
            case 4: return chunk_of(op, mine, kMaxInlineNbytes);
            case 5:
                return {{.type = FrameType::done,
                         .transfer = want_of(mine),
                         .total = mine ? mine->asked_nbytes : 0,
                         .arg = mine ? mine->chunks : 0},
                        {}};
            case 6: return ended(FrameType::abort, op, mine, 0);
            case 7: return ended(FrameType::abort, op, mine, kFromSource);
            case 8: return ended(FrameType::aborted, op, mine, 0);
            case 9: return ended(FrameType::aborted, op, mine, kFromSource);
            case 10:
                return {{.type = FrameType::gated,
                         .flags = static_cast<std::uint8_t>(op.b & 1),
                         .transfer = want_of(mine),
                         .arg = offer_of(mine)},
                        {}};
            case 11:
                return {{.type = FrameType::released, .transfer = want_of(mine)},
                        encode_released({op.b % 4u, op.c % 4u})};
            case 12: return {{.type = FrameType::message, .transfer = ++messages_sent_}, Bytes(op.c * 8u)};
            case 13: return {{.type = FrameType::message_ack, .transfer = op.b, .total = op.c * 16u}, {}};
            case 14: return of_copies(op, mine);
            default: return {{.type = FrameType::close, .arg = op.a % 4u}, {}};
        }
    }
    bool can_copy() const { return (config_.capabilities & kCanCopy) != 0; }
    Frame of_copies(const Op& op, const Record* mine) {
        switch (op.b % 8) {
            case 4: return peer_.read({op.code, op.f, op.c, op.d, op.a, op.e}, can_copy() && (op.f & 1) == 0);
            case 5: return peer_.write({op.code, op.f, op.c, op.d, op.a, op.e});
            case 6:
                if ((op.f & 3) == 3) return {{.type = FrameType::took}, encode_took({token_of(op.c), op.d})};
                return peer_.hold(op);
            case 7:
                return {{.type = FrameType::held,
                         .flags = static_cast<std::uint8_t>(op.d & 1),
                         .transfer = op.c % 4u + 1},
                        {}};
            case 0: return {{.type = FrameType::ping}, {}};
            case 1:
                return {{.type = FrameType::located,
                         .flags = static_cast<std::uint8_t>(op.d & 1),
                         .attempt = 1,
                         .transfer = want_of(mine),
                         .total = op.c * 1'000'000u,
                         .arg = offer_of(mine)},
                        Bytes(op.d)};
            case 2:
                return {{.type = FrameType::again, .attempt = 2, .transfer = want_of(mine)},
                        encode_ranges({{op.d, op.d + 1u + op.c}})};
            default: return {{.type = FrameType::copied, .transfer = want_of(mine), .total = op.c * 4u}, {}};
        }
    }
    static std::uint64_t want_of(const Record* mine) { return mine ? mine->want : 1; }
    /// What a source says of the OFFER that its transfer had.
    static std::uint64_t offer_of(const Record* mine) {
        return mine == nullptr ? 0 : mine->offer_known ? mine->offer_due : mine->partner;
    }
    static Frame ended(FrameType type, const Op& op, const Record* mine, std::uint8_t from) {
        const bool by_offer = (op.b & 1) != 0;
        const bool peers = (from == kFromSource) == by_offer;  // whose id it is
        Header header{.type = type, .flags = static_cast<std::uint8_t>(from | (by_offer ? kOfferId : 0))};
        header.transfer = peers && by_offer ? op.e
                          : mine == nullptr ? op.e
                          : by_offer        ? mine->id
                                            : mine->want;
        header.arg = (op.b & 2) != 0 ? op.e : mine ? mine->chunks : 0;
        return {header, type == FrameType::abort ? Peer::abort_body(op) : Bytes()};
    }
    /// The next bytes that a destination of ours waits for.
    static Frame chunk_of(const Op& op, const Record* mine, std::uint64_t most) {
        Header header{.type = FrameType::chunk,
                      .attempt = mine ? mine->attempt : std::uint16_t{1},
                      .arg = offer_of(mine)};
        header.transfer = want_of(mine);
        header.total = mine ? mine->nbytes : 0;
        header.offset = mine && !mine->stored.empty() && mine->stored.ranges()[0].begin == 0
                            ? mine->stored.ranges()[0].end
                            : 0;
        const std::uint64_t left = mine && mine->nbytes > header.offset ? mine->nbytes - header.offset : 1;
        return {header, Bytes(std::min<std::uint64_t>({left, most, 1u + (op.b & 127u) * 128u}))};
    }

    // As backends/tcp_control reads. One frame, whole: fuzz_stream cuts them.
    void deliver(std::span<const std::byte> raw, const Op& op) {
        try {
            while (!raw.empty() && !over_) {
                const auto room = frames_.room();
                const std::size_t n = std::min(room.size(), raw.size());
                std::copy_n(raw.begin(), n, room.begin());
                frames_.got(n);
                raw = raw.subspan(n);
                while (const auto frame = over_ ? std::nullopt : frames_.next()) act(*frame, op);
            }
            demand(over_ || frames_.empty(), "a header's body length isn't the body's");
        } catch (const Violation&) {
            lose(Cause::protocol_error);
        } catch (const Excess&) {
            lose(Cause::resource_limit);
        }
    }
    void act(const ControlFrame& frame, const Op& op) {
        if (frame.trailer) {
            finish_chunk(begin_chunk(frame.header), *frame.trailer, op);
            return;
        }
        session_.receive(frame.header, frame.body, now_);
        demand(session_.outbox().size() <= config_.answers_nbytes + kOursNbytes,
               "the outbox grew beyond its bound");
        if (session_.peer_closed()) lose(Cause::peer_lost);
    }
    ChunkTarget begin_chunk(const Header& header) {
        ChunkTarget target = session_.chunk_begin(header, now_);
        auto& mine = static_cast<Record&>(*target.transfer);
        if (target.store) {
            demand(mine.role == Role::destination && mine.outcomes == 0 && !mine.quiet,
                   "a chunk is let in after the end");
            demand(target.range.begin < target.range.end && target.range.end <= mine.nbytes,
                   "a chunk beyond its transfer");
            if (mine.attempt > 1 && !std::exchange(mine.asked_again, true)) mine.stored = mine.sealed;
            demand(!mine.stored.overlaps(target.range), "bytes are let in twice");
            mine.stored.add(target.range);
        }
        return target;
    }
    Trailer trailer_of(const Op& op) const {
        return {(op.d & 1) != 0 ? ChunkStatus::aborted : ChunkStatus::ok,
                (op.d & 2) != 0 ? DigestKind::none : config_.digest, 0};
    }
    void finish_chunk(const ChunkTarget& target, const Trailer& trailer, const Op& op) {
        const bool verified = (op.d & 4) == 0;
        auto& mine = static_cast<Record&>(*target.transfer);
        if (target.store && !mine.quiet && trailer.status == ChunkStatus::ok && verified)
            mine.sealed.add(target.range);
        session_.chunk_end(target, trailer, verified, now_);
    }

    // ---- our own side
    void local(const Op& op) {
        const RecordPtr mine = shared(op.a);
        switch (op.code % 32) {
            case 16: post(op, Role::source); break;
            case 17: post(op, Role::destination); break;
            case 18:
                if (mine) session_.stop(mine, {Cause::cancelled, Delivered::no, "stopped", {}}, now_);
                break;
            case 19: session_.refuse(Peer::key_of(op.a % 4), "refused", now_ + op.b, now_); break;
            case 20: post_message(op); break;
            case 21: take_messages(); break;
            case 22: pass_time(op); break;
            default: move_gate(op);
        }
    }
    void post(const Op& op, Role role) {
        if (records_.size() >= kMostRecords) return;
        const std::size_t which = op.b % local_pools().size();
        const LocalPool& pool = local_pools()[which];
        const auto mine = std::make_shared<Record>(
            role, Peer::key_of(op.a % 4), pool,
            terms_of(pool, op.c & 3, op.c >> 2 & 7, (op.c >> 5 & 1) != 0));
        mine->meta = (op.d & 1) != 0 ? "meta" : "";
        if ((op.d & 8) != 0) {
            auto use = std::make_shared<GrantUse>();
            use->token = token_of(op.e);
            mine->use = use;
        }
        mine->limits = {1000, 500, (op.d & 4) != 0 ? 2000 : kNever};
        if (role == Role::source && (op.d & 2) != 0) {
            mine->gate = gates_.emplace_back(std::make_shared<Gate>(4));
        }
        try {
            session_.post(mine, which + 1, now_);
            records_.push_back(mine);
        } catch (const LocalViolation&) {
        } catch (const Excess&) {
        }
    }
    void post_message(const Op& op) {
        const auto message = std::make_shared<Message>();
        message->data = Bytes(op.b * 4u);
        session_.post_message(message, now_);
        ++messages_posted_;
    }
    void take_messages() {
        if (inbox_.empty()) return;
        session_.messages_taken(inbox_.front().size());
        inbox_.pop_front();
    }
    void pass_time(const Op& op) {
        now_ += Time{op.b} * (op.c & 15);
        session_.on_time(now_);
        demand(session_.is_lost() || session_.next_deadline() > now_,
               "a deadline that has passed is waited for again");
    }
    void move_gate(const Op& op) {
        if (gates_.empty()) return;
        Gate& gate = *gates_[op.a % gates_.size()];
        switch (op.b % 4) {
            case 0:
                gate.fail("failed");
                session_.fail_gates(now_);
                break;
            case 1: gate.word()->store(std::max<std::uint64_t>(gate.word()->load(), op.c % 5u)); break;
            default: gate.mark(op.c % 4u);
        }
        session_.poll_gates(now_);
    }

    // ---- what the engine does: lanes, copies, quiescing
    void engine(const Op& op) {
        switch (op.code % 32) {
            case 24: answer_quiescing(op.a); break;
            case 25: take_job(op); break;
            case 26: finish_job(op); break;
            case 27: lane_begins(op); break;
            case 28: lane_ends(op); break;
            case 29: copy_begins(); break;
            case 30: lane_ends(op); break;
            default: seldom(op);
        }
    }
    void seldom(const Op& op) {
        switch (op.a % 16) {
            case 8: grants_.make(op.b), session_.grant_came(token_of(op.b), now_); break;
            case 9: end_grant(op.b); break;
            case 10: hold(op); break;
            case 11:
                if (!holds_.empty()) session_.let_go(holds_[op.b % holds_.size()]);
                break;
            case 12: session_.refuse(token_of(op.b), "refused", now_ + op.c, now_); break;
            case 0: session_.forget_pool(op.b % 4u + 1); break;
            case 1: session_.resumed(now_); break;
            case 2: session_.ping(); break;
            case 7: session_.set_pulls((op.b & 1) != 0, now_); break;
            case 3: reads_ = !reads_; break;  // the peer's side of our outbox
            case 4:
                if (op.b == 77) lose(Cause::peer_lost);
                break;
            case 5: session_.open(config_, now_), opened_ = true; break;
            default: session_.pump(now_);
        }
    }
    void end_grant(unsigned n) {
        for (const RecordPtr& record : grants_.end(n)) {
            session_.stop(record, {Cause::grant_stale, Delivered::no, {}, {}}, now_);
        }
        session_.hold_ended(token_of(n));
    }
    void hold(const Op& op) {
        try {
            const auto hold = std::make_shared<Hold>();
            hold->token = token_of(op.b);
            session_.post_hold(hold);
            holds_.push_back(hold);
        } catch (const LocalViolation&) {
        }
    }
    void answer_quiescing(std::size_t which) {
        if (quiescing_.empty()) return;
        const auto at = quiescing_.begin() + static_cast<std::ptrdiff_t>(which % quiescing_.size());
        const TransferPtr transfer = *at;
        quiescing_.erase(at);
        static_cast<Record&>(*transfer).quiet = true;
        for (auto job = jobs_.begin(); job != jobs_.end();) {  // LaneWriter::abandon
            if (job->transfer != transfer) {
                ++job;
                continue;
            }
            session_.chunk_left(*job, false, which % 2 == 0, now_);
            job = jobs_.erase(job);
        }
        for (ChunkTarget& target : targets_) {  // LaneReader::retarget
            if (target.transfer == transfer) target.store = false;
        }
        session_.quiesced(transfer, now_);
    }
    void note_job(const ChunkJob& job) {
        auto& mine = static_cast<Record&>(*job.transfer);
        demand(mine.role == Role::source && mine.outcomes == 0 && !mine.quiet,
               "bytes are sent after the end");
        demand(job.range.begin < job.range.end && job.range.end <= mine.nbytes, "a chunk beyond the source");
        demand(job.range.end - job.range.begin <= kMaxChunkNbytes, "a chunk is too long");
        demand(!mine.handed.overlaps(job.range), "bytes are sent twice");
        for (const LayerSpan& span : mine.spans) {
            if (!mine.gate || span.range.end <= job.range.begin || span.range.begin >= job.range.end)
                continue;
            demand(mine.gate->released(span.layer), "a layer is sent behind a shut gate");
        }
        mine.handed.add(job.range);
    }
    void take_job(const Op& op) {
        if (jobs_.size() >= 4) return;
        if (auto job = op.a % 2 == 0 ? session_.next_chunk(now_) : session_.next_inline(now_)) {
            note_job(*job);
            jobs_.push_back(*job);
        }
    }
    void finish_job(const Op& op) {
        if (jobs_.empty()) return;
        const auto at = jobs_.begin() + op.a % static_cast<std::ptrdiff_t>(jobs_.size());
        const ChunkJob job = *at;
        jobs_.erase(at);
        session_.chunk_left(job, true, true, now_);
    }
    void lane_begins(const Op& op) {
        if (targets_.size() >= 4 || !opened_) return;
        Frame frame = chunk_of(op, record(op.a), kMaxChunkNbytes);
        if (op.g >= 192) Peer::spoil(frame, op);
        frame.header.body_nbytes = static_cast<std::uint32_t>(frame.body.size());
        const auto raw = encode_header(frame.header);
        try {
            targets_.push_back(
                begin_chunk(decode_header(std::span<const std::byte, kHeaderNbytes>(raw), true)));
        } catch (const Violation&) {
            lose(Cause::protocol_error);
        }
    }
    void copy_begins() {
        if (targets_.size() >= 4) return;
        if (const auto target = session_.next_copy(now_)) {
            auto& mine = static_cast<Record&>(*target->transfer);
            demand(mine.outcomes == 0 && !mine.quiet, "a copy begins after the end");
            demand(target->range.end <= mine.nbytes, "a copy beyond its transfer");
            demand(!mine.stored.overlaps(target->range), "bytes are copied twice");
            mine.stored.add(target->range);
            targets_.push_back(*target);
        }
    }
    void lane_ends(const Op& op) {
        if (targets_.empty()) return;
        const auto at = targets_.begin() + op.a % static_cast<std::ptrdiff_t>(targets_.size());
        const ChunkTarget target = *at;
        targets_.erase(at);
        try {
            if (target.transfer->located && (op.d & 8) != 0) {
                session_.copy_broke(target, now_);
                return;
            }
            finish_chunk(target, trailer_of(op), op);
        } catch (const Violation&) {
            lose(Cause::protocol_error);
        }
    }

    // ---- after each step
    void lose(Cause cause) {
        if (over_) return;
        session_.lost(cause, "lost", now_);
        over_ = true;
    }
    void after_step() {
        if (opened_) session_.pump(now_);
        do {
            collect();
            while (!lazy_ && !quiescing_.empty()) answer_quiescing(0);
        } while (session_.has_output() && !over_ && reads_);
        if (reads_ || over_) read_outbox();
        demand(session_.tombstones() + session_.unfinished() <= records_.size() + grants_.served.size(),
               "more transfers than were posted");
        const std::size_t used = __sanitizer_get_current_allocated_bytes();
        demand(used < base_nbytes_ + kPeerMayCostNbytes, "a peer made us keep too much");
    }
    void collect() {
        for (auto& transfer : session_.take_quiescing()) quiescing_.push_back(std::move(transfer));
        for (const auto& transfer : session_.take_finished()) check_outcome(static_cast<Record&>(*transfer));
        for (const auto& message : session_.take_finished_messages()) {
            demand(message->finished, "a message that hasn't finished");
            ++messages_over_;
        }
        for (const auto& hold : session_.take_finished_holds()) {
            demand(std::erase(holds_, hold) == 1, "a lease ends twice");
        }
        for (auto& message : session_.take_messages()) {
            inbox_.push_back(std::move(message));
            session_.messages_queued(1);
        }
        if (reads_) read_outbox();
    }
    void check_outcome(Record& mine) {
        demand(++mine.outcomes == 1, "two outcomes");
        if (mine.outcome.cause != Cause::ok) {
            demand(mine.outcome.delivered != Delivered::yes, "failed and delivered");
            return;
        }
        if (mine.role == Role::destination) {
            demand(mine.sealed.nbytes() == mine.nbytes, "received, and not all bytes have verified");
        } else if (!mine.located) {
            demand(mine.handed.nbytes() + mine.resumed_nbytes == mine.asked_nbytes,
                   "sent, and not all bytes have left");
        } else {
            demand(mine.all_released, "sent, and not all layers were released");
        }
    }
    /// What we say must be what a peer accepts.
    void read_outbox() {
        Bytes& out = session_.outbox();
        for (std::size_t at = 0; at < out.size();) {
            demand(out.size() - at >= kHeaderNbytes, "half a header in the outbox");
            const Header header = decode_header(
                std::span<const std::byte, kHeaderNbytes>(out.data() + at, kHeaderNbytes), false);
            at += kHeaderNbytes;
            const std::span<const std::byte> body = std::span<const std::byte>(out).subspan(
                at, header.body_nbytes);
            at += header.body_nbytes;
            Peer::read_body(header, body);
        }
        out.clear();
    }
    void end() {
        lose(Cause::peer_lost);
        for (int turn = 0; turn < 4; ++turn) {
            collect();
            while (!quiescing_.empty()) answer_quiescing(0);
        }
        while (!jobs_.empty()) finish_job({});
        while (!targets_.empty()) lane_ends({});
        collect();
        post({}, Role::source);  // a lost session ends at once what is posted
        post({}, Role::destination);
        post_message({});
        collect();
        while (!quiescing_.empty()) answer_quiescing(0);
        collect();
        for (const RecordPtr& mine : records_) demand(mine->outcomes == 1, "a transfer without an outcome");
        for (const RecordPtr& mine : grants_.served)
            demand(mine->outcomes == 1, "served, without an outcome");
        demand(holds_.empty() && grants_.awaited.empty(), "a lease or a wait without an end");
        demand(session_.unfinished() == 0 && session_.tombstones() == 0, "a lost session keeps transfers");
        demand(messages_over_ == messages_posted_, "a message without an outcome");
    }

    const Record* record(std::size_t which) const {
        return records_.empty() ? nullptr : records_[which % records_.size()].get();
    }
    RecordPtr shared(std::size_t which) const {
        return records_.empty() ? nullptr : records_[which % records_.size()];
    }

    Input input_;
    std::size_t base_nbytes_;
    Peer peer_;
    Grants grants_;
    Session session_;
    SessionConfig config_;
    FrameReader frames_;
    Time now_ = 0;
    bool opened_ = false, lazy_ = false, reads_ = true, over_ = false;
    std::uint64_t messages_sent_ = 0, messages_posted_ = 0, messages_over_ = 0;
    std::vector<RecordPtr> records_;
    std::vector<std::shared_ptr<Gate>> gates_;
    std::vector<TransferPtr> quiescing_;
    std::vector<ChunkJob> jobs_;
    std::vector<ChunkTarget> targets_;
    std::deque<Bytes> inbox_;
    std::vector<HoldPtr> holds_;
};

/// Courses of events that chance takes long to find. Codes: see frame_of(), local(), engine().
const std::vector<Scene>& scenes() {
    static const std::vector<Scene> all = {
        {{16, 0, 0, 1}, {0, 0, 0}, {2, 0, 0, 1}, {25, 1}, {26}, {5, 0}},      // a send, all the way
        {{17, 0, 0, 1}, {4, 0, 127}, {4, 0, 127}},                            // a receive
        {{17, 0, 1, 1}, {27, 0, 127}, {28, 0}, {10, 0, 1}, {22, 0, 255, 4}},  // a receive over a lane, gated
        {{0, 0, 0}, {2, 0, 0, 1}, {1, 0}, {0, 0, 1}, {16, 0, 0, 1}},          // a pool's number used again
        {{0, 0, 0}, {16, 0, 0, 1, 2}, {2, 0, 0, 1}, {23, 0, 2, 0}, {25, 0}, {26}, {23, 0, 1, 4}},  // a gated
                                                                                                   // send
        {{0, 0, 0}, {16, 0, 0, 3}, {2, 0, 0, 3}, {25, 0}, {18, 0}, {26}, {5, 0}},  // stopped, and DONE anyhow
        {{17, 0, 0, 1},
         {18, 0},
         {24, 0},
         {0, 0, 0},
         {3, 0, 0, 1, 1},
         {9, 0},
         {17, 0, 0, 1}},                                                             // an OFFER after the end
        {{0, 0, 0}, {17, 0, 0, 1}, {14, 0, 1, 9, 1}, {11, 0, 0, 1}, {29}, {30, 0}},  // a copy, layer by layer
        {{0, 0, 0}, {17, 0, 0, 1}, {14, 0, 1, 9}, {29}, {30, 0, 0, 0, 8}, {4, 0, 127}},  // a copy breaks
        {{0, 0, 0}, {16, 0, 0, 1}, {2, 0, 0, 1}, {14, 0, 2, 99, 5}, {25, 1}, {26}},      // a source is asked
                                                                                         // again
        {{140, 0, 0, 0, 0, 0, 200, 0}, {20, 0, 9}, {13, 0, 1, 1}, {21}},                 // messages
        {{17, 0, 0, 1}, {27, 0, 1}, {18, 0}, {24, 0}, {7, 0, 2, 0, 0, 1}, {28, 0}},      // drained
        {{31, 8, 0}, {0, 0, 0}, {14, 0, 4, 1, 0}, {25, 1}, {31, 9, 0}, {26}},  // a read, and its end
        {{31, 8, 0}, {0, 0, 0}, {14, 0, 5, 1, 0}, {31, 9, 0}, {24, 0}},        // a write, likewise
        {{0, 0, 0}, {14, 0, 4, 1, 0, 9}, {14, 0, 6, 0, 1, 9}, {31, 8, 0}, {31, 12, 1}},  // waits, and a lease
    };
    return all;
}

}  // namespace

}  // namespace kvt::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t nbytes) {
    const std::size_t base = __sanitizer_get_current_allocated_bytes();
    kvt::fuzz::Script(kvt::fuzz::Input(data, nbytes), base).run();
    return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t nbytes, std::size_t most,
                                               unsigned seed) {
    return kvt::fuzz::mutate_steps(data, nbytes, most, seed, kvt::fuzz::scenes());
}
