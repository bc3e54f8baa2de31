// One direction of one simulated connection: bytes in order, delayed, arriving in pieces; bounded like a
// socket's buffers.
#pragma once

#include <deque>
#include <functional>
#include <utility>

#include "clock.hpp"

namespace kvt::sim {

struct Weather {
    Time least = 0, most = 0;    // of a segment's way
    unsigned stall_percent = 0;  // of segments that take long
    Time stall = 0;
    std::size_t capacity = 1 << 20;
};

class Pipe {
  public:
    Pipe(Clock& clock, Random& random, Weather weather) : clock_(clock), random_(random), weather_(weather) {}

    void set_reader(std::function<void()> reader) { reader_ = std::move(reader); }
    void set_writer(std::function<void()> writer) { writer_ = std::move(writer); }
    std::size_t room() const noexcept {
        return cut_ ? 0 : weather_.capacity - std::min(weather_.capacity, held_);
    }

    void write(const std::byte* data, std::size_t n) {
        held_ += n;
        while (n > 0) {
            const std::size_t part = random_.chance(60) ? n : 1 + random_.below(n);
            protocol::Bytes bytes(data, data + part);
            data += part;
            n -= part;
            Time way = random_.between(weather_.least, weather_.most);
            if (random_.chance(weather_.stall_percent)) {
                way += random_.between(0, weather_.stall);
            }
            arrives_ = std::max(arrives_ + 1, clock_.now() + way);
            clock_.at(arrives_, [this, bytes = std::move(bytes)]() mutable { arrive(std::move(bytes)); });
        }
    }
    /// At most n bytes that have arrived.
    std::size_t read(std::byte* out, std::size_t n) {
        n = std::min(n, arrived_.size());
        std::copy_n(arrived_.begin(), n, out);
        arrived_.erase(arrived_.begin(), arrived_.begin() + static_cast<std::ptrdiff_t>(n));
        const bool was_full = room() == 0;
        held_ -= n;
        if (was_full && n > 0 && writer_) {
            clock_.after(random_.between(0, 20 * kUs), writer_);
        }
        return n;
    }
    std::size_t readable() const noexcept { return arrived_.size(); }
    bool drained() const noexcept { return held_ == 0; }
    /// Nothing arrives any more; what has arrived can be read.
    void cut() noexcept { cut_ = true; }

  private:
    void arrive(protocol::Bytes bytes) {
        if (cut_) {
            return;
        }
        arrived_.insert(arrived_.end(), bytes.begin(), bytes.end());
        if (reader_) {
            reader_();
        }
    }

    Clock& clock_;
    Random& random_;
    Weather weather_;
    std::deque<std::byte> arrived_;
    std::function<void()> reader_, writer_;
    std::size_t held_ = 0;
    Time arrives_ = 0;
    bool cut_ = false;
};

}  // namespace kvt::sim
