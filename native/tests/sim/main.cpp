// kvt_sim --schedules N --seed S [--verbose]: runs schedules S, S + 1 ... and checks each. A failing one is
// named by its seed;
// `--schedules 1 --seed THAT --verbose` shows it again, step by step.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "world.hpp"

namespace {

struct Options {
    std::uint64_t schedules = 1000, seed = 1;
    bool verbose = false;
};

Options parse(int argc, char** argv) {
    Options options;
    for (int i = 1; i < argc; ++i) {
        const std::string word = argv[i];
        const bool more = i + 1 < argc;
        if (word == "--schedules" && more) {
            options.schedules = std::strtoull(argv[++i], nullptr, 10);
        } else if (word == "--seed" && more) {
            options.seed = std::strtoull(argv[++i], nullptr, 10);
        } else if (word == "--verbose") {
            options.verbose = true;
        } else {
            std::fprintf(stderr, "usage: kvt_sim [--schedules N] [--seed S] [--verbose]\n");
            std::exit(2);
        }
    }
    return options;
}

}  // namespace

int main(int argc, char** argv) {
    const Options options = parse(argc, argv);
    kvt::sim::Totals totals;
    std::uint64_t failed = 0;
    for (std::uint64_t i = 0; i < options.schedules; ++i) {
        const std::uint64_t seed = options.seed + i;
        try {
            kvt::sim::World world(seed, options.verbose);
            world.run(totals);
        } catch (const std::exception& broken) {
            ++failed;
            std::printf("seed %llu: %s\n", static_cast<unsigned long long>(seed), broken.what());
            std::fflush(stdout);
        }
    }
    std::printf("%llu transfers, %llu succeeded, %llu of them asked nobody, %llu steps\n",
                static_cast<unsigned long long>(totals.transfers), static_cast<unsigned long long>(totals.ok),
                static_cast<unsigned long long>(totals.taken), static_cast<unsigned long long>(totals.steps));
    std::printf("%llu passed, %llu failed\n", static_cast<unsigned long long>(options.schedules - failed),
                static_cast<unsigned long long>(failed));
    return failed == 0 ? 0 : 1;
}
