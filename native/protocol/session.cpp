#include "protocol/session.hpp"

#include <algorithm>

namespace kvt::protocol {

namespace {

// Ended destinations that wait for the source's last word; beyond, new posts wait here.
constexpr std::size_t kTombstonesPerUnmatched = 4;

// Of the memory that we may take at the peer: a half for pools, a quarter for what is told first, and with
// the answers to OFFERs a half.
constexpr std::size_t kPoolsShare = 2;
constexpr std::size_t kToldShare = 4;
constexpr std::size_t kAnsweredShare = 2;

// What the peer is told where the user gave no reason.
const char* reason_for(Cause cause) noexcept {
    switch (cause) {
        case Cause::timeout_match: return "its match_timeout_s is over";
        case Cause::timeout_gate: return "its match_timeout_s is over, with the layer gate shut";
        case Cause::timeout_bytes: return "its stall_timeout_s is over";
        case Cause::timeout_total: return "its timeout_s is over";
        default: return "";
    }
}

AbortCode code_for(const Transfer& transfer) noexcept {
    switch (transfer.outcome.cause) {
        case Cause::timeout_match:
        case Cause::timeout_gate:
        case Cause::timeout_bytes:
        case Cause::timeout_total: return AbortCode::timeout;
        case Cause::layout_mismatch: return AbortCode::layout_mismatch;
        case Cause::integrity: return AbortCode::integrity;
        case Cause::grant_denied:
        case Cause::grant_stale: return AbortCode::grant;
        case Cause::cancelled:
            return transfer.gate != nullptr && transfer.gate->failed() ? AbortCode::gate_failed
                                                                       : AbortCode::cancelled;
        default: return AbortCode::local_error;
    }
}

// Receives that meet OFFERs are looked for by key; a read never is: its name here is no key of a user's.
std::string tombstone_key(const Transfer& transfer) {
    return transfer.two_sided() ? transfer.key
                                : std::string(kMaxKeyNbytes + 1, '\0') + std::to_string(transfer.id);
}

}  // namespace

// ---- output

void Session::send(Header header, const Bytes& body) {
    if (!lost_) {
        append_frame(outbox_, header, body);
    }
}

void Session::send(FrameType type, std::uint8_t flags, std::uint64_t transfer, std::uint64_t total,
                   std::uint64_t arg) {
    Header header;
    header.type = type;
    header.flags = flags;
    header.transfer = transfer;
    header.total = total;
    header.arg = arg;
    send(header, {});
}

void Session::ping() { send(FrameType::ping, 0, 0, 0, 0); }

void Session::say_close(CloseCode code) { send(FrameType::close, 0, 0, 0, static_cast<std::uint64_t>(code)); }

void Session::announce(std::uint64_t pool_id, const PoolTerms& pool) {
    if (!announced_.contains(pool_id)) {
        Header header;
        header.type = FrameType::pool;
        header.transfer = pool_id;
        send(header, encode_pool(pool));
        announced_.insert(pool_id);
    }
}

// A pool counts from its first post until it is closed, announced or not, so that what fits doesn't depend on
// which side was first.
void Session::take_regions(const Transfer& transfer) {
    if (used_pools_.contains(transfer.terms.pool)) {
        return;
    }
    const std::size_t regions = regions_of(*transfer.pool);
    if (regions + used_regions_ > config_.peer_regions) {
        throw Excess("the pool has " + std::to_string(regions) + " layers, and the peer allows " +
                     std::to_string(config_.peer_regions) +
                     " on a connection (max_regions), of which pools that were used on this one have taken " +
                     std::to_string(used_regions_) +
                     ": close pools that are no longer used, or raise max_regions at the peer");
    }
    const std::size_t charge = charge_of_pool(*transfer.pool, encode_pool(*transfer.pool).size());
    if (used_charge_ + charge > config_.peer_state_nbytes / kPoolsShare) {
        throw Excess(
            "the names of this pool's layers and groups, and of other pools that were used on this "
            "connection, take more than the peer keeps of them: close pools that are no longer used");
    }
    used_pools_.emplace(transfer.terms.pool, OwnPool{regions, charge});
    used_regions_ += regions;
    used_charge_ += charge;
}

void Session::forget_pool(std::uint64_t pool_id) {
    if (const auto used = used_pools_.find(pool_id); used != used_pools_.end()) {
        used_regions_ -= used->second.regions;
        used_charge_ -= used->second.charge;
        used_pools_.erase(used);
    }
    if (announced_.erase(pool_id) != 0) {
        send(FrameType::pool, kPoolClosed, pool_id, 0, 0);
    }
}

void Session::send_abort(const Transfer& transfer) {
    Header header;
    header.type = FrameType::abort;
    const bool source = transfer.role == Role::source;
    header.flags = source ? kFromSource : 0;
    header.arg = transfer.chunks;
    header.transfer = transfer.want;
    if (source && transfer.want == 0) {
        header.flags |= kOfferId;
        header.transfer = transfer.id;
    }
    const std::string& reason = transfer.outcome.reason;
    send(header,
         encode_abort({code_for(transfer), reason.empty() ? reason_for(transfer.outcome.cause) : reason,
                       transfer.outcome.mismatch}));
}

// ---- posting and telling

void Session::open(SessionConfig config, Time now) {
    config_ = config;
    opened_ = true;
    pulls_ = config.pulls;
    for (const TransferPtr& transfer : waiting_posts()) {  // the peer's limits are known only now
        if (!transfer->two_sided() && (config_.capabilities & kCanGrant) == 0) {
            stop(transfer, {Cause::grant_denied, Delivered::no, {}, {}}, now);
            continue;
        }
        try {
            take_regions(*transfer);
        } catch (const Excess& excess) {
            stop(transfer, {Cause::resource_limit, Delivered::no, excess.what(), {}}, now);
        }
    }
}

void Session::post(TransferPtr transfer, std::uint64_t pool_id, Time now) {
    transfer->terms.pool = pool_id;
    admit(transfer,
          transfer->role == Role::source
              ? "' already names an unfinished send on this connection: wait for it or choose another"
              : "' already names an unfinished receive on this connection: wait for it or choose another");
    transfer->posted_at = transfer->waits_since = now;
    try {
        enter(transfer, now);
    } catch (...) {
        withdraw(transfer);
        throw;
    }
}

// A post that could not be entered leaves nothing behind: its caller gives its memory back at once.
void Session::withdraw(const TransferPtr& transfer) {
    std::erase(untold_, transfer);
    std::erase(unanswered_, transfer);
    wants_.erase(transfer->id);
    forget(transfer);
}

// Takes the key and what the pool needs, or throws and leaves everything as it was.
void Session::admit(const TransferPtr& transfer, const char* key_in_use) {
    auto& keys = transfer->role == Role::source ? source_keys_ : destination_keys_;
    if (!transfer->two_sided() && opened_ && (config_.capabilities & kCanGrant) == 0) {
        throw LocalViolation("the peer's version knows no grants: upgrade it, or send and receive by key");
    }
    if (transfer->two_sided() && keys.contains(transfer->key)) {
        throw LocalViolation("key '" + transfer->key + key_in_use);
    }
    const bool asks = transfer->role == Role::destination && !transfer->moves_nothing();
    const std::size_t name = transfer->use ? charge_of_use(*transfer->use) : transfer->key.size();
    transfer->charge = charge_of(name + transfer->meta.size(), transfer->terms, asks ? 1 : 0);
    if (opened_ && !lost_) {
        take_regions(*transfer);
    }
    if (transfer->two_sided()) {
        keys.emplace(transfer->key, transfer);
    } else {
        enter_one_sided(transfer);
    }
}

void Session::enter_one_sided(const TransferPtr& transfer) {
    transfer->one_sided = next_one_sided_++;
    one_sided_.emplace(transfer->one_sided, transfer);
}

// Gives a post its place and, if its partner waits here, its match.
void Session::enter(const TransferPtr& transfer, Time now) {
    if (transfer->two_sided()) {
        refusals_.erase(transfer->key);  // who refuses and then posts means the post
    }
    if (lost_) {
        transfer->outcome = {lost_cause_, Delivered::no, lost_reason_, {}};
        apply(transfer, Event::lost, now);
        return;
    }
    watch(*transfer);
    if (!transfer->two_sided()) {
        // Its partner is in the peer's hands.
    } else if (transfer->role == Role::source) {
        if (auto want = take_want(transfer->key)) {
            match_source(transfer, std::move(*want), now);
            return;
        }
    } else if (unmatched_offers_.contains(transfer->key)) {
        unanswered_.push_back(transfer);
        answer_what_waited(now);
        return;
    }
    tell_or_queue(transfer);
}

std::vector<TransferPtr> Session::all_unfinished() const {
    std::vector<TransferPtr> all;
    for (const auto& [place, transfer] : one_sided_) {
        all.push_back(transfer);
    }
    for (const auto* keys : {&source_keys_, &destination_keys_}) {
        for (const auto& [key, transfer] : *keys) {
            all.push_back(transfer);
        }
    }
    return all;
}

std::vector<TransferPtr> Session::waiting_posts() const {
    std::vector<TransferPtr> posts = all_unfinished();
    std::erase_if(posts, [](const TransferPtr& transfer) { return transfer->state != State::posted; });
    std::sort(posts.begin(), posts.end(),
              [](const auto& a, const auto& b) { return a->posted_at < b->posted_at; });
    return posts;
}

std::vector<TransferPtr> Session::give_up_posts() {
    const std::vector<TransferPtr> posts = waiting_posts();
    for (const TransferPtr& transfer : posts) {
        forget(transfer);
    }
    untold_.clear();
    unanswered_.clear();
    return posts;
}

void Session::take_over(TransferPtr transfer, Time now) {
    admit(transfer, "' is in use on the connection that took this one's place");
    enter(transfer, now);
}

bool Session::room_to_end_receives() const noexcept {
    return tombstones() < kTombstonesPerUnmatched * config_.unmatched;
}

bool Session::room_to_tell(const Transfer& transfer) const noexcept {
    return opened_ && outstanding_ < config_.peer_unmatched && room_to_end_receives() &&
           outstanding_charge_ + transfer.charge <= config_.peer_state_nbytes / kToldShare &&
           outbox_.size() <= config_.outbox_nbytes / 2;
}

// A WANT that answers an OFFER may go where one that is told first waits: else two sides could wait for each
// other.
bool Session::room_to_answer(const Transfer& transfer) const noexcept {
    return room_to_end_receives() && outstanding_ < 2 * config_.peer_unmatched &&
           outstanding_charge_ + transfer.charge <= config_.peer_state_nbytes / kAnsweredShare;
}

void Session::count_outstanding(Transfer& transfer, bool counts) noexcept {
    if (transfer.ended == nullptr && transfer.outstanding != counts) {
        transfer.outstanding = counts;
        outstanding_ += counts ? 1 : -1;
        outstanding_charge_ += counts ? transfer.charge : -transfer.charge;
    }
}

void Session::tell_or_queue(const TransferPtr& transfer) {
    if (!untold_.empty() || !room_to_tell(*transfer)) {
        untold_.push_back(transfer);
        return;
    }
    count_outstanding(*transfer, true);
    tell(transfer);
}

// Ids are given here, not when posted: they ascend on the wire, and a post may be told before an older one
// that waits. What is said because our own user posted is no answer to the peer: see check_bounds().
void Session::tell(const TransferPtr& transfer) {
    const std::size_t before = outbox_.size();
    announce(transfer->terms.pool, *transfer->pool);
    if (transfer->role == Role::source) {
        transfer->use ? send_write(transfer) : send_offer(transfer);
    } else {
        transfer->use ? send_read(transfer) : send_want(transfer);
    }
    transfer->told = true;
    own_nbytes_ += outbox_.size() - before;
}

void Session::send_offer(const TransferPtr& transfer) {
    const Bytes body = encode_offer({transfer->key, transfer->meta, {}, false, transfer->terms});
    transfer->id = next_offer_++;
    offers_.emplace(transfer->id, transfer);
    Header header;
    header.type = FrameType::offer;
    header.transfer = transfer->id;
    header.total = transfer->nbytes;
    header.arg = transfer->want != 0 ? transfer->want - 1 : last_want_seen_;
    send(header, body);
}

void Session::send_want(const TransferPtr& transfer) {
    std::vector<Range> ranges;
    if (transfer->nbytes != 0) {
        ranges.push_back({0, transfer->nbytes});
    }
    const Bytes body = encode_want({transfer->key, transfer->meta, transfer->terms, std::move(ranges)});
    transfer->id = transfer->want = next_want_++;
    wants_.emplace(transfer->id, transfer);
    Header header;
    header.type = FrameType::want;
    header.transfer = transfer->id;
    header.total = transfer->nbytes;
    header.arg = transfer->partner;
    transfer->pulls = pulls_;
    header.flags = static_cast<std::uint8_t>((pulls_ ? kWantPulls : 0) |
                                             (transfer->two_sided() ? 0 : kWantOfWrite));
    send(header, body);
}

// Receives whose OFFER came when there was no room for the answer. They don't stand behind what waits to be
// told first.
void Session::answer_what_waited(Time now) {
    while (!unanswered_.empty()) {
        const TransferPtr next = unanswered_.front();
        const bool waits = !next->told && next->state == State::posted;
        const bool offered = waits && unmatched_offers_.contains(next->key);
        if (offered && !room_to_answer(*next)) {
            return;
        }
        unanswered_.pop_front();
        if (offered) {
            match_destination(next, *take_offer(next->key), now);
        } else if (waits) {
            tell_or_queue(next);  // the OFFER was withdrawn
        }
    }
}

void Session::pump(Time now) {
    answer_what_waited(now);
    while (!untold_.empty()) {
        const TransferPtr next = untold_.front();
        if (next->told || next->state != State::posted) {
            untold_.pop_front();  // it matched or ended while it waited
            continue;
        }
        if (!room_to_tell(*next)) {
            break;
        }
        untold_.pop_front();
        count_outstanding(*next, true);
        tell(next);
    }
    pump_held();
    pump_holds();
    pump_messages();
    acknowledge_messages();
}

void Session::pump_messages() {
    while (opened_ && !messages_.empty() && outbox_.size() <= config_.outbox_nbytes / 2) {
        const MessagePtr& next = messages_.front();
        const std::uint64_t charge = message_charge(next->data.size());
        const std::uint64_t untaken = message_bytes_sent_ - message_bytes_taken_;
        if (untaken != 0 && untaken + charge > config_.message_window_nbytes) {
            break;
        }
        message_bytes_sent_ += charge;
        Header header;
        header.type = FrameType::message;
        header.transfer = next->number;
        send(header, next->data);
        ++counters_.messages_out;
        next->data = Bytes();
        unacknowledged_.push_back(next);
        messages_.pop_front();
    }
}

// ---- the machines

void Session::stop(const TransferPtr& transfer, Outcome why, Time now) {
    if (transfer->undecided()) {
        transfer->outcome = std::move(why);
    }
    apply(transfer, Event::stop, now);
}

void Session::apply(const TransferPtr& transfer, Event event, Time now) {
    const Transition& row = step(transfer->role, transfer->state, event);
    if (row.action == Action::refuse_bug) {
        throw std::logic_error(std::string("transfer machine: ") + name_of(transfer->role) + " in " +
                               name_of(row.from) + " can't take " + name_of(event));
    }
    if (row.action == Action::violation) {
        throw Violation(std::string("a ") + name_of(event) + " for a " + name_of(transfer->role) +
                        " that is " + name_of(row.from));
    }
    transfer->state = row.to;
    if (event == Event::match || event == Event::first_bytes) {
        transfer->moved_at = now;
        if (transfer->matched_at == 0) {
            transfer->matched_at = now;
        }
        if (event == Event::first_bytes && transfer->first_byte_at == 0) {
            transfer->first_byte_at = now;
        }
        if (transfer->two_sided()) {
            count_outstanding(*transfer, false);
        } else if (transfer->use != nullptr) {
            admitted_to(transfer->use->token);
        }
    }
    const bool ends = row.to == State::ending || row.to == State::draining || row.to == State::over;
    if (ends && transfer->ended != nullptr) {
        count_served(*transfer, false);
    }
    act(transfer, row.action, now);
}

void Session::begin_quiesce(const TransferPtr& transfer) {
    transfer->pending.clear();
    if (transfer->role == Role::source) {
        gated_.erase(transfer->want);
    }
    quiescing_.push_back(transfer);
}

void Session::act(const TransferPtr& transfer, Action action, Time now) {
    switch (action) {
        case Action::quiesce: begin_quiesce(transfer); break;
        case Action::finish_ok:
            transfer->outcome = {Cause::ok, Delivered::yes, {}, {}};
            if (transfer->state == State::over) {
                finish(transfer, now);
            }
            break;
        case Action::finish: finish(transfer, now); break;
        case Action::send_done:
            transfer->outcome = {Cause::ok, Delivered::yes, {}, {}};
            send(FrameType::done, 0, transfer->want, transfer->verified.nbytes(),
                 transfer->chunks + transfer->copies);
            finish(transfer, now);
            break;
        case Action::send_abort:
            if (transfer->told || transfer->want != 0) {
                send_abort(*transfer);
            }
            if (transfer->role == Role::source) {
                transfer->verdict_until = now + kVerdictGrace;
                watch(transfer->verdict_until);
            } else {
                finish(transfer, now);
            }
            break;
        case Action::finish_drain:
            if (transfer->told) {
                send(FrameType::aborted, 0, transfer->want, 0, 0);
            }
            finish(transfer, now);
            break;
        case Action::none:
        case Action::refuse_bug:
        case Action::violation: break;
    }
}

void Session::quiesced(const TransferPtr& transfer, Time now) {
    if (transfer->state != State::stopping && transfer->state != State::ending) {
        return;
    }
    if (transfer->role == Role::source) {
        check_early_done(*transfer);
        const bool answers = transfer->state == State::ending;
        apply(transfer, Event::quiesced, now);
        if (answers) {
            answer_after_quiesce(transfer);
        }
        return;
    }
    apply(transfer, Event::quiesced, now);
    if (lost_ || !transfer->told) {  // nobody is there to drain for, or was told
        apply(transfer, lost_ ? Event::lost : Event::drained, now);
        forget(transfer);
    } else {
        check_drained(transfer, now);
    }
}

// A DONE that came while a mover still held a chunk is true only if that chunk had wholly left.
void Session::check_early_done(Transfer& transfer) {
    if (transfer.outcome.cause == Cause::ok && !transfer.located &&
        transfer.sent_nbytes != transfer.asked_nbytes) {
        lie_ = "a DONE before all bytes were sent";
        transfer.outcome = {Cause::protocol_error, Delivered::unknown, lie_, {}};
    }
}

// A source that ended without needing a verdict still owes the peer a word.
void Session::answer_after_quiesce(const TransferPtr& transfer) {
    if (transfer->outcome.cause == Cause::ok) {
        return;
    }
    if (transfer->peer_ended) {
        if (transfer->want != 0) {
            send(FrameType::aborted, kFromSource, transfer->want, 0, transfer->chunks);
        }
    } else if (transfer->told || transfer->want != 0) {
        send_abort(*transfer);
    }
}

void Session::finish(const TransferPtr& transfer, Time now) {
    if (transfer->finished) {
        return;
    }
    transfer->finished = true;
    transfer->over_at = now;
    if (!lost_) {
        peer_charge_ -= std::exchange(transfer->location_charge, 0);
    }
    const bool ok = transfer->outcome.cause == Cause::ok;
    if (transfer->role == Role::source) {
        ++(ok ? counters_.sends_ok : counters_.sends_failed);
    } else {
        ++(ok ? counters_.receives_ok : counters_.receives_failed);
        if (ok && transfer->use) {
            taken(transfer->use->token);
        }
    }
    finished_.push_back(transfer);
    forget(transfer);
    if (transfer->state == State::draining && transfer->told) {
        tombstones_.emplace(tombstone_key(*transfer), transfer);
        served_tombstones_ += transfer->ended != nullptr ? 1 : 0;
    }
}

// Takes a finished transfer out of every index; a destination that drains stays known by its id, its key and
// its partner.
void Session::forget(const TransferPtr& transfer) {
    count_outstanding(*transfer, false);
    auto& keys = transfer->role == Role::source ? source_keys_ : destination_keys_;
    if (const auto mine = keys.find(transfer->key); mine != keys.end() && mine->second == transfer) {
        keys.erase(mine);
    }
    if (const auto mine = one_sided_.find(transfer->one_sided);
        mine != one_sided_.end() && mine->second == transfer) {
        one_sided_.erase(mine);
    }
    if (transfer->role == Role::source) {
        offers_.erase(transfer->id);
        matched_.erase(transfer->want);
        gated_.erase(transfer->want);
        return;
    }
    if (transfer->state != State::over) {
        return;
    }
    wants_.erase(transfer->id);
    partners_.erase(transfer->partner);
    const auto [begin, end] = tombstones_.equal_range(tombstone_key(*transfer));
    const auto stone = std::find_if(begin, end, [&](const auto& item) { return item.second == transfer; });
    if (stone != end) {
        tombstones_.erase(stone);
        served_tombstones_ -= transfer->ended != nullptr ? 1 : 0;
    }
}

}  // namespace kvt::protocol
