#include "world.hpp"

#include <algorithm>

namespace kvt::sim {

using namespace protocol;

World::World(std::uint64_t seed, bool verbose)
    : clock_(verbose),
      random_(seed),
      memory_backend_(random_.chance(30)),
      named_(random_.chance(70)),
      lanes_(static_cast<unsigned>(random_.between(1, 4))),
      span_(random_.pick({2 * kMs, 20 * kMs, 200 * kMs, 1000 * kMs})),
      busy_percent_(random_.pick({10u, 30u, 60u})),
      checker_(clock_) {
    MachineSetup made = setup();
    const std::uint32_t unmatched[2] = {random_.pick({1u, 2u, 1024u}), random_.pick({1u, 2u, 1024u})};
    for (unsigned i = 0; i < 2; ++i) {
        made.config.unmatched = unmatched[i];
        made.config.peer_unmatched = unmatched[1 - i];
        made.dials = random_.chance(20);
        machines_[i] = std::make_unique<Machine>(i, clock_, random_, checker_, made);
        machines_[i]->on_over = [this](const RecordPtr& record) { over(record); };
    }
    build_network();
    plan();
}

MachineSetup World::setup() {
    MachineSetup made;
    made.config.capabilities = kCanGrant | (memory_backend_ ? kCanCopy : 0);
    made.config.pulls = memory_backend_;
    made.config.digest = random_.chance(50) ? DigestKind::crc32c : DigestKind::none;
    made.config.chunk_nbytes = random_.pick(
        {std::uint64_t{200}, std::uint64_t{1000}, std::uint64_t{4096}, std::uint64_t{0}});
    made.config.message_window_nbytes = random_.pick({1000, 32 << 20});
    made.config.message_queue_nbytes = 2 * made.config.message_window_nbytes;
    made.config.outbox_nbytes = random_.pick({std::size_t{4096}, std::size_t{1} << 20});
    made.config.peer_state_nbytes = random_.pick({std::size_t{4} << 10, std::size_t{64} << 20});
    made.staging = random_.chance(50);
    made.finds = random_.chance(75);
    made.corrupt_percent = made.config.digest != DigestKind::none && random_.chance(25) ? 3 : 0;
    made.slow = random_.pick({Time{0}, 20 * kUs, 500 * kUs});
    made.pool.name = "kv";
    made.pool.named = named_;
    for (const char* group : {"full", "window"}) {
        made.pool.groups.push_back({group, false, "bfloat16", "HND", "packed", 16});
    }
    const std::int64_t layers = random_.between(1, 5);
    const bool large = random_.chance(25);  // even one grant's blocks go by several chunks, on lanes
    for (std::int64_t i = 0; i < layers; ++i) {
        made.pieces.push_back(large ? random_.pick({std::size_t{5000}, std::size_t{9000}})
                                    : random_.pick({std::size_t{9}, std::size_t{64}, std::size_t{300},
                                                    std::size_t{1000}, std::size_t{2500}}));
        made.pool.layers.push_back(
            {"layer." + std::to_string(i), static_cast<std::uint16_t>(random_.chance(70) ? 0 : 1)});
    }
    return made;
}

Weather World::weather() {
    Weather made;
    const std::uint64_t style = random_.chance(30) ? 0 : random_.below(5);
    made.most = style == 0   ? 20 * kUs
                : style == 1 ? 300 * kUs
                : style == 2 ? 5 * kMs
                : style == 3 ? 30 * kMs
                             : kMs;
    made.least = random_.chance(50) ? 0 : made.most / 2;
    made.stall_percent = random_.pick({0u, 0u, 2u, 8u});
    made.stall = random_.pick({2 * kMs, 40 * kMs, 250 * kMs});
    made.capacity = random_.pick({std::size_t{500}, std::size_t{8192}, std::size_t{1} << 20});
    return made;
}

void World::build_network() {
    const auto pipe = [&](Weather of) {
        pipes_.push_back(std::make_unique<Pipe>(clock_, random_, of));
        return pipes_.back().get();
    };
    const Weather control = weather(), payload = weather();
    checker_.set_calm(control.most < 10 * kMs && control.stall_percent == 0 && control.capacity > 10'000);
    Pipe* a_to_b = pipe(control);
    Pipe* b_to_a = pipe(control);
    std::vector<std::pair<Pipe*, Pipe*>> of_a, of_b;
    for (unsigned i = 0; i < lanes_; ++i) {
        Pipe* there = pipe(random_.chance(70) ? payload : weather());
        Pipe* back = pipe(payload);
        of_a.emplace_back(back, there);
        of_b.emplace_back(there, back);
    }
    machines_[0]->connect(*machines_[1], *b_to_a, *a_to_b, of_a);
    machines_[1]->connect(*machines_[0], *a_to_b, *b_to_a, of_b);
}

// ---- what the users do

void World::plan() {
    const std::int64_t flows = random_.between(1, 5);
    for (std::int64_t i = 0; i < flows; ++i) {
        flows_.emplace_back();
        plan_flow(flows_.size() - 1);
    }
    for (auto& machine : machines_) {
        for (std::int64_t i = random_.chance(30) ? random_.between(1, 12) : 0; i > 0; --i) {
            const std::size_t size = random_.chance(30) ? 0 : random_.below(800);
            machine->later(random_.between(0, span_), [&m = *machine, size] { m.send_message(size); });
        }
        for (int i = 0; i < 30; ++i) {
            machine->later(i < 6 ? random_.between(0, 2 * span_) : (5 + i) * kSecond / 2,
                           [&m = *machine] { m.take_messages(); });
        }
    }
    for (auto& machine : machines_) {
        machine->later(random_.between(0, span_), [&m = *machine] { m.adopt(); });
        for (std::int64_t i = random_.chance(40) ? random_.between(1, 6) : 0; i > 0; --i) {
            machine->later(random_.between(0, 2 * span_), [&m = *machine] { m.close_pool(); });
        }
    }
    if (random_.chance(50)) {
        plan_grants();
    }
    plan_fate();
}

void World::plan_flow(std::size_t index) {
    Flow& flow = flows_[index];
    flow.key = "k" + std::to_string(index);
    flow.source = static_cast<unsigned>(random_.below(2));
    const std::size_t layers = machines_[0]->memory().layers();
    for (std::uint32_t i = 0; i < layers; ++i) {
        if (random_.chance(80)) flow.layers.push_back(i);
    }
    flow.blocks[0] = random_.below(5);
    flow.blocks[1] = random_.below(3);
    const int posts = static_cast<int>(random_.between(1, 4));
    for (const Role role : {Role::source, Role::destination}) {
        const auto side = static_cast<std::size_t>(role);
        flow.posts_left[side] = random_.chance(10) ? 0 : posts;
        const unsigned machine = role == Role::source ? flow.source : 1 - flow.source;
        const bool at_once = random_.chance(50);
        machines_[machine]->later(at_once ? random_.between(0, 100 * kUs) : random_.between(0, span_),
                                  [this, index, role] { post(index, role); });
        if (random_.chance(8)) {
            machines_[machine]->later(random_.between(0, span_), [this, index, machine, role] {
                if (flows_[index].live[static_cast<std::size_t>(role)] == nullptr &&
                    machines_[machine]->live()) {
                    machines_[machine]->refuse(flows_[index].key);
                }
            });
        }
    }
}

void World::plan_fate() {
    for (auto& machine : machines_) {
        if (random_.chance(10)) {
            machine->later(random_.between(0, span_), [this, &m = *machine] {
                m.stall(clock_.now() + random_.pick({5 * kMs, 120 * kMs, 700 * kMs}));
            });
        }
    }
    for (auto& machine : machines_) {
        if (memory_backend_ && random_.chance(30)) {
            machine->later(random_.between(0, span_), [&m = *machine] { m.break_way(); });
        }
    }
    if (!memory_backend_ && random_.chance(6)) {
        plan_replay();
        return;
    }
    if (!random_.chance(25)) {
        return;
    }
    fate_ = random_.pick({Fate::cut, Fate::cut, Fate::black_hole, Fate::crash});
    if (fate_ == Fate::crash && memory_backend_) {
        fate_ = Fate::cut;  // in one process both would be gone
    }
    clock_.at(random_.between(0, span_ + 5 * kMs), [this] { cut_link(); });
}

// A peer that breaks the rules: it sends a chunk a second time, and must be caught.
void World::plan_replay() {
    fate_ = Fate::cut;
    Machine& machine = *machines_[random_.below(2)];
    machine.later(random_.between(0, span_ / 2), [&machine] { machine.become_rogue(); });
}

void World::cut_link() {
    clock_.trace("the link is cut (%d)", static_cast<int>(fate_));
    checker_.link_cut();
    const bool at_once = random_.chance(50);
    for (auto& pipe : pipes_) {  // one after the other, or all together
        clock_.after(at_once ? 0 : random_.between(0, 3 * kMs), [&p = *pipe] { p.cut(); });
    }
    unsigned dead = 2;
    if (fate_ == Fate::crash) {
        dead = static_cast<unsigned>(random_.below(2));
        checker_.crashed(dead);
        machines_[dead]->crash();
    }
    for (unsigned i = 0; i < 2; ++i) {
        if (i != dead) {
            const Time noticed = fate_ == Fate::black_hole ? 2 * kSecond : random_.between(0, 50 * kMs);
            machines_[i]->later(noticed, [&m = *machines_[i]] { m.lose(); });
        }
    }
}

std::vector<Row> World::choose(Machine& machine, const Flow& flow, Role role, bool mismatching, bool late) {
    std::vector<Row> rows;
    Memory& memory = machine.memory();
    std::vector<std::uint32_t> ids[2];
    for (std::uint16_t group = 0; group < 2; ++group) {
        std::vector<std::uint32_t> free;
        for (std::uint32_t block = 0; block < Memory::kBlocks; ++block) {
            const bool fits = std::all_of(flow.layers.begin(), flow.layers.end(), [&](std::uint32_t layer) {
                return role == Role::source && !late ? memory.free_for_send(layer, block)
                                                     : memory.free_for_receive(layer, block);
            });
            if (fits) free.push_back(block);
        }
        random_.shuffle(free);
        const std::size_t want = flow.blocks[group] + (mismatching ? 1 : 0);
        for (std::size_t i = 0; i < want && !free.empty(); ++i) {
            const bool repeat = role == Role::source && !late && i > 0 && random_.chance(10);
            ids[group].push_back(repeat ? ids[group].back() : free.back());
            if (!repeat) free.pop_back();
        }
        if (ids[group].size() != want) {
            return {};  // no memory left: the user waits
        }
    }
    for (const std::uint32_t layer : flow.layers) {
        rows.push_back({layer, ids[machine.group_of(layer)]});
    }
    if (named_) {
        random_.shuffle(rows);
    }
    return rows;
}

void World::post(std::size_t index, Role role) {
    Flow& flow = flows_[index];
    const auto side = static_cast<std::size_t>(role);
    Machine& machine = *machines_[role == Role::source ? flow.source : 1 - flow.source];
    if (flow.posts_left[side] == 0 || flow.live[side] != nullptr || machine.crashed()) {
        return;
    }
    const bool mismatching = random_.chance(3) && !flow.layers.empty();
    const bool gated = role == Role::source && random_.chance(busy_percent_);
    std::vector<Row> rows = choose(machine, flow, role, mismatching, gated);
    if (rows.size() != flow.layers.size()) {
        machine.later(3 * kMs, [this, index, role] { post(index, role); });
        return;
    }
    --flow.posts_left[side];
    RecordPtr record = machine.make(role, std::move(rows));
    record->history->mismatching = mismatching;
    dress(*record, flow);
    if (gated) {
        plan_gate(record);
    }
    flow.live[side] = record;
    records_.push_back(record);
    if (random_.chance(busy_percent_ / 2)) {
        machine.later(random_.pick({random_.between(0, 200 * kUs), random_.between(0, span_)}),
                      [&machine, weak = std::weak_ptr(record)] {
                          if (const auto alive = weak.lock(); alive && machine.live()) machine.cancel(alive);
                      });
    }
    machine.post(record);
}

void World::dress(Record& record, Flow& flow) {
    record.key = flow.key;
    if (random_.chance(30)) {
        record.meta = "meta " + std::to_string(random_.below(1000));
    }
    record.limits.match = random_.pick({30 * kMs, 400 * kMs, 2 * kSecond});
    record.limits.stall = random_.pick({60 * kMs, kSecond});
    record.limits.total = random_.chance(15) ? random_.pick({3 * kMs, 50 * kMs, 300 * kMs}) : kNever;
}

void World::plan_gate(const RecordPtr& record) {
    const auto layers = static_cast<std::uint32_t>(machines_[0]->memory().layers());
    record->open_gate = std::make_shared<Gate>(layers);
    record->gate = record->open_gate;
    Machine& machine = *machines_[record->history->machine];
    const bool by_word = random_.chance(30), kicks = random_.chance(50), forgetful = random_.chance(5),
               fails = random_.chance(10);
    const Time pace = random_.pick({20 * kUs, kMs, 20 * kMs});
    std::vector<std::uint32_t> order(layers);
    for (std::uint32_t i = 0; i < layers; ++i) {
        order[i] = i;
    }
    if (!by_word) {
        random_.shuffle(order);
    }
    Time when = 0;
    for (std::uint32_t i = 0; i < layers; ++i) {
        when += random_.between(0, pace);
        const bool last = i + 1 == layers;
        if (last && forgetful) {
            return;
        }
        machine.later(when, [this, &machine, weak = std::weak_ptr(record), gate = record->open_gate,
                             key = record->key, layer = order[i], n = i + 1, by_word, kicks, last, fails] {
            if (last && fails) {
                checker_.gate_failed(key);
                gate->fail("prefill failed");
            } else {
                if (const auto alive = weak.lock()) produce(*alive, layer);
                by_word ? gate->word()->store(n) : gate->mark(layer);
            }
            if (kicks && machine.live()) {
                last&& fails ? machine.fail_gates() : machine.kick_gates();
            }
        });
    }
}

// The producer writes a layer's bytes, and only then releases it.
void World::produce(Record& record, std::uint32_t layer) {
    const History& h = *record.history;
    for (const Row& row : h.rows) {
        for (std::size_t i = 0; row.layer == layer && h.outcomes == 0 && i < row.blocks.size(); ++i) {
            machines_[h.machine]->memory().write(layer, row.blocks[i], h.content.at({layer, i}));
        }
    }
}

void World::over(const RecordPtr& record) {
    for (std::size_t i = 0; i < flows_.size(); ++i) {
        Flow& flow = flows_[i];
        const auto side = static_cast<std::size_t>(record->role);
        if (flow.live[side] == record) {
            flow.live[side] = nullptr;
            Machine& machine = *machines_[record->history->machine];
            machine.later(random_.chance(50) ? 0 : random_.between(0, span_),
                          [this, i, role = record->role] { post(i, role); });
        }
    }
}

// ---- running

void World::run(Totals& totals) {
    constexpr Time kHorizon = 60 * kSecond;
    constexpr std::uint64_t kMostSteps = 3'000'000;
    while (clock_.step()) {
        if (++checks_ % 64 == 0) {
            for (const auto& machine : machines_) {
                if (!machine->memory().intact())
                    checker_.broken("bytes outside of live receives have changed");
            }
        }
        if (clock_.now() > kHorizon || clock_.steps() > kMostSteps) {
            checker_.broken("it doesn't end");
        }
    }
    check_end();
    totals.transfers += checker_.transfers();
    totals.ok += checker_.ok();
    for (const auto& machine : machines_) totals.taken += machine->taken();
    totals.steps += clock_.steps();
}

void World::check_end() {
    checker_.finish();
    const bool whole = fate_ == Fate::none;
    if (checker_.rogue() && machines_[0]->live() && machines_[1]->live()) {
        checker_.broken("a chunk was taken twice");
    }
    for (const auto& machine : machines_) {
        if (machine->crashed()) continue;
        if (!machine->memory().intact()) {
            checker_.broken("bytes outside of live receives have changed");
        }
        const Session& session = machine->session();
        if (session.unfinished() + session.tombstones() + session.kept_for_peer() + session.outstanding() !=
                0 ||
            session.gates_wait()) {
            checker_.broken("left behind: " + std::to_string(session.unfinished()) + " unfinished, " +
                            std::to_string(session.tombstones()) + " tombstones, " +
                            std::to_string(session.kept_for_peer()) + " of the peer's, " +
                            std::to_string(session.outstanding()) + " outstanding");
        }
        if (machine->grants_left()) {
            checker_.broken("grants, leases, or what is served by them are left");
        }
        if (machine->unfinished() != 0) {
            checker_.broken("a session that gave its posts up keeps some");
        }
        if (whole && !machine->idle()) {
            checker_.broken("the wire isn't drained");
        }
        checker_.check_messages(machine->index(), machine->received(), whole);
        checker_.check_told(machine->index(), whole);
    }
    for (auto& flow : flows_) {
        flow.live[0] = flow.live[1] = nullptr;
    }
    if (whole) {
        for (const auto& record : records_) {
            if (!record.expired()) checker_.broken("a record outlives its transfer");
        }
    }
}

}  // namespace kvt::sim
