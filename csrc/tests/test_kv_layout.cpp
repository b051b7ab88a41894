// The slot tables, the released ones literally.

#include "liveact/error.h"
#include "liveact/kv_layout.h"
#include "tests/check.h"

namespace liveact {

namespace {

// One line per table: "2<2,3,4,5,6 4<12".
std::string table_text(const SlotCounts& counts, Memory memory, int64_t block) {
  std::string text;
  for (const SlotUpdate& update : update_table(counts, memory, block)) {
    text += test::text(text.empty() ? "" : " ", update.target, "<");
    for (int i = 0; i < update.num_sources; ++i) {
      text += test::text(i == 0 ? "" : ",", update.sources[i]);
    }
  }
  return text;
}

void check_refused(const SlotCounts& counts, Memory memory, const std::string& expected,
                   test::Where where = test::Where::current()) {
  test::check_throws<Error>([&] { update_table(counts, memory, 1); }, expected, where);
}

}  // namespace

TEST(released_tables) {
  const std::string first = "0<0 1<1 2<2 3<3 4<4 5<5";
  const std::string sequential = "2<2,3,4,5,6 3<7,8,9,10,11 4<12 5<13";
  const std::string sharded = "2<2,6,7,8,9 3<3,4,5,10,11 4<12 5<13";
  for (const Memory memory : {Memory::sequential, Memory::sharded, Memory::mean}) {
    CHECK_EQ(table_text({}, memory, 0), first);
    const std::string& later = memory == Memory::sharded ? sharded : sequential;
    for (const int64_t block : {1, 2, 3000}) CHECK_EQ(table_text({}, memory, block), later);
  }
}

TEST(slot_counts) {
  const SlotCounts counts;
  CHECK_EQ(counts.context(), 6);
  CHECK_EQ(counts.total(), 14);
  CHECK_EQ(counts.frames_of_block(0), 6);
  CHECK_EQ(counts.frames_of_block(1), 8);
  CHECK_EQ(counts.frames_of_block(int64_t{1} << 40), 8);
  CHECK_EQ(counts.first_slot_of_block(0), 0);
  CHECK_EQ(counts.first_slot_of_block(1), 6);
}

TEST(other_slot_counts) {
  // {reference, long-term, short-term, current}
  CHECK_EQ(table_text({2, 2, 2, 6}, Memory::sequential, 1), "2<2,3,4,5,6 3<5,6,7,8,9 4<10 5<11");
  CHECK_EQ(table_text({2, 3, 2, 12}, Memory::mean, 1),
           "2<2,3,4,5,6 3<7,8,9,10,11 4<12,13,14,15,16 5<17 6<18");
  CHECK_EQ(table_text({1, 1, 0, 4}, Memory::sequential, 1), "1<1,2,3,4,5");
  CHECK_EQ(table_text({1, 0, 1, 2}, Memory::sequential, 1), "1<3");
  CHECK_EQ(table_text({1, 0, 0, 2}, Memory::sequential, 1), "");
  CHECK_EQ(table_text({1, 0, 1, 2}, Memory::sequential, 0), "0<0 1<1");
  // Every compressed run ends before the frames that move, whatever the counts.
  for (int long_term = 1; long_term <= 6; ++long_term) {
    for (int current = 5; current <= 20; ++current) {
      const SlotCounts counts{2, long_term, 2, current};
      int last_start = -1;
      for (const SlotUpdate& update : update_table(counts, Memory::sequential, 1)) {
        if (!update.compresses()) continue;
        CHECK(update.sources[0] >= counts.reference);
        CHECK(update.sources[0] >= last_start);
        CHECK(update.sources[4] < counts.total() - counts.short_term);
        last_start = update.sources[0];
      }
    }
  }
}

TEST(impossible_slot_counts_are_refused) {
  check_refused({2, 2, 2, 6}, Memory::sharded,
                "sharded memory is defined for slot counts 2,2,2,8 only, found 2,2,2,6");
  check_refused({2, 3, 2, 8}, Memory::sharded, "2,2,2,8 only, found 2,3,2,8");
  check_refused({2, -1, 2, 8}, Memory::sequential, "expected slot counts >= 0");
  check_refused({0, 0, 0, 8}, Memory::sequential,
                "with a context and a current block, found 0,0,0,8");
  check_refused({2, 2, 2, 0}, Memory::mean, "found 2,2,2,0");
  check_refused({2, 2, 3, 2}, Memory::sequential,
                "expected at most as many short-term slots as the current block has (2), found 3");
  check_refused({2, 1, 1, 3}, Memory::sequential,
                "expected at least 5 slots to compress between reference and short-term, found 4");
}

TEST(memory_names) {
  CHECK(memory_from_name("sequential") == Memory::sequential);
  CHECK(memory_from_name("sharded") == Memory::sharded);
  CHECK(memory_from_name("mean") == Memory::mean);
  CHECK(compress_axis_from_name("token") == CompressAxis::token);
  CHECK(compress_axis_from_name("frame") == CompressAxis::frame);
  CHECK(value_filter_from_name("key") == ValueFilter::key);
  CHECK(value_filter_from_name("own") == ValueFilter::own);
  test::check_throws<Error>([] { memory_from_name("Mean"); },
                            "memory: expected sequential, sharded or mean, found 'Mean'");
  test::check_throws<Error>([] { compress_axis_from_name(""); },
                            "compress axis: expected token or frame, found ''");
  test::check_throws<Error>([] { value_filter_from_name("keys"); },
                            "value filter: expected key or own, found 'keys'");
}

}  // namespace liveact
