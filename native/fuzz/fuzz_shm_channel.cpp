// What a peer of shared memory puts before us: the messages and descriptors of its channel, and its board.
//
// The input is a program of eight-byte steps. Messages come in pieces, true ones or spoilt, with descriptors
// that belong to them or not; grants stand on a board, of which any word may be anything. Nobody may be led
// beyond the board, a message has what its type says, and no descriptor stays open.
#include <fcntl.h>

#include <cstring>
#include <memory>
#include <system_error>

#include "backends/shm_board.hpp"
#include "backends/shm_channel.hpp"
#include "fuzz/input.hpp"
#include "fuzz/mutator.hpp"
#include "protocol/bytes.hpp"

namespace kvt::fuzz {

using namespace backends;
using protocol::load_le;
using protocol::store_le;

namespace {

constexpr std::uint32_t kMagic = 0x314d'4853;
constexpr std::size_t kSmallNbytes = 4096;
constexpr std::size_t kMostSteps = 200;

Fd again(int fd) { return Fd(::fcntl(fd, F_DUPFD_CLOEXEC, 0)); }

struct Ground {
    Ground() : small("fuzz", kSmallNbytes), seen(PeerBoard::open(board_fd(), sizeof(BoardMemory))) {
        demand(static_cast<bool>(null = Fd(::open("/dev/null", O_RDONLY | O_CLOEXEC))), "no /dev/null");
    }
    Fd board_fd() const { return again(board.segment().fd()); }
    std::byte* board_bytes() const { return board.segment().data(); }

    OwnBoard board;
    OwnSegment small;
    Fd null;
    PeerBoard seen;
};

Ground& ground() {
    static Ground it;
    return it;
}

bool has_fd(ShmType type) {
    return type == ShmType::segment || type == ShmType::board || type == ShmType::pool;
}

// ---- the channel

class Channel {
  public:
    explicit Channel(Input& input) : input_(input) {}

    void run() {
        try {
            for (std::size_t i = 0; i < kMostSteps && !input_.empty(); ++i) {
                put(input_.op());
            }
        } catch (const protocol::Violation&) {
        } catch (const protocol::Excess&) {
        }
    }

  private:
    void put(const Op& op) {
        std::array<std::byte, kShmMessageNbytes> raw{};
        const auto type = static_cast<ShmType>(op.code % 9);
        const std::uint64_t wrong = kExtremes[op.e % kExtremes.size()];
        store_le(raw.data(), op.g == 255 ? ~kMagic : kMagic);
        store_le(raw.data() + 4, static_cast<std::uint32_t>(op.code % 9));
        store_le(raw.data() + 8, op.g >= 128 ? wrong : std::uint64_t{op.a});
        const std::uint64_t size = type == ShmType::board ? sizeof(BoardMemory) : kSmallNbytes;
        store_le(raw.data() + 16, op.f >= 128 ? wrong : size);
        // With its descriptor, another, too many or none; in two pieces.
        std::vector<Fd> fds;
        const unsigned count = op.d >= 224 ? op.d % 4u : has_fd(type) ? 1u : 0u;
        for (unsigned i = 0; i < count; ++i) {
            fds.push_back(fd_for(type, op.b));
        }
        send(raw, op.c, std::move(fds));
    }
    Fd fd_for(ShmType type, unsigned which) {
        Fd fd = which >= 192             ? again(ground().null.get())
                : type == ShmType::board ? ground().board_fd()
                                         : again(ground().small.fd());
        demand(static_cast<bool>(fd), "descriptors are left open");
        return fd;
    }
    // The descriptors come with the first byte.
    void send(std::span<const std::byte> raw, std::size_t cut, std::vector<Fd> fds) {
        while (!raw.empty()) {
            const std::span<std::byte> room = reader_.room();
            demand(!room.empty() && room.size() <= kShmMessageNbytes, "more than one message is asked for");
            const std::size_t n = std::min({room.size(), raw.size(), 1 + cut % kShmMessageNbytes});
            std::memcpy(room.data(), raw.data(), n);
            reader_.took(n, std::exchange(fds, {}));
            raw = raw.subspan(n);
            if (auto received = reader_.next()) {
                take(std::move(*received));
            }
        }
    }
    void take(ShmReader::Received received) {
        const ShmMessage& message = received.message;
        demand(static_cast<bool>(received.fd) == has_fd(message.type), "a message without what it has");
        try {
            if (message.type == ShmType::segment) {
                auto segment = PeerSegment::open(std::move(received.fd), message.a);
                demand(segment.size() == message.a, "a segment of another size");
                segments_.add(message.id, std::move(segment));
                const auto known = segments_.find(message.id);
                demand(known != nullptr && known->data()[known->size() - 1] == std::byte{},
                       "no such segment");
            } else if (message.type == ShmType::board) {
                PeerBoard::open(std::move(received.fd), message.a);
            } else if (message.type == ShmType::gone) {
                segments_.remove(message.id);
                demand(segments_.find(message.id) == nullptr, "a segment that is gone");
            }
        } catch (const std::system_error&) {  // no room for so much
        }
    }

    Input& input_;
    ShmReader reader_;
    PeerSegments segments_;
};

// ---- the board

GrantToken token_of(unsigned n) {
    GrantToken token{};
    token[0] = static_cast<std::byte>(n % 8);  // in a few slots, in a row
    token[8] = static_cast<std::byte>(n / 8);
    return token;
}

class Board {
  public:
    explicit Board(Input& input) : input_(input) {}
    ~Board() {
        for (auto it = spoilt_.rbegin(); it != spoilt_.rend(); ++it) {
            store_le(ground().board_bytes() + it->at, it->was);
        }
        for (const GrantPlace place : places_) {
            ground().board.end(place);
        }
    }

    void run() {
        for (std::size_t i = 0; i < kMostSteps && !input_.empty(); ++i) {
            const Op op = input_.op();
            switch (op.code % 4) {
                case 0: publish(op); break;
                case 1: spoil(op); break;
                case 2: find(op); break;
                case 3: look(op); break;
            }
        }
        for (unsigned n = 0; n < 16; ++n) {
            find({0, static_cast<std::uint8_t>(n)});
        }
    }

  private:
    void publish(const Op& op) {
        if (!spoilt_.empty()) {
            return;  // it is the owner's to keep in order until then
        }
        const std::vector<std::uint32_t> ids(op.c % 16, op.d);
        std::vector<GroupIds> groups(op.b % 6, GroupIds{op.e, ids});
        const bool every = op.f >= 192;
        const auto place = every ? ground().board.publish_every_block(token_of(op.a), op.d, (op.f & 1) != 0)
                                 : ground().board.publish(token_of(op.a), op.d, groups, (op.f & 1) != 0);
        if (place) {
            places_.push_back(*place);
        }
    }
    // A word of a slot that tokens stand in, or of the ids behind the slots.
    void spoil(const Op& op) {
        const std::size_t word = op.a % 8u, slot = op.b % 16u;
        const std::size_t at = op.g >= 224 ? offsetof(BoardMemory, ids) + op.b * 8u
                                           : offsetof(BoardMemory, grants) + slot * 64 + word * 8;
        std::byte* const there = ground().board_bytes() + at;
        const auto was = load_le<std::uint64_t>(there);
        const std::uint64_t wrong = op.f < 128 ? kExtremes[op.c % kExtremes.size()]
                                               : was ^ std::uint64_t{op.c} << op.d % 64u;
        spoilt_.push_back({at, was});
        store_le(there, wrong);
    }
    void find(const Op& op) {
        GrantCopy copy{};
        try {
            if (!ground().seen.find(token_of(op.a), copy)) {
                return;
            }
        } catch (const protocol::Violation&) {
            return;
        }
        demand(copy.place.slot < kBoardGrants && copy.place.generation % 2 == 1, "a place that isn't one");
        demand(copy.groups.size() <= kGrantGroups && copy.ids.size() <= kBoardIds, "more than a board has");
        demand(!copy.every_block || copy.groups.empty(), "every block, and some");
        std::size_t at = 0;
        for (const auto& group : copy.groups) {
            demand(group.begin == at && group.count <= copy.ids.size() - at, "ids beyond those copied");
            at += group.count;
        }
        demand(at == copy.ids.size(), "ids of no group");
        demand(ground().seen.live(copy.place) && ground().seen.still(copy.place), "it ended by itself");
    }
    void look(const Op& op) {
        const auto slot = static_cast<std::uint32_t>(kExtremes[op.a % kExtremes.size()]);
        const std::uint32_t index = op.f < 128 ? op.b | op.c << 8 : slot;
        const auto refused = [&](auto place) {
            try {
                ground().seen.live(place);
                ground().seen.still(place);
                return false;
            } catch (const protocol::Violation&) {
                return true;
            }
        };
        demand(refused(GrantPlace{index, op.d}) == (index >= kBoardGrants), "a grant beyond the board");
        demand(refused(Guard{index, op.d}) == (index >= kBoardGuards), "a guard beyond the board");
    }

    struct Spoilt {
        std::size_t at;
        std::uint64_t was;
    };
    Input& input_;
    std::vector<GrantPlace> places_;
    std::vector<Spoilt> spoilt_;
};

void run(Input input) {
    const int lowest = again(ground().null.get()).get();  // closed again at once
    if (input.op().code % 2 == 0) {
        Channel(input).run();
    } else {
        Board(input).run();
    }
    demand(again(ground().null.get()).get() == lowest, "a descriptor is left open");
}

/// Segments that come and go, a board; grants, and words of theirs that can't be.
const std::vector<Scene>& scenes() {
    static const std::vector<Scene> all = {
        {{0}, {1, 1, 0, 63}, {2, 1, 0, 7}, {5, 0, 0, 63}, {3, 0, 0, 200}},
        {{1}, {0, 1, 2, 3, 4, 0}, {0, 9, 0, 0, 1, 0, 192}, {2, 1}, {1, 4, 1, 9}, {2, 1}},
        {{1}, {0, 1, 4, 15}, {1, 5, 1, 255, 20, 0, 128}, {2, 1}, {3, 5, 0, 16, 1}}};
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
