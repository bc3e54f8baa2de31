#include "machine.hpp"

#include <cstring>

#include "base/crc32c.hpp"

namespace kvt::sim {

using namespace protocol;

namespace {

constexpr std::size_t kIov = 12;

std::size_t nbytes_of(const iovec* iov, std::size_t count) {
    std::size_t total = 0;
    for (std::size_t i = 0; i < count; ++i) {
        total += iov[i].iov_len;
    }
    return total;
}

}  // namespace

struct Machine::Lane final : LaneHost {
    Lane(Machine& m, Pipe& from, Pipe& to)
        : machine(m),
          in(from),
          out(to),
          reader(*this, m.setup_.config.digest),
          writer(*this, m.setup_.config.digest) {}

    ChunkTarget chunk_begin(const Header& header) override {
        machine.clock_.trace(
            "%c   chunk %llu+%llu..%llu begins on a lane", 'A' + static_cast<int>(machine.index_),
            static_cast<unsigned long long>(header.transfer), static_cast<unsigned long long>(header.offset),
            static_cast<unsigned long long>(header.offset + header.body_nbytes));
        return machine.session_.chunk_begin(header, machine.clock_.now());
    }
    void chunk_end(const ChunkTarget& target, const Trailer& trailer, bool verified) override {
        machine.session_.chunk_end(target, trailer, verified, machine.clock_.now());
    }
    void chunk_left(const ChunkJob& job, bool whole, bool begun) override {
        machine.session_.chunk_left(job, whole, begun, machine.clock_.now());
    }
    Staging staging() {
        return {scratch.data(), scratch.size(), machine.setup_.staging ? ring.data() : nullptr,
                machine.setup_.staging ? ring.size() : 0};
    }

    Machine& machine;
    Pipe &in, &out;
    LaneReader reader;
    LaneWriter writer;
    std::array<std::byte, 4096> scratch{}, ring{};
    std::weak_ptr<Record> writing;  // whose chunk the writer has
    Bytes chunk, last_chunk;        // what has left of it, and the one before
    iovec stored[kIov] = {};
    std::size_t stored_count = 0;
    bool tx_busy = false, rx_busy = false, tx_planned = false, rx_planned = false;
};

struct Machine::Copy {
    ChunkTarget target;
    TransferPtr source;
};

Machine::Machine(unsigned index, Clock& clock, Random& random, Checker& checker, MachineSetup setup)
    : index_(index),
      clock_(clock),
      random_(random),
      checker_(checker),
      setup_(std::move(setup)),
      memory_(setup_.pieces, random),
      session_(setup_.config),
      dialled_(setup_.dials ? std::make_unique<Session>() : nullptr) {
    own_grants();
}

Machine::~Machine() = default;

void Machine::connect(Machine& peer, Pipe& control_in, Pipe& control_out,
                      const std::vector<std::pair<Pipe*, Pipe*>>& lanes) {
    peer_ = &peer;
    control_in_ = &control_in;
    control_out_ = &control_out;
    control_in.set_reader([this] {
        if (!reading_control_) {
            reading_control_ = true;
            later(while_unlocked(), [this] { read_control(); });
        }
    });
    control_out.set_writer([this] { later(0, [this] { flush_control(); }); });
    for (const auto& [in, out] : lanes) {
        lanes_.push_back(std::make_unique<Lane>(*this, *in, *out));
        Lane* lane = lanes_.back().get();
        in->set_reader([this, lane] {
            if (!std::exchange(lane->rx_planned, true)) {
                later(while_unlocked(), [this, lane] { read_lane(*lane); });
            }
        });
        out->set_writer([this, lane] { later(0, [this, lane] { write_lane(*lane); }); });
    }
}

void Machine::later(Time delay, std::function<void()> what) {
    clock_.after(delay, [this, what = std::move(what)]() mutable {
        if (crashed_) {
            return;
        }
        if (clock_.now() < stalled_until_) {
            later(stalled_until_ - clock_.now(), std::move(what));
            return;
        }
        what();
    });
}

// ---- acting on the session's output

void Machine::settle() {
    const Time now = clock_.now();
    guarded([&] {
        session_.pump(now);
        if (!closed_) {
            put_inline();
        }
    });
    flush_control();
    collect(session_);
    if (dialled_ != nullptr) {
        collect(*dialled_);
    }
    for (Bytes& message : session_.take_messages()) {
        untaken_ += message.size();
        received_.push_back(std::move(message));
        session_.messages_queued(1);
    }
    if (session_.has_chunks() && !closed_) {
        for (const auto& lane : lanes_) {
            if (!lane->tx_busy && !std::exchange(lane->tx_planned, true)) {
                later(random_.between(0, 5 * kUs), [this, lane = lane.get()] { write_lane(*lane); });
            }
        }
    }
    if (session_.has_copies()) {
        start_copies();
    }
    set_timer();
    if (session_.gates_wait() && !std::exchange(polling_, true)) {
        later(random_.between(200 * kUs, 4 * kMs), [this] {
            polling_ = false;
            kick_gates();
        });
    }
}

void Machine::collect(Session& session) {
    for (const TransferPtr& transfer : session.take_quiescing()) {
        clock_.trace("%c quiesce %s '%s'", 'A' + static_cast<int>(index_), name_of(transfer->role),
                     transfer->key.c_str());
        later(while_unlocked(), [this, transfer] { quiesce(transfer); });
    }
    for (const TransferPtr& transfer : session.take_finished()) {
        over(transfer);
    }
    if (&session == &session_) {
        collect_leases();
    }
    for (const MessagePtr& message : session.take_finished_messages()) {
        checker_.message_over(*message);
    }
}

void Machine::kick_gates() {
    guarded([&] { session_.poll_gates(clock_.now()); });
    settle();
}

void Machine::set_timer() {
    const Time next = std::min(session_.next_deadline(), dialled_ ? dialled_->next_deadline() : kNever);
    if (next - clock_.now() > 100 * kSecond || next >= timer_at_) {
        return;  // never, or the last resort of what is served, which is over long before
    }
    timer_at_ = next;
    later(std::max<Time>(next - clock_.now(), 0) + random_.between(0, 2 * kMs), [this, next] {
        if (timer_at_ == next) {
            timer_at_ = kNever;
        }
        guarded([&] {
            session_.on_time(clock_.now());
            if (dialled_ != nullptr) dialled_->on_time(clock_.now());
        });
        settle();
    });
}

void Machine::over(const TransferPtr& transfer) {
    const auto record = std::static_pointer_cast<Record>(transfer);
    for (const auto& lane : lanes_) {
        const bool written = lane->tx_busy && lane->writer.uses(transfer.get());
        if (written || (lane->rx_busy && lane->reader.uses(transfer.get()))) {
            checker_.broken("over with a mover still in it");
        }
    }
    checker_.over(*record, memory_);
    if (record->ended != nullptr) {
        served_is_over(record);
        return;
    }
    --unfinished_;
    dialled_posts_.erase(transfer.get());
    for (const Row& row : record->history->rows) {
        for (const std::uint32_t block : row.blocks) {
            transfer->role == Role::source ? memory_.unread(row.layer, block)
                                           : memory_.disown(row.layer, block);
        }
    }
    if (on_over) {
        on_over(record);
    }
}

void Machine::quiesce(const TransferPtr& transfer) {
    if (movers_hold(transfer)) {
        later(random_.between(1, 20 * kUs), [this, transfer] { quiesce(transfer); });
        return;
    }
    for (const auto& lane : lanes_) {
        if (lane->reader.uses(transfer.get())) {
            lane->reader.retarget();
        }
        if (lane->writer.uses(transfer.get())) {
            guarded([&] { lane->writer.abandon(); });
            if (!std::exchange(lane->tx_planned, true)) {
                later(0, [this, lane = lane.get()] { write_lane(*lane); });
            }
        }
    }
    later(while_unlocked(), [this, transfer] {
        guarded([&] { home_of(transfer).quiesced(transfer, clock_.now()); });
        settle();
    });
}

bool Machine::movers_hold(const TransferPtr& transfer) const {
    if (transfer->located) {
        return transfer->active != 0;
    }
    return std::any_of(lanes_.begin(), lanes_.end(), [&](const auto& lane) {
        return (lane->tx_busy && lane->writer.uses(transfer.get())) ||
               (lane->rx_busy && lane->reader.uses(transfer.get()));
    });
}

// ---- control

void Machine::flush_control() {
    bool took = false;
    while (!closed_) {
        if (tx_.empty()) {
            took = took || !session_.outbox().empty();
            tx_.swap(session_.outbox());
        }
        const std::size_t n = std::min(tx_.size() - tx_at_, control_out_->room());
        if (n == 0) {
            break;
        }
        control_out_->write(tx_.data() + tx_at_, n);
        tx_at_ += n;
        if (tx_at_ == tx_.size()) {
            tx_.clear();
            tx_at_ = 0;
        }
    }
    if (took && !std::exchange(settling_, true)) {  // there is room again for what waited
        later(0, [this] {
            settling_ = false;
            settle();
        });
    }
}

void Machine::put_inline() {
    const Time now = clock_.now();
    while (auto job = session_.next_inline(now)) {
        Bytes& out = session_.outbox();
        const auto header = encode_header(job->header);
        out.insert(out.end(), header.begin(), header.end());
        const std::size_t body_at = out.size();
        for (std::uint64_t at = job->range.begin; at < job->range.end;) {
            iovec run{};
            std::size_t count = 0;
            at = job->transfer->runs(at, job->range.end, &run, 1, count);
            checker_.reads(static_cast<const Record&>(*job->transfer), memory_, run.iov_base);
            const auto* from = static_cast<const std::byte*>(run.iov_base);
            out.insert(out.end(), from, from + run.iov_len);
        }
        Trailer trailer{ChunkStatus::ok, setup_.config.digest, 0};
        if (trailer.kind == DigestKind::crc32c) {
            trailer.digest = crc32c(digest_seed(job->header), out.data() + body_at, job->header.body_nbytes);
        }
        if (random_.chance(setup_.corrupt_percent)) {
            out[body_at + random_.below(job->header.body_nbytes)] ^= std::byte{4};
            checker_.corrupted();
        }
        const bool granted = job->transfer->still_granted();
        trailer.status = granted ? ChunkStatus::ok : ChunkStatus::aborted;
        const auto raw = encode_trailer(trailer);
        out.insert(out.end(), raw.begin(), raw.end());
        session_.chunk_left(*job, granted, true, now);
    }
}

void Machine::read_control() {
    reading_control_ = false;
    if (closed_) {
        return;
    }
    const std::size_t n = random_.chance(70) ? control_in_->readable()
                                             : 1 + random_.below(1 + control_in_->readable());
    const std::span<std::byte> room = frames_.room();
    frames_.got(control_in_->read(room.data(), std::min(n, room.size())));
    while (!closed_ && receive_next()) {
        if (random_.chance(30)) {
            settle();
        }
    }
    settle();
    if (control_in_->readable() > 0 && !std::exchange(reading_control_, true)) {
        later(while_unlocked(), [this] { read_control(); });
    }
}

bool Machine::receive_next() {
    bool whole = false;
    guarded([&] {
        const auto frame = frames_.next();
        if (!frame) {
            return;
        }
        whole = true;
        const Header& header = frame->header;
        clock_.trace("%c   reads %s %llu arg %llu flags %u", 'A' + static_cast<int>(index_),
                     name_of(header.type), static_cast<unsigned long long>(header.transfer),
                     static_cast<unsigned long long>(header.arg), header.flags);
        if (frame->trailer) {
            receive_inline(header, frame->body.data(), *frame->trailer);
        } else {
            session_.receive(header, frame->body, clock_.now());
        }
        if (header.type == FrameType::took) {
            check_took({frame->body.begin(), frame->body.end()});
        }
    });
    return whole;
}

void Machine::receive_inline(const Header& header, const std::byte* body, const Trailer& trailer) {
    const ChunkTarget target = session_.chunk_begin(header, clock_.now());
    std::uint32_t digest = digest_seed(header);
    for (std::uint64_t at = target.range.begin; target.store && at < target.range.end;) {
        iovec run{};
        std::size_t count = 0;
        at = target.transfer->runs(at, target.range.end, &run, 1, count);
        checker_.stores(static_cast<const Record&>(*target.transfer));
        std::memcpy(run.iov_base, body, run.iov_len);
        body += run.iov_len;
        digest = crc32c(digest, run.iov_base, run.iov_len);
    }
    const bool verified = setup_.config.digest == DigestKind::none ||
                          (trailer.kind == setup_.config.digest && trailer.digest == digest);
    session_.chunk_end(target, trailer, target.store && verified, clock_.now());
}

// ---- lanes

// False when there is nothing to write.
bool Machine::start_chunk(Lane& lane) {
    std::optional<ChunkJob> job;
    guarded([&] { job = session_.next_chunk(clock_.now()); });
    if (!job) {
        return false;
    }
    job->transfer->moved_at = clock_.now();
    lane.writing = std::static_pointer_cast<Record>(job->transfer);
    lane.writer.start(std::move(*job));
    return true;
}

void Machine::write_lane(Lane& lane) {
    lane.tx_planned = false;
    if (closed_ || lane.tx_busy) {
        return;
    }
    if (lane.writer.idle() && !start_chunk(lane)) {
        return;
    }
    const std::size_t room = lane.out.room();
    if (room == 0) {
        return;  // the pipe calls when it has some
    }
    iovec iov[kIov];
    const std::size_t count = lane.writer.gather(iov, kIov, 1 + random_.below(8192), lane.staging());
    const std::size_t total = nbytes_of(iov, count);
    const std::size_t n = std::min(room, random_.chance(70) ? total : 1 + random_.below(total));
    Bytes bytes;
    for (std::size_t i = 0; i < count && bytes.size() < n; ++i) {
        const auto* from = static_cast<const std::byte*>(iov[i].iov_base);
        const std::size_t here = std::min(iov[i].iov_len, n - bytes.size());
        bytes.insert(bytes.end(), from, from + here);
        if (const auto record = lane.writing.lock(); memory_.holds(from)) {
            if (record == nullptr) checker_.broken("a mover reads what nobody sends");
            checker_.reads(*record, memory_, from);
        }
        if ((memory_.holds(from) || from == lane.ring.data()) && random_.chance(setup_.corrupt_percent)) {
            bytes[bytes.size() - here + random_.below(here)] ^= std::byte{1};
            checker_.corrupted();
        }
    }
    lane.out.write(bytes.data(), n);
    lane.chunk.insert(lane.chunk.end(), bytes.begin(), bytes.end());
    lane.tx_busy = true;
    const Time gap = random_.chance(40) ? setup_.slow : while_unlocked();
    if (gap == 0) {
        wrote(lane, n);
    } else {
        later(gap, [this, &lane, n] { wrote(lane, n); });
    }
}

void Machine::wrote(Lane& lane, std::size_t n) {
    lane.tx_busy = false;
    if (const auto record = lane.writing.lock()) {
        record->history->moved_at = clock_.now();
    }
    guarded([&] {
        if (lane.writer.wrote(n)) {
            lane.last_chunk = std::exchange(lane.chunk, {});
            replay(lane);
        }
    });
    settle();
    if (!lane.tx_busy && !std::exchange(lane.tx_planned, true)) {
        later(random_.between(0, 3 * kUs), [this, &lane] { write_lane(lane); });
    }
}

void Machine::read_lane(Lane& lane) {
    lane.rx_planned = false;
    if (closed_ || lane.rx_busy || lane.in.readable() == 0) {
        return;
    }
    lane.stored_count = lane.reader.want(lane.stored, kIov, 1 + random_.below(8192), lane.staging());
    std::size_t left = random_.chance(70) ? lane.in.readable() : 1 + random_.below(lane.in.readable()), n = 0;
    for (std::size_t i = 0; i < lane.stored_count && left > 0; ++i) {
        auto* to = static_cast<std::byte*>(lane.stored[i].iov_base);
        const std::size_t here = lane.in.read(to, std::min(left, lane.stored[i].iov_len));
        n += here;
        left -= here;
        if (memory_.holds(to)) {
            checker_.stores(static_cast<const Record&>(*lane.reader.transfer()));
            if (random_.chance(setup_.corrupt_percent)) {
                to[random_.below(here)] ^= std::byte{2};  // bad memory
                checker_.corrupted();
            }
        }
    }
    if (Transfer* transfer = lane.reader.transfer()) {
        transfer->moved_at = clock_.now();
    }
    lane.rx_busy = true;
    const Time gap = while_unlocked();
    if (gap == 0) {
        got(lane, n);
    } else {
        later(gap, [this, &lane, n] { got(lane, n); });
    }
}

void Machine::got(Lane& lane, std::size_t n) {
    lane.rx_busy = false;
    guarded([&] { lane.reader.got(lane.stored, lane.stored_count, n); });
    settle();
    if (lane.in.readable() > 0 && !std::exchange(lane.rx_planned, true)) {
        later(while_unlocked(), [this, &lane] { read_lane(lane); });
    }
}

void Machine::become_rogue() { rogue_ = true; }

// A rogue sends its next whole chunk twice, once.
void Machine::replay(Lane& lane) {
    if (rogue_ && !checker_.rogue() && !closed_ && lane.out.room() >= lane.last_chunk.size()) {
        clock_.trace("%c sends a chunk again", 'A' + static_cast<int>(index_));
        lane.out.write(lane.last_chunk.data(), lane.last_chunk.size());
        checker_.set_rogue();
    }
}

// ---- copies, as a memory backend

void Machine::start_copies() {
    while (copiers_ < lanes_.size()) {
        auto copy = std::make_shared<Copy>();
        std::optional<ChunkTarget> target;
        guarded([&] { target = session_.next_copy(clock_.now()); });
        if (!target) {
            return;
        }
        copy->target = std::move(*target);
        ++copiers_;
        later(while_unlocked(), [this, copy] { lend(copy); });
    }
}

void Machine::lend(const std::shared_ptr<Copy>& copy) {
    copy->source = peer_->session_.lend(copy->target.transfer->want, clock_.now());
    if (copy->source == nullptr) {
        finish_copy(copy);
        return;
    }
    const Range range = copy->target.range;
    const std::uint64_t middle = range.begin + random_.below(range.end - range.begin + 1);
    copy_bytes(*copy->source, *copy->target.transfer, range.begin, middle);
    later(while_unlocked(), [this, copy, middle] {
        copy_bytes(*copy->source, *copy->target.transfer, middle, copy->target.range.end);
        finish_copy(copy);
    });
}

void Machine::copy_bytes(const Transfer& source, Transfer& target, std::uint64_t begin, std::uint64_t end) {
    checker_.stores(static_cast<const Record&>(target));
    while (begin < end) {
        iovec from{}, to{};
        std::size_t count = 0;
        source.runs(begin, end, &from, 1, count);
        checker_.reads(static_cast<const Record&>(source), peer_->memory_, from.iov_base);
        target.runs(begin, end, &to, 1, count);
        const std::size_t n = std::min(from.iov_len, to.iov_len);
        std::memcpy(to.iov_base, from.iov_base, n);
        begin += n;
    }
    target.moved_at = clock_.now();
}

void Machine::finish_copy(const std::shared_ptr<Copy>& copy) {
    const bool lent = copy->source != nullptr;
    bool verified = lent;
    const bool granted = lent && copy->source->still_granted();
    if (lent) {
        peer_->session_.returned(copy->source, clock_.now());
        copy->source.reset();
        if (random_.chance(setup_.corrupt_percent)) {
            verified = false;
            checker_.corrupted();
        }
    }
    if (way_broke_ && random_.chance(50)) {
        guarded([&] { session_.copy_broke(copy->target, clock_.now()); });
        --copiers_;
        settle();
        return;
    }
    const Trailer trailer{granted ? ChunkStatus::ok : ChunkStatus::aborted, setup_.config.digest, 0};
    guarded([&] { session_.chunk_end(copy->target, trailer, verified, clock_.now()); });
    --copiers_;
    settle();
}

bool Machine::idle() const {
    return tx_.empty() && frames_.empty() && copiers_ == 0 && control_in_->drained() &&
           std::all_of(lanes_.begin(), lanes_.end(), [](const auto& lane) {
               return lane->writer.idle() && !lane->reader.in_chunk() && lane->in.drained();
           });
}

}  // namespace kvt::sim
