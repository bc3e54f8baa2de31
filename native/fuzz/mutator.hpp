// Mutations that keep an input a list of steps: a step, or a scene of several, is put in; one is taken out,
// copied, or changed in one field.
//
// Lives here: the mutator that both targets give libFuzzer. Does not live here: what a step means, and the
// scenes, which take the place of a corpus in the tree. Invariant: every input is still reachable, since a
// quarter of the mutations are libFuzzer's own.
#pragma once

#include <cstring>
#include <random>
#include <span>
#include <vector>

#include "fuzz/input.hpp"

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t nbytes, std::size_t most);

namespace kvt::fuzz {

inline constexpr std::size_t kStepNbytes = sizeof(Op);
static_assert(kStepNbytes == 8);

/// Small numbers, since ids, keys and pools are small; seldom a frame that is spoilt or sent many times.
inline Op draw_step(std::minstd_rand& random) {
    const auto small = [&] { return static_cast<std::uint8_t>(random() % 4 == 0 ? random() : random() % 4); };
    Op step{static_cast<std::uint8_t>(random() % 32 | (random() % 16 == 0 ? 128 : 0)),
            small(),
            small(),
            small(),
            small(),
            small(),
            small(),
            0};
    if (random() % 8 == 0) step.g = static_cast<std::uint8_t>(random());
    return step;
}

using Scene = std::vector<Op>;

/// Puts steps in at `at`; 0 if there is no room.
inline std::size_t insert(std::uint8_t* data, std::size_t nbytes, std::size_t most, std::uint8_t* at,
                          std::span<const Op> steps) {
    const std::size_t more = steps.size() * kStepNbytes;
    if (more == 0 || nbytes + more > most) return 0;
    std::memmove(at + more, at, static_cast<std::size_t>(data + nbytes - at));
    std::memcpy(at, steps.data(), more);
    return nbytes + more;
}

inline std::size_t mutate_steps(std::uint8_t* data, std::size_t nbytes, std::size_t most, unsigned seed,
                                std::span<const Scene> scenes) {
    std::minstd_rand random(seed);
    const std::size_t steps = nbytes / kStepNbytes;
    std::uint8_t* at = data + kStepNbytes * (random() % (steps + 1));
    std::size_t made = 0;
    switch (random() % 8) {
        case 0:
            if (!scenes.empty()) made = insert(data, nbytes, most, at, scenes[random() % scenes.size()]);
            break;
        case 1:
        case 2: {
            const Op step = draw_step(random);
            made = insert(data, nbytes, most, at, {&step, 1});
            break;
        }
        case 3:
            if (steps == 0) break;
            at = data + kStepNbytes * (random() % steps);
            std::memmove(at, at + kStepNbytes, static_cast<std::size_t>(data + nbytes - at) - kStepNbytes);
            made = nbytes - kStepNbytes;
            break;
        case 4:
        case 5:
            if (steps == 0) break;
            data[random() % (steps * kStepNbytes)] = static_cast<std::uint8_t>(
                random() % 2 == 0 ? random() : random() % 8);
            made = nbytes;
            break;
        default: break;
    }
    return made != 0 ? made : LLVMFuzzerMutate(data, nbytes, most);
}

}  // namespace kvt::fuzz
