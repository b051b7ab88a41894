// Which slot of the key/value layout holds what, where it came from, and at which position it is
// rotated. Data only: the backends execute these tables.
//
// A slot is one latent frame. With the released counts:
//   slot      0 1          2 3          4 5           6 .. 13
//   holds     reference    long-term    short-term    the current block
// Slots before the current block are the context: all that lives between two blocks. A key takes
// the position of the slot it is in (the RoPE reset). Block 0 fills the context slots themselves.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "liveact/api.h"

namespace liveact {

constexpr int kCompressTaps = 5;  // latent frames reduced to one: kernel = stride = 5

struct SlotCounts {
  int reference = 2;
  int long_term = 2;
  int short_term = 2;
  int current = 8;

  int context() const { return reference + long_term + short_term; }
  int total() const { return context() + current; }
  int first_block() const { return context(); }  // latent frames of block 0
  int frames_of_block(int64_t block) const { return block == 0 ? first_block() : current; }
  int first_slot_of_block(int64_t block) const { return block == 0 ? 0 : context(); }
};

enum class Memory { sequential, sharded, mean };
enum class CompressAxis { token, frame };
enum class ValueFilter { key, own };

// How a session's memory works; fixed when its stream opens.
struct MemoryPolicy {
  Memory memory = Memory::sequential;
  CompressAxis axis = CompressAxis::token;
  ValueFilter values = ValueFilter::key;
};

LIVEACT_API Memory memory_from_name(std::string_view name);               // throws Error
LIVEACT_API CompressAxis compress_axis_from_name(std::string_view name);  // throws Error
LIVEACT_API ValueFilter value_filter_from_name(std::string_view name);    // throws Error

// One target slot of the context and the slots (numbered over context and current block together,
// values before the update) that it is made of: one source moves, five are compressed.
struct SlotUpdate {
  int target;
  int num_sources;
  std::array<int, kCompressTaps> sources;

  bool compresses() const { return num_sources == kCompressTaps; }
};

// The update that turns the context and the block just denoised into the context of the next
// block. `block` is the block just denoised: block 0 fills every context slot, block 1 already
// compresses (the released code does the same at the start of block 2, from the same values).
// Long-term slot i compresses five consecutive slots; the groups are spread evenly over the slots
// between the reference and the frames that move to the short-term slots, which for the released
// counts is the released `sequential` table. `sharded` exists for the released counts only.
// Throws Error for counts that no table exists for.
LIVEACT_API std::vector<SlotUpdate> update_table(const SlotCounts& counts, Memory memory,
                                                 int64_t block);

}  // namespace liveact
