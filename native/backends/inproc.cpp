#include "backends/inproc.hpp"

#include "backends/copy.hpp"
#include "base/crc32c.hpp"

namespace kvt::backends {

using protocol::Cause;

// One mover's share of the copying.
class InprocPath::Copier final : public Runnable {
  public:
    Copier(const std::shared_ptr<PathHost>& host, protocol::DigestKind digest)
        : host_(host), digest_(digest) {}
    void set_peer(std::weak_ptr<PathHost> peer) { peer_ = std::move(peer); }

    bool run() override {
        const auto host = host_.lock();
        if (!host) {
            return false;
        }
        const auto target = host->next_copy();
        if (!target) {
            return false;
        }
        protocol::Trailer trailer;
        bool verified = false;
        const auto peer = peer_.lock();
        const protocol::TransferPtr source = peer ? peer->lend(target->transfer->want) : nullptr;
        if (source) {
            verified = copy(*source, *target->transfer, target->range);
            if (!source->still_granted()) {
                trailer.status = protocol::ChunkStatus::aborted;
            }
            peer->returned(source);
        } else {
            trailer.status = protocol::ChunkStatus::aborted;
        }
        host->chunk_end(*target, trailer, verified);
        host->settle();
        return true;
    }

    void failed(const std::exception& why) override {
        if (const auto host = host_.lock()) {
            host->give_up(why);
        }
    }

  private:
    bool copy(const protocol::Transfer& from, const protocol::Transfer& to, protocol::Range range) const {
        std::uint32_t read = 0, stored = 0;
        copy_runs(from, to, range.begin, range.end, [&](const void* source, const void* copy, std::size_t n) {
            if (digest_ == protocol::DigestKind::crc32c) {
                read = crc32c(read, source, n);
                stored = crc32c(stored, copy, n);
            }
        });
        return read == stored;
    }

    std::weak_ptr<PathHost> host_, peer_;
    protocol::DigestKind digest_;
};

InprocPath::InprocPath(const std::shared_ptr<PathHost>& host, std::vector<Mover*> movers,
                       protocol::DigestKind digest)
    : host_(*host), movers_(std::move(movers)) {
    for (std::size_t i = 0; i < movers_.size(); ++i) {
        copiers_.push_back(std::make_shared<Copier>(host, digest));
    }
}

InprocPath::~InprocPath() = default;

void InprocPath::join(InprocPath& a, const std::shared_ptr<PathHost>& host_a, InprocPath& b,
                      const std::shared_ptr<PathHost>& host_b) {
    a.peer_ = host_b;
    b.peer_ = host_a;
    for (const auto& copier : a.copiers_) {
        copier->set_peer(host_b);
    }
    for (const auto& copier : b.copiers_) {
        copier->set_peer(host_a);
    }
}

// The two sides may answer each other within one call; `busy_` keeps that a loop instead of a recursion.
void InprocPath::flush_control() {
    again_.store(true);
    while (again_.load() && !busy_.exchange(true)) {
        again_.store(false);
        protocol::Bytes bytes;
        while (host_.take_control(bytes)) {
            const auto peer = peer_.lock();
            if (!peer) {
                break;
            }
            host_.spoke();
            deliver(*peer, bytes);
            bytes.clear();
        }
        busy_.store(false);
    }
}

void InprocPath::deliver(PathHost& to, std::span<const std::byte> bytes) {
    using protocol::kHeaderNbytes;
    const PathHost::Visit visit(to);
    if (!visit) {
        return;
    }
    to.heard();
    try {
        while (!bytes.empty()) {
            const auto header = protocol::decode_header(
                std::span<const std::byte, kHeaderNbytes>(bytes.first(kHeaderNbytes)), false);
            to.receive(header, bytes.subspan(kHeaderNbytes, header.body_nbytes));
            bytes = bytes.subspan(kHeaderNbytes + header.body_nbytes);
        }
    } catch (const protocol::Excess& excess) {
        to.lose(Cause::resource_limit, excess.what());
    } catch (const protocol::Violation& violation) {
        to.lose(Cause::protocol_error, violation.what());
    }
    to.settle();
}

void InprocPath::kick(std::uint64_t) {
    for (std::size_t i = 0; i < movers_.size(); ++i) {
        movers_[i]->enqueue(copiers_[i]);
    }
}

void InprocPath::close() {
    if (closed_.exchange(true)) {
        return;
    }
    if (const auto peer = peer_.lock()) {
        peer->lose(Cause::peer_lost, "reset: the other endpoint's connection ended");
    }
}

}  // namespace kvt::backends
