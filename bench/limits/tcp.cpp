// Loopback TCP with writev/readv straight between the arenas and the socket: one blocking thread per
// connection and side, no header, no protocol, one 64-byte answer per connection when all has arrived.
#include <atomic>
#include <exception>
#include <functional>
#include <latch>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "session.hpp"
#include "wire.hpp"

namespace kvt_limits {
namespace {

using Lists = std::vector<std::vector<Run>>;  // [stream] -> runs at this end

Lists lists_of(const Work& work, unsigned streams, bool source) {
    Lists lists;
    for (unsigned i = 0; i < streams; ++i) {
        const auto part = part_of(work, i, streams);
        lists.push_back(source ? src_runs(part) : dst_runs(part));
    }
    return lists;
}

uint16_t await_ready(int control) {
    Outcome ready;
    recv_all(control, &ready, sizeof ready);
    if (ready.ok == 0) throw CommandFailed(ready.error);
    return static_cast<uint16_t>(ready.port);
}

void say_ready(int control, uint16_t port) {
    Outcome ready;
    ready.port = port;
    send_all(control, &ready, sizeof ready);
}

// Threads that start together; the first exception of any of them is thrown by finish().
class Crew {
  public:
    Crew(unsigned count, Placement placement, bool receiver, std::function<void(unsigned)> body) : start_(1) {
        for (unsigned i = 0; i < count; ++i) {
            threads_.emplace_back([this, i, placement, receiver, body] {
                pin(placement, receiver, i);
                start_.wait();
                run(i, body);
            });
        }
    }
    ~Crew() { join(); }
    void start() { start_.count_down(); }
    double finish() {
        join();
        if (error_) std::rethrow_exception(error_);
        return ended_s_;
    }

  private:
    void run(unsigned i, const std::function<void(unsigned)>& body) {
        std::exception_ptr error;
        try {
            body(i);
        } catch (...) {
            error = std::current_exception();
        }
        const double at = now_s();
        const std::scoped_lock lock(mutex_);
        if (error) error_ = error;
        if (at > ended_s_) ended_s_ = at;
    }
    void join() {
        for (auto& thread : threads_) {
            if (thread.joinable()) thread.join();
        }
    }

    std::latch start_;
    std::mutex mutex_;
    std::exception_ptr error_;
    double ended_s_ = 0;
    std::vector<std::thread> threads_;
};

std::vector<Fd> connect_all(const Command& command, uint16_t port) {
    std::vector<Fd> conns;
    for (unsigned i = 0; i < command.streams; ++i) conns.push_back(connect_loopback(port, command.tuning));
    return conns;
}

std::vector<Fd> accept_all(const Command& command, int control) {
    uint16_t port = 0;
    const Fd listener = listen_loopback(&port);
    tune(listener.get(), command.tuning);
    say_ready(control, port);
    std::vector<Fd> conns;
    for (unsigned i = 0; i < command.streams; ++i) conns.push_back(accept_one(listener.get()));
    return conns;
}

double send_once(const Command& command, const Arenas& arenas, const std::vector<Fd>& conns,
                 const Lists& lists, int control) {
    Crew crew(command.streams, command.placement, false, [&](unsigned i) {
        std::byte ack[kAckBytes];
        send_runs(conns[i].get(), arenas.source.data(), lists[i]);
        recv_all(conns[i].get(), ack, sizeof ack);
    });
    await_ready(control);
    const double began = now_s();
    crew.start();
    return crew.finish() - began;
}

void receive_once(const Command& command, Arenas& arenas, const std::vector<Fd>& conns, const Lists& lists,
                  int control) {
    Crew crew(command.streams, command.placement, true, [&](unsigned i) {
        const std::byte ack[kAckBytes] = {};
        recv_runs(conns[i].get(), arenas.destination.data(), lists[i]);
        send_all(conns[i].get(), ack, sizeof ack);
    });
    crew.start();
    say_ready(control, 0);
    crew.finish();
}

// One thread sends each repetition over all connections in turn, then waits for all the answers.
void send_repeatedly(const Command& command, const Arenas& arenas, const std::vector<Fd>& conns,
                     const std::vector<Lists>& lists, std::vector<double>* samples) {
    std::byte ack[kAckBytes];
    for (uint32_t rep = 0; rep < command.reps + kWarmups; ++rep) {
        const Lists& list = lists[rep % lists.size()];
        const double began = now_s();
        for (unsigned i = 0; i < command.streams; ++i)
            send_runs(conns[i].get(), arenas.source.data(), list[i]);
        for (const Fd& conn : conns) recv_all(conn.get(), ack, sizeof ack);
        if (rep >= kWarmups) samples->push_back(now_s() - began);
    }
}

void receive_repeatedly(const Command& command, Arenas& arenas, const std::vector<Fd>& conns,
                        const std::vector<Lists>& lists, unsigned i) {
    const std::byte ack[kAckBytes] = {};
    for (uint32_t rep = 0; rep < command.reps + kWarmups; ++rep) {
        recv_runs(conns[i].get(), arenas.destination.data(), lists[rep % lists.size()][i]);
        send_all(conns[i].get(), ack, sizeof ack);
    }
}

std::vector<Lists> all_lists(const std::vector<Work>& works, unsigned streams, bool source) {
    std::vector<Lists> lists;
    for (const Work& work : works) lists.push_back(lists_of(work, streams, source));
    return lists;
}

uint64_t count_runs(const Lists& lists) {
    uint64_t runs = 0;
    for (const auto& list : lists) runs += list.size();
    return runs;
}

}  // namespace

Outcome send_over_tcp(const Command& command, const Arenas& arenas, int control,
                      std::vector<double>* samples) {
    const std::vector<Work> works = works_of(command);
    const std::vector<Lists> lists = all_lists(works, command.streams, true);
    const std::vector<Fd> conns = connect_all(command, await_ready(control));
    Outcome outcome;
    outcome.nbytes = works[0].nbytes;
    outcome.runs = count_runs(lists[0]);
    if (command.reps > 1) {
        const double cpu = cpu_used_s();
        Crew crew(1, command.placement, false,
                  [&](unsigned) { send_repeatedly(command, arenas, conns, lists, samples); });
        await_ready(control);
        const double began = now_s();
        crew.start();
        outcome.seconds = crew.finish() - began;
        outcome.cpu_s = cpu_used_s() - cpu;
        return outcome;
    }
    // The first pass opens the windows and warms the caches, as a connection in use would be.
    send_once(command, arenas, conns, lists[0], control);
    const double cpu = cpu_used_s();
    outcome.seconds = send_once(command, arenas, conns, lists[0], control);
    outcome.cpu_s = cpu_used_s() - cpu;
    return outcome;
}

Outcome receive_over_tcp(const Command& command, Arenas& arenas, int control) {
    const std::vector<Work> works = works_of(command);
    const std::vector<Lists> lists = all_lists(works, command.streams, false);
    for (const Work& work : works) wipe(arenas.destination.data(), work.pieces);
    const std::vector<Fd> conns = accept_all(command, control);
    Outcome outcome;
    double cpu = cpu_used_s();
    if (command.reps > 1) {
        Crew crew(command.streams, command.placement, true,
                  [&](unsigned i) { receive_repeatedly(command, arenas, conns, lists, i); });
        crew.start();
        say_ready(control, 0);
        crew.finish();
    } else {
        receive_once(command, arenas, conns, lists[0], control);
        wipe(arenas.destination.data(), works[0].pieces);
        cpu = cpu_used_s();
        receive_once(command, arenas, conns, lists[0], control);
    }
    outcome.cpu_s = cpu_used_s() - cpu;
    return outcome;
}

}  // namespace kvt_limits
