// What a peer says of a pool and of a transfer's place in it, as bytes that may be anything.
//
// The input is a few eight-byte steps: a true description or location of a small pool, then bytes of it are
// changed, cut or added. Nothing may be read beyond the segments that the peer shares, nor planned there;
// what can't be is a Violation, and what can be is what the transfer says.
#include <fcntl.h>

#include <cstring>
#include <memory>

#include "backends/shm_pool.hpp"
#include "fuzz/input.hpp"
#include "fuzz/mutator.hpp"

namespace kvt::fuzz {

using namespace backends;

namespace {

constexpr std::size_t kSegmentNbytes = 8192;
constexpr std::uint64_t kSegments = 2;
constexpr std::uint64_t kMostPlanned = 1 << 16;  // of a plan's bytes, that are walked

struct Ground {
    Ground() {
        for (std::uint64_t id = 0; id < kSegments; ++id) {
            own.emplace_back("fuzz", kSegmentNbytes);
            peer.add(id, PeerSegment::open(Fd(::fcntl(own.back().fd(), F_DUPFD_CLOEXEC, 0)), kSegmentNbytes));
            shared.push_back(
                {id, own.back().fd(), reinterpret_cast<std::uintptr_t>(own.back().data()), kSegmentNbytes});
        }
    }
    // K and V of four heads, in pieces of 512 bytes, and a layer of opaque blocks.
    std::shared_ptr<const memory::PoolShape> shape() const {
        const auto at = [&](std::size_t i) { return shared[i].base; };
        std::vector<memory::Group> groups{{"kv", 4, 4, false, "bfloat16", "HND", "packed", 8},
                                          {"rest", 8, 0, true, "", "", "", 0}};
        std::vector<memory::Layer> layers{
            {"0",
             0,
             {{at(0), 1024, {{4, 128}, {8, 16}}, 16, 0}, {at(0) + 512, 1024, {{4, 128}, {8, 16}}, 16, 0}}},
            {"1", 1, {{at(1), 1024, {}, 1000, -1}}}};
        return std::make_shared<const memory::PoolShape>(std::move(groups), std::move(layers), false);
    }
    std::vector<OwnSegment> own;
    std::vector<memory::SharedSegment> shared;
    PeerSegments peer;
};

const Ground& ground() {
    static const Ground it;
    return it;
}

void spoil(Input& input, protocol::Bytes& bytes) {
    for (int i = 0; i < 12 && !input.empty() && !bytes.empty(); ++i) {
        const Op op = input.op();
        const std::size_t at = (op.a | op.b << 8) % bytes.size();
        const std::size_t room = bytes.size() - at;
        const std::uint64_t extreme = kExtremes[op.d % kExtremes.size()];
        switch (op.code % 6) {
            case 0: break;
            case 1: bytes[at] = static_cast<std::byte>(op.c); break;
            case 2:
                std::memcpy(bytes.data() + at, &extreme, std::min<std::size_t>(room, 1u << op.c % 4));
                break;
            case 3: bytes.resize(at); break;
            case 4: bytes.insert(bytes.end(), op.c, static_cast<std::byte>(op.d)); break;
            case 5: bytes[at] = static_cast<std::byte>(static_cast<std::uint8_t>(bytes[at]) + op.c); break;
        }
    }
}

// Every byte of a mapped plan lies in a segment: it is read.
void walk(const ShmPool& pool, const memory::StreamPlan& plan) {
    iovec runs[32];
    unsigned sum = 0;
    for (std::uint64_t at = 0, end = std::min(plan.nbytes(), kMostPlanned); at < end;) {
        std::size_t count = 0;
        const std::uint64_t reached = plan.runs(at, end, runs, std::size(runs), count);
        demand(reached > at && reached <= end, "a plan that doesn't go on");
        for (std::size_t i = 0; i < count; ++i) {
            const auto* const from = static_cast<const std::byte*>(runs[i].iov_base);
            bool inside = false;
            for (const auto& segment : pool.segments) {
                inside = inside || (from >= segment->data() && runs[i].iov_len <= segment->size() &&
                                    static_cast<std::size_t>(from - segment->data()) <=
                                        segment->size() - runs[i].iov_len);
            }
            demand(inside, "a run beyond the peer's segments");
            sum += static_cast<unsigned>(from[0]) + static_cast<unsigned>(from[runs[i].iov_len - 1]);
        }
        at = reached;
    }
    demand(sum <= kMostPlanned * 255 * 2, "a sum that can't be");  // so that the loads stay
}

void run_location(Input& input, const Op& op, const ShmPool& pool) {
    const auto ids = std::make_shared<const memory::Ids>(memory::Ids{op.a % 4u, op.b % 4u});
    const memory::Heads heads = (op.code & 4) != 0 ? memory::Heads{op.c % 3u, 2, false}
                                                   : memory::Heads::every();
    std::vector<std::uint32_t> layers{0};
    if ((op.code & 8) != 0 && heads.all) {
        layers.push_back(1);
    }
    const memory::StreamPlan told(ground().shape(), layers, {ids, ids}, heads);
    auto location = encode_shm_location({7, {op.d, op.e}}, told);
    spoil(input, location);
    try {
        protocol::Reader in(location);
        decode_shm_location(in);
        const auto plan = decode_shm_plan(in, pool, told.nbytes());
        demand(plan->nbytes() == told.nbytes(), "a plan of other bytes");
        if (pool.mapped) {
            walk(pool, *plan);
        }
    } catch (const protocol::Violation&) {
    }
}

void run(Input input) {
    const Op op = input.op();
    auto raw = encode_shm_pool(*ground().shape(),
                               (op.code & 1) != 0 ? ground().shared : std::vector<memory::SharedSegment>());
    if ((op.code & 2) != 0) {
        spoil(input, raw);
    }
    ShmPool pool;
    try {
        pool = decode_shm_pool(raw, ground().peer);
    } catch (const protocol::Violation&) {
        return;
    }
    demand(pool.kept_nbytes >= raw.size(), "a pool that costs nothing");
    run_location(input, op, pool);
}

/// A pool in segments, or by addresses; a location of each, with heads and with both layers.
const std::vector<Scene>& scenes() {
    static const std::vector<Scene> all = {
        {{1, 0, 1}}, {{0, 1, 2}}, {{5, 3, 2, 1}}, {{9, 1, 3}}, {{3}, {0}, {2, 8, 0, 3, 9}, {0}}};
    return all;
}

}  // namespace
}  // namespace kvt::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t nbytes) {
    kvt::fuzz::run(kvt::fuzz::Input(data, nbytes));
    return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t nbytes, std::size_t most,
                                               unsigned seed) {
    return kvt::fuzz::mutate_steps(data, nbytes, most, seed, kvt::fuzz::scenes());
}
