#include "engine/handle.hpp"

#include <utility>

#include "engine/connection.hpp"
#include "engine/grant_plan.hpp"

namespace kvt::engine {

// A pool that exists can be announced.
static_assert(memory::kMaxGroups <= protocol::kMaxGroups && memory::kMaxLayers <= protocol::kMaxLayers &&
              memory::kMaxNameNbytes <= protocol::kMaxNameNbytes);

TransferHandle::TransferHandle(std::shared_ptr<Connection> connection, std::shared_ptr<Pool> block_pool,
                               std::shared_ptr<const memory::StreamPlan> plan)
    : connection_(std::move(connection)), block_pool_(std::move(block_pool)), plan_(std::move(plan)) {
    pool = &block_pool_->terms();
    nbytes = plan_->nbytes();
    terms = terms_of(*plan_);
    for (std::size_t i = 0; i < plan_->layer_count(); ++i) {
        spans.push_back({{plan_->layer_begin(i), plan_->layer_end(i)}, plan_->layer(i)});
    }
}

TransferHandle::~TransferHandle() = default;

std::uint64_t TransferHandle::runs(std::uint64_t begin, std::uint64_t end, iovec* out, std::size_t most,
                                   std::size_t& count) const {
    return plan_->runs(begin, end, out, most, count);
}

void TransferHandle::reorder(const std::vector<std::uint32_t>& positions) {
    std::vector<std::uint32_t> layers;
    layers.reserve(positions.size());
    for (const std::uint32_t position : positions) {
        layers.push_back(plan_->layer(position));
    }
    plan_ = std::make_shared<memory::StreamPlan>(plan_->reordered(layers));
}

std::optional<protocol::Bytes> TransferHandle::locate() { return connection()->locate(*this); }

void TransferHandle::snapshot(const std::string& backend) {
    result.outcome = outcome;
    result.backend = backend;
    const bool ok = outcome.cause == protocol::Cause::ok;
    result.nbytes = ok ? nbytes : verified.nbytes();
    result.blocks = plan_->blocks();
    result.chunks = chunks + copies;
    result.resumed_nbytes = resumed_nbytes;
    result.seconds_ns = over_at - posted_at;
    result.queued_ns = (first_byte_at != 0 ? first_byte_at : over_at) - posted_at;
    result.wire_ns = first_byte_at != 0 ? over_at - first_byte_at : 0;
    result.meta = peer_meta;
    if (!ok && role == protocol::Role::destination) {
        std::vector<memory::StreamRange> sealed;
        for (const protocol::Range& range : verified.ranges()) {
            sealed.push_back({range.begin, range.end});
        }
        result.block_outcomes = plan_->outcome(sealed);
        // A peer chooses how many these are, and the session's lock is held: the ids are listed once.
        std::vector<memory::StreamRange> failed;
        for (const protocol::Range& range : corrupt.ranges()) {
            failed.push_back({range.begin, range.end});
        }
        result.corrupt = plan_->blocks_touching(failed);
    }
}

void TransferHandle::signal_progress() noexcept {
    for (Sink* sink : layer_waiters) {
        sink->signal(0);
    }
}

}  // namespace kvt::engine
