// A schedule: two machines, their network, what their users do and what befalls them, all from one seed.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "machine.hpp"

namespace kvt::sim {

struct Totals {
    std::uint64_t transfers = 0, ok = 0, taken = 0, steps = 0;
};

class World {
  public:
    World(std::uint64_t seed, bool verbose);
    /// Throws Broken.
    void run(Totals& totals);

  private:
    // The transfers of one key in one direction: what both sides agree to move.
    struct Flow {
        std::string key;
        unsigned source = 0;  // machine
        std::vector<std::uint32_t> layers;
        std::size_t blocks[2] = {0, 0};  // by group
        int posts_left[2] = {0, 0};      // by role
        RecordPtr live[2];
    };
    // A grant of one machine, and what the other does with it.
    struct GrantFlow {
        std::uint8_t n = 0;
        unsigned owner = 0;
        protocol::GrantMode mode{};
        std::size_t blocks[2] = {0, 0};  // by group
    };
    enum class Fate { none, cut, black_hole, crash };

    MachineSetup setup();
    Weather weather();
    void build_network();
    void plan();
    void plan_flow(std::size_t index);
    void plan_grants();
    void plan_owner(const GrantFlow& flow);
    void plan_end(const GrantFlow& flow, Time in);
    void make_grant(const GrantFlow& flow, unsigned readers, Time ttl, int tries);
    void use_grant(const GrantFlow& flow);
    void plan_fate();
    void plan_replay();
    void post(std::size_t flow, protocol::Role role);
    void dress(Record& record, Flow& flow);
    void plan_gate(const RecordPtr& record);
    std::vector<Row> choose(Machine& machine, const Flow& flow, protocol::Role role, bool mismatching,
                            bool late);
    void produce(Record& record, std::uint32_t layer);
    void over(const RecordPtr& record);
    void cut_link();
    void check_end();

    Clock clock_;
    Random random_;
    bool memory_backend_, named_;
    unsigned lanes_;
    Time span_;  // in which users act
    unsigned busy_percent_;
    Checker checker_;
    Fate fate_ = Fate::none;
    std::array<std::unique_ptr<Machine>, 2> machines_;
    std::vector<std::unique_ptr<Pipe>> pipes_;
    std::vector<Flow> flows_;
    std::vector<std::weak_ptr<Record>> records_;
    std::uint64_t checks_ = 0;
};

}  // namespace kvt::sim
