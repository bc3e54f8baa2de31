// A layer gate as the engine keeps it: the protocol's atomics, and the connections to look when a layer is
// marked.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "protocol/gate.hpp"

namespace kvt::engine {

class Connection;

class LayerGate final : public protocol::Gate {
  public:
    using protocol::Gate::Gate;
    /// A transfer on this connection waits for the gate.
    void attach(const std::shared_ptr<Connection>& connection);
    /// Has every attached connection look at the gate now; drops those that are gone.
    void kick();

  private:
    std::mutex mutex_;
    std::vector<std::weak_ptr<Connection>> connections_;
};

}  // namespace kvt::engine
