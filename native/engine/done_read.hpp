// A read that was over before its post returned: what is left to say of it.
//
// Invariant: it never changes, and it is done before anybody else sees it.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>

#include "engine/completion.hpp"
#include "memory/plan.hpp"

namespace kvt::engine {

class DoneRead final : public Handle {
  public:
    DoneRead(std::shared_ptr<const memory::StreamPlan> plan, const char* backend, std::int64_t ns)
        : plan_(std::move(plan)), backend_(backend), ns_(ns) {}

    std::uint64_t nbytes() const noexcept { return plan_->nbytes(); }
    std::uint64_t blocks() const noexcept { return plan_->blocks(); }
    /// Contiguous runs of memory that it wrote; walks them all.
    std::uint64_t merged_runs() const { return memory::count_runs(*plan_); }
    const char* backend() const noexcept { return backend_; }
    std::int64_t seconds_ns() const noexcept { return ns_; }
    /// By the pool's index.
    bool has_layer(std::uint32_t layer) const noexcept {
        for (std::size_t i = 0; i < plan_->layer_count(); ++i) {
            if (plan_->layer(i) == layer) {
                return true;
            }
        }
        return false;
    }

  private:
    const std::shared_ptr<const memory::StreamPlan> plan_;
    const char* const backend_;
    const std::int64_t ns_;
};

}  // namespace kvt::engine
