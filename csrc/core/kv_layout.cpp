#include "liveact/kv_layout.h"

#include "core/check.h"

namespace liveact {

Memory memory_from_name(std::string_view name) {
  if (name == "sequential") return Memory::sequential;
  if (name == "sharded") return Memory::sharded;
  if (name == "mean") return Memory::mean;
  detail::fail("memory: expected sequential, sharded or mean, found '", name, "'");
}

CompressAxis compress_axis_from_name(std::string_view name) {
  if (name == "token") return CompressAxis::token;
  if (name == "frame") return CompressAxis::frame;
  detail::fail("compress axis: expected token or frame, found '", name, "'");
}

ValueFilter value_filter_from_name(std::string_view name) {
  if (name == "key") return ValueFilter::key;
  if (name == "own") return ValueFilter::own;
  detail::fail("value filter: expected key or own, found '", name, "'");
}

namespace {

SlotUpdate move(int target, int source) { return {target, 1, {source, 0, 0, 0, 0}}; }

SlotUpdate compress_run(int target, int first) {
  return {target, kCompressTaps, {first, first + 1, first + 2, first + 3, first + 4}};
}

bool is_released(const SlotCounts& counts) {
  return counts.reference == 2 && counts.long_term == 2 && counts.short_term == 2 &&
         counts.current == 8;
}

}  // namespace

std::vector<SlotUpdate> update_table(const SlotCounts& counts, Memory memory, int64_t block) {
  LIVEACT_CHECK(counts.reference >= 0 && counts.long_term >= 0 && counts.short_term >= 0 &&
                    counts.context() >= 1 && counts.current >= 1,
                "kv layout: expected slot counts >= 0 with a context and a current block, found ",
                counts.reference, ",", counts.long_term, ",", counts.short_term, ",",
                counts.current);
  LIVEACT_CHECK(counts.short_term <= counts.current,
                "kv layout: expected at most as many short-term slots as the current block has (",
                counts.current, "), found ", counts.short_term);
  LIVEACT_CHECK(memory != Memory::sharded || is_released(counts),
                "kv layout: sharded memory is defined for slot counts 2,2,2,8 only, found ",
                counts.reference, ",", counts.long_term, ",", counts.short_term, ",",
                counts.current);
  // Slots between the reference and the frames that move.
  const int span = counts.long_term + counts.short_term + counts.current - counts.short_term;
  LIVEACT_CHECK(counts.long_term == 0 || span >= kCompressTaps, "kv layout: expected at least ",
                kCompressTaps, " slots to compress between reference and short-term, found ", span);

  std::vector<SlotUpdate> table;
  if (block == 0) {
    for (int slot = 0; slot < counts.context(); ++slot) table.push_back(move(slot, slot));
    return table;
  }
  if (memory == Memory::sharded) {
    // Two devices, each with half of the context and half of the current block.
    table.push_back({2, kCompressTaps, {2, 6, 7, 8, 9}});
    table.push_back({3, kCompressTaps, {3, 4, 5, 10, 11}});
  } else {
    for (int i = 0; i < counts.long_term; ++i) {
      const int gaps = counts.long_term - 1;
      const int offset = gaps == 0 ? 0 : (i * (span - kCompressTaps) + gaps / 2) / gaps;
      table.push_back(compress_run(counts.reference + i, counts.reference + offset));
    }
  }
  for (int i = 0; i < counts.short_term; ++i) {
    table.push_back(
        move(counts.reference + counts.long_term + i, counts.total() - counts.short_term + i));
  }
  return table;
}

}  // namespace liveact
