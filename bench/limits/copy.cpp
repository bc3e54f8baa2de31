// What memory allows: memcpy inside one process, memcpy from a memfd that the other process filled, and
// process_vm_readv from its private memory. The receiver does all of it; the sender only has to be there.
#include <limits.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <barrier>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "session.hpp"

namespace kvt_limits {
namespace {

using Parts = std::vector<std::vector<Piece>>;

constexpr size_t kPiecesPerCall = std::min<size_t>(1024, IOV_MAX);

void copy_pieces(const std::byte* src, std::byte* dst, const std::vector<Piece>& pieces) {
    for (const Piece& piece : pieces) std::memcpy(dst + piece.dst, src + piece.src, piece.len);
}

// One call for a batch of pieces. A short count means that a page could not be read: then the bench is wrong.
void read_batch(int pid, std::byte* src, std::byte* dst, const Piece* pieces, size_t count) {
    std::array<iovec, kPiecesPerCall> local;
    std::array<iovec, kPiecesPerCall> remote;
    size_t want = 0;
    for (size_t i = 0; i < count; ++i) {
        local[i] = {dst + pieces[i].dst, pieces[i].len};
        remote[i] = {src + pieces[i].src, pieces[i].len};
        want += pieces[i].len;
    }
    const ssize_t got = process_vm_readv(pid, local.data(), count, remote.data(), count, 0);
    if (got < 0) throw std::system_error(errno, std::generic_category(), "process_vm_readv");
    if (static_cast<size_t>(got) != want) throw std::runtime_error("process_vm_readv was short");
}

void read_pieces(const Command& command, std::byte* dst, const std::vector<Piece>& pieces) {
    auto* src = reinterpret_cast<std::byte*>(command.source_address);
    for (size_t i = 0; i < pieces.size(); i += kPiecesPerCall) {
        const size_t count = std::min(kPiecesPerCall, pieces.size() - i);
        read_batch(command.source_pid, src, dst, pieces.data() + i, count);
    }
}

void copy_part(const Command& command, const Arenas& arenas, const std::vector<Piece>& pieces) {
    std::byte* dst = arenas.destination.data();
    if (command.mode == Mode::kVmread) {
        read_pieces(command, dst, pieces);
    } else {
        copy_pieces(command.mode == Mode::kMemfd ? arenas.peer_memfd.data() : arenas.source.data(), dst,
                    pieces);
    }
}

Parts parts_of(const Work& work, unsigned streams) {
    Parts parts;
    for (unsigned i = 0; i < streams; ++i) parts.push_back(part_of(work, i, streams));
    return parts;
}

// Thread i copies part i of every repetition; a barrier on each side of the repetition makes them one.
class Copiers {
  public:
    Copiers(const Command& command, const Arenas& arenas, const std::vector<Parts>& parts, uint32_t reps)
        : command_(command), arenas_(arenas), parts_(parts), barrier_(command.streams) {
        for (unsigned i = 1; i < command.streams; ++i) {
            threads_.emplace_back([this, i, reps] { loop(i, reps, nullptr); });
        }
    }
    void run(uint32_t reps, std::vector<double>* samples) {
        loop(0, reps, samples);
        for (auto& thread : threads_) thread.join();
        if (error_) std::rethrow_exception(error_);
    }

  private:
    void loop(unsigned i, uint32_t reps, std::vector<double>* samples) {
        pin(command_.placement, true, i);
        for (uint32_t rep = 0; rep < reps; ++rep) {
            barrier_.arrive_and_wait();
            const double began = now_s();
            try {
                copy_part(command_, arenas_, parts_[rep % parts_.size()][i]);
            } catch (...) {
                error_ = std::current_exception();
            }
            barrier_.arrive_and_wait();
            if (samples != nullptr) samples->push_back(now_s() - began);
        }
    }

    const Command& command_;
    const Arenas& arenas_;
    const std::vector<Parts>& parts_;
    std::barrier<> barrier_;
    std::exception_ptr error_;
    std::vector<std::thread> threads_;
};

// Mapping the source in is set-up, not copying: every page is touched before the clock runs.
void prepare_source(const Command& command, Arenas& arenas) {
    if (command.mode == Mode::kMemfd && !arenas.peer_memfd) {
        arenas.peer_memfd = Mapping::shared(arenas.memfd, kArenaBytes, false);
        for (size_t at = 0; at < kArenaBytes; at += kPageRun) {
            static_cast<void>(*static_cast<volatile std::byte*>(arenas.peer_memfd.data() + at));
        }
    }
    if (command.mode == Mode::kCopy && !arenas.source) {
        arenas.source = Mapping::anonymous(kArenaBytes);
        fill(arenas.source.data(), kArenaBytes);
    }
}

}  // namespace

Outcome copy_into_place(const Command& command, Arenas& arenas, std::vector<double>* samples) {
    const std::vector<Work> works = works_of(command);
    std::vector<Parts> parts;
    for (const Work& work : works) {
        wipe(arenas.destination.data(), work.pieces);
        parts.push_back(parts_of(work, command.streams));
    }
    prepare_source(command, arenas);
    const bool latency = command.reps > 1;
    const uint32_t reps = latency ? command.reps + kWarmups : 1;
    const double cpu = cpu_used_s();
    Copiers(command, arenas, parts, reps).run(reps, samples);
    Outcome outcome;
    outcome.cpu_s = cpu_used_s() - cpu;
    for (const double sample : *samples) outcome.seconds += sample;
    if (latency) samples->erase(samples->begin(), samples->begin() + kWarmups);
    outcome.nbytes = works[0].nbytes;
    outcome.runs = works[0].pieces.size();
    return outcome;
}

}  // namespace kvt_limits
