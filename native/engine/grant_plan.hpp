// What one side's use of a grant means in the owner's pool: which of its layers, which of its blocks.
//
// Lives here: the translation, for the owner who serves and for the reader who finds the grant by itself.
// Does not live here: whether it may be used (Grants), where the memory is (the shape that the caller plans
// with).
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "memory/plan.hpp"
#include "protocol/frames.hpp"
#include "protocol/terms.hpp"

namespace kvt::engine {

/// The user asked for what the grant hasn't.
struct NotGranted {};

/// The owner's block ids, by group.
struct GrantedBlocks {
    const std::vector<memory::Ids>* ids;  // null: every block of the pool
    std::shared_ptr<const void> keep;     // has those
    const memory::PoolShape& shape;       // the pool's
};

/// A stream in the words that the two sides compare; all but the pool.
protocol::Terms terms_of(const memory::StreamPlan& plan);

/// Which of the owner's layers the user's stand for, in their order: by name where both pools have names,
/// else by place. Nothing, with what is missing, where there is none.
std::optional<std::vector<std::uint32_t>> layers_for(const protocol::Terms& terms,
                                                     const protocol::PoolTerms& theirs,
                                                     const protocol::PoolTerms& owners,
                                                     protocol::Mismatch& mismatch);

/// The owner's block ids of one group: those at these positions of what is granted, or all. Throws
/// NotGranted.
std::shared_ptr<const memory::Ids> ids_of(const GrantedBlocks& granted, std::size_t group,
                                          const memory::Ids* positions);

/// The owner's block ids by group, for the positions that the user names of its own groups. Throws
/// NotGranted.
std::vector<std::shared_ptr<const memory::Ids>> ids_for(const GrantedBlocks& granted,
                                                        const protocol::GrantUse& use,
                                                        const protocol::Terms& terms,
                                                        const protocol::PoolTerms& theirs,
                                                        const protocol::PoolTerms& owners,
                                                        const std::vector<std::uint32_t>& layers);

}  // namespace kvt::engine
