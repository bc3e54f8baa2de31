// A layer gate as the engine keeps it: the protocol's atomics, and the connections to look when a layer is
// marked.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "base/fd.hpp"
#include "protocol/gate.hpp"

namespace kvt::engine {

class Connection;

class LayerGate final : public protocol::Gate {
  public:
    using protocol::Gate::Gate;
    /// A transfer on this connection waits for the gate.
    void attach(const std::shared_ptr<Connection>& connection);
    /// Has every attached connection look at the gate now. Nothing in a child of fork(): they are its
    /// parent's.
    void kick();

  private:
    const std::uint64_t generation_ = fork_generation();
    std::mutex mutex_;
    std::vector<std::weak_ptr<Connection>> connections_;
};

}  // namespace kvt::engine
