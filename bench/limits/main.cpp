// kvt_limits: what the kernel and the memory of this machine allow for the work W, with no protocol on top.
//
// Two processes, forked at start: this one owns the source, the other the destination. Commands come on
// stdin, one a line, and one JSON line answers each, so that a harness can interleave them with other
// programs:
//     tcp CASE CONNECTIONS BUFFERS [PLACEMENT] [reps=N] [seed=N] [cc=NAME]
//     copy | memfd | vmread CASE THREADS [PLACEMENT] [reps=N] [seed=N]
//     free                                                          (gives back the memory of case n)
// BUFFERS: default | 256k | ...; PLACEMENT: none | same | cross. CASE: a b c d e f fs n:COUNT (see work.hpp).
// cc: TCP congestion control. reps above 1 measures the latency of each repetition.
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <exception>
#include <iostream>
#include <sstream>
#include <stdexcept>

#include "session.hpp"
#include "wire.hpp"

namespace kvt_limits {

std::vector<Work> works_of(const Command& command) {
    std::vector<Work> works;
    const uint32_t count = command.reps > 1 ? std::min(command.reps, kVariants) : 1;
    for (uint32_t i = 0; i < count; ++i) works.push_back(make_work(command.work, command.seed * 1000 + i));
    return works;
}

namespace {

constexpr int kReplyTimeoutSeconds = 300;

Mode mode_of(const std::string& word) {
    if (word == "tcp") return Mode::kTcp;
    if (word == "copy") return Mode::kCopy;
    if (word == "memfd") return Mode::kMemfd;
    if (word == "vmread") return Mode::kVmread;
    if (word == "free") return Mode::kFree;
    throw std::invalid_argument("unknown command: " + word);
}

int buffer_of(const std::string& word) {
    if (word == "default") return 0;
    const int scale = word.ends_with("k") ? 1024 : word.ends_with("m") ? 1 << 20 : 1;
    return std::stoi(word) * scale;
}

void apply_option(Command& command, const std::string& word) {
    if (word == "none") {
        command.placement = Placement::kNone;
    } else if (word == "same") {
        command.placement = Placement::kSame;
    } else if (word == "cross") {
        command.placement = Placement::kCross;
    } else if (word.starts_with("reps=")) {
        command.reps = static_cast<uint32_t>(std::stoul(word.substr(5)));
    } else if (word.starts_with("cc=") && word.size() < 3 + sizeof command.tuning.congestion) {
        std::memcpy(command.tuning.congestion, word.c_str() + 3, word.size() - 2);
    } else if (word.starts_with("seed=")) {
        command.seed = std::stoull(word.substr(5));
    } else {
        throw std::invalid_argument("unknown option: " + word);
    }
}

Command parse(const std::string& line) {
    std::istringstream words(line);
    std::string word;
    Command command;
    words >> word;
    command.mode = mode_of(word);
    if (command.mode == Mode::kFree) return command;
    if (!(words >> word) || word.size() >= sizeof command.work) throw std::invalid_argument("no case named");
    std::memcpy(command.work, word.c_str(), word.size() + 1);
    words >> command.streams;
    if (command.streams < 1 || command.streams > 512) throw std::invalid_argument("streams: 1 to 512");
    if (command.mode == Mode::kTcp) {
        if (!(words >> word)) throw std::invalid_argument("no socket buffers named");
        command.tuning.buffer_nbytes = buffer_of(word);
    }
    while (words >> word) apply_option(command, word);
    make_work(command.work, 1);  // an unknown case is an error of this line, not of the receiver
    return command;
}

// The destination: always as large as the arena, larger while case n needs it.
void ensure_destination(Arenas& arenas, const Command& command) {
    uint64_t need = kArenaBytes;
    for (const Work& work : works_of(command)) need = std::max(need, work.dst_extent);
    if (arenas.destination.size() >= need) return;
    arenas.destination = Mapping();  // first give back, then take
    arenas.destination = Mapping::anonymous(need);
}

bool all_verified(const Command& command, const Arenas& arenas) {
    // The works of a latency command may write over each other: the last one is whole for sure.
    const std::vector<Work> works = works_of(command);
    const size_t last = works.size() == 1 ? 0 : (command.reps + kWarmups - 1) % works.size();
    return verify(arenas.destination.data(), works[last].pieces);
}

Outcome receive_one(const Command& command, Arenas& arenas, int control, std::vector<double>* samples) {
    Outcome outcome;
    if (command.mode == Mode::kFree) {
        arenas.destination = Mapping();
        arenas.source = Mapping();
        return outcome;
    }
    ensure_destination(arenas, command);
    outcome = command.mode == Mode::kTcp ? receive_over_tcp(command, arenas, control)
                                         : copy_into_place(command, arenas, samples);
    outcome.verified = all_verified(command, arenas) ? 1 : 0;
    return outcome;
}

[[noreturn]] void serve_as_receiver(Arenas arenas, int control) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);  // never outlives the sender
    Command command;
    try {
        for (;;) {
            recv_all(control, &command, sizeof command);
            Outcome outcome;
            std::vector<double> samples;
            try {
                outcome = receive_one(command, arenas, control, &samples);
            } catch (const std::exception& error) {
                outcome.ok = 0;
                std::snprintf(outcome.error, sizeof outcome.error, "%s", error.what());
            }
            outcome.samples = samples.size();
            send_all(control, &outcome, sizeof outcome);
            if (!samples.empty()) send_all(control, samples.data(), samples.size() * sizeof(double));
        }
    } catch (const std::exception&) {
        _exit(0);  // the sender has gone
    }
}

void print(const std::string& line, const Outcome& sum, const std::vector<double>& samples) {
    std::printf("{\"ok\": true, \"command\": \"%s\", \"nbytes\": %llu, \"runs\": %llu, \"seconds\": %.9f, ",
                line.c_str(), static_cast<unsigned long long>(sum.nbytes),
                static_cast<unsigned long long>(sum.runs), sum.seconds);
    std::printf("\"cpu_s\": %.6f, \"verified\": %s, \"samples_us\": [", sum.cpu_s,
                sum.verified != 0 ? "true" : "false");
    if (samples.size() > 1) {
        for (size_t i = 0; i < samples.size(); ++i) std::printf(i == 0 ? "%.2f" : ", %.2f", samples[i] * 1e6);
    }
    std::printf("]}\n");
}

void run_line(const std::string& line, Arenas& arenas, int control) {
    Command command = parse(line);
    command.source_address = reinterpret_cast<uint64_t>(arenas.source.data());
    command.source_pid = getpid();
    if (command.mode == Mode::kMemfd) {
        static const bool filled = [&] {
            const Mapping own = Mapping::shared(arenas.memfd, kArenaBytes, true);
            fill(own.data(), kArenaBytes);
            return true;
        }();
        (void)filled;
    }
    send_all(control, &command, sizeof command);
    std::vector<double> samples;
    Outcome sum;
    if (command.mode == Mode::kTcp) sum = send_over_tcp(command, arenas, control, &samples);
    Outcome theirs;
    recv_all(control, &theirs, sizeof theirs);
    if (theirs.samples != 0) {
        samples.resize(theirs.samples);
        recv_all(control, samples.data(), theirs.samples * sizeof(double));
    }
    if (theirs.ok == 0) throw CommandFailed(theirs.error);
    if (command.mode != Mode::kTcp) sum = theirs;
    sum.cpu_s = command.mode == Mode::kTcp ? sum.cpu_s + theirs.cpu_s : theirs.cpu_s;
    sum.verified = theirs.verified;
    print(line, sum, samples);
}

void serve_stdin(Arenas& arenas, int control) {
    std::string line;
    while (std::getline(std::cin, line)) {
        if (line.empty()) continue;
        try {
            run_line(line, arenas, control);
        } catch (const std::invalid_argument& error) {
            std::printf("{\"ok\": false, \"error\": \"%s\"}\n", error.what());
        } catch (const CommandFailed& error) {
            std::printf("{\"ok\": false, \"error\": \"%s\"}\n", error.what());
        }
        std::fflush(stdout);
    }
}

int run() {
    signal(SIGPIPE, SIG_IGN);
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) throw std::runtime_error("socketpair");
    Arenas arenas;
    arenas.memfd = make_memfd("kvt_limits", kArenaBytes);
    prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0,
          0);  // where Yama restricts process_vm_readv to descendants
    const pid_t child = fork();
    if (child < 0) throw std::runtime_error("fork");
    if (child == 0) {
        close(pair[0]);
        serve_as_receiver(std::move(arenas), pair[1]);
    }
    close(pair[1]);
    arenas.source = Mapping::anonymous(
        kArenaBytes);  // after the fork: shared pages would not be plain memory
    fill(arenas.source.data(), kArenaBytes);
    const timeval limit{kReplyTimeoutSeconds, 0};
    setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    serve_stdin(arenas, pair[0]);
    close(pair[0]);
    waitpid(child, nullptr, 0);
    return 0;
}

}  // namespace
}  // namespace kvt_limits

int main() {
    try {
        return kvt_limits::run();
    } catch (const std::exception& error) {
        // After an error in mid-command the two processes no longer agree on what comes next.
        std::printf("{\"ok\": false, \"error\": \"%s\", \"fatal\": true}\n", error.what());
        return 1;
    }
}
