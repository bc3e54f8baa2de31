// What became of operations: how many, how many bytes, how long they took; by operation and outcome.
//
// Lives here: one table of counts, filled as operations end. Does not live here: whose it is (a connection
// has one, and the engine one for each way that bytes go, which outlives the connections). Invariant: an
// operation is counted before its handle is done, so who has seen the handle's end finds it counted.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

#include "protocol/transfer.hpp"

namespace kvt::engine {

enum class Operation : std::uint8_t { send, receive, message, read, write };

class Tally {
  public:
    /// Upper bounds of the buckets: 2^4, 2^5, ... 2^27 microseconds (134 s). One more bucket has the rest.
    static constexpr std::size_t kBounds = 24;
    static constexpr std::uint64_t bound_us(std::size_t i) noexcept { return std::uint64_t{16} << i; }

    struct Cell {
        std::uint64_t count = 0, nbytes = 0;
        std::int64_t total_ns = 0;
        std::array<std::uint64_t, kBounds + 1> buckets{};
    };
    using Cells = std::map<std::pair<Operation, protocol::Cause>, Cell>;

    void record(Operation operation, protocol::Cause outcome, std::uint64_t nbytes, std::int64_t ns);
    /// Of an operation that another table has: it has moved these bytes by this way before it took another.
    void record_part(Operation operation, protocol::Cause outcome, std::uint64_t nbytes);
    Cells cells() const;

  private:
    mutable std::mutex mutex_;
    Cells cells_;
};

}  // namespace kvt::engine
