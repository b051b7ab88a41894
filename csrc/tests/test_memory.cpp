// split_qkv, store_kv and the ConvKV memory against rotation and filters in fp64.

#include "tests/kv.h"

namespace liveact {

namespace {

using test::Expected;
using test::kUlp;
using test::Matrix;
using test::RopeTables;
using test::Segment;

constexpr float kEps = 1e-6f;

test::Cpu memory_cpu(int64_t width) {
  return test::Cpu({.max_cols = 3 * width, .max_operand = 1, .max_keys = 1, .head_dim = 8});
}

struct SplitResult {
  SplitResult(int64_t heads, int64_t tokens, int64_t hd, DType dtype)
      : q(heads * tokens, hd, dtype),
        current(heads, tokens, hd, dtype, std::vector<float>(heads, 0.02f)) {}
  Matrix q;
  Segment current;
};

SplitResult split(const test::Cpu& cpu, const Matrix& qkv, const std::vector<float>& q_gain,
                  const std::vector<float>& k_gain, int64_t heads, const RopeTables& tables,
                  int64_t first_position, DType dtype) {
  const int64_t width = qkv.rows().cols / 3;
  const int64_t tokens = qkv.rows().rows;
  const int64_t hd = width / heads;
  SplitResult result(heads, tokens, hd, dtype);
  const Heads q{result.q.rows().data, dtype, heads, tokens, hd, result.q.rows().scale};
  cpu->split_qkv(qkv.rows(), q_gain.data(), k_gain.data(), kEps, tables.view(), first_position, 0,
                 q, result.current.view());
  return result;
}

// One of q and k (`column` 0 or width), normed over all of D, rotated, head-major.
//
// fp32 bound: the norm is off relatively by (D/2 + 8)·u; a rotation adds 4·u of |even| + |odd|.
Expected rotated_reference(const Matrix& qkv, int64_t column, const std::vector<float>& gain,
                           int64_t heads, const RopeTables& tables, int64_t first_position) {
  const int64_t width = qkv.rows().cols / 3;
  const int64_t hd = width / heads;
  Expected expected;
  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t t = 0; t < qkv.rows().rows; ++t) {
      double squares = 0.0;
      for (int64_t i = 0; i < width; ++i) squares += qkv(t, column + i) * qkv(t, column + i);
      const double inverse = 1.0 / std::sqrt(squares / static_cast<double>(width) + kEps);
      std::vector<double> x(hd);
      for (int64_t d = 0; d < hd; ++d) {
        x[d] = qkv(t, column + head * hd + d) * inverse * gain[head * hd + d];
      }
      std::vector<double> before = x;
      tables.rotate(first_position + t / tables.frame_tokens(), t % tables.frame_tokens(), 1.0,
                    x.data());
      for (int64_t d = 0; d < hd; ++d) {
        const double pair = std::abs(before[d]) + std::abs(before[d ^ 1]);
        expected.add(x[d], (0.5 * static_cast<double>(width) + 12) * kUlp * pair);
      }
    }
  }
  return expected;
}

}  // namespace

TEST(split_qkv) {
  const struct {
    int64_t heads, hd;
    int frames, grid_rows, grid_cols;
  } sizes[] = {{2, 8, 2, 2, 3}, {3, 10, 3, 1, 5}, {1, 128, 2, 3, 1}};
  for (const auto& size : sizes) {
    const int64_t width = size.heads * size.hd;
    const test::Cpu cpu = memory_cpu(width);
    for (const DType in : {DType::f32, DType::bf16}) {
      for (const DType out : test::kAllTypes) {
        test::Random random(12);
        const int64_t tokens = size.frames * size.grid_rows * size.grid_cols;
        const RopeTables tables(14, size.grid_rows, size.grid_cols, size.hd);
        const Matrix qkv(tokens, 3 * width, in, random.normals(tokens * 3 * width, 2.0f));
        const std::vector<float> q_gain = random.normals(width);
        const std::vector<float> k_gain = random.normals(width);
        const SplitResult found = split(cpu, qkv, q_gain, k_gain, size.heads, tables, 6, out);
        const std::string what = test::text(name(in), " -> ", name(out), " hd ", size.hd);
        check_stored(found.q.rows(), rotated_reference(qkv, 0, q_gain, size.heads, tables, 6),
                     "split q " + what);
        check_stored(found.current.key_rows(),
                     rotated_reference(qkv, width, k_gain, size.heads, tables, 6),
                     "split k " + what, false);
        Expected values;
        for (int64_t i = 0; i < size.heads * tokens * size.hd; ++i) {
          const int64_t head = i / (tokens * size.hd);
          const int64_t token = i / size.hd % tokens;
          values.add(qkv(token, 2 * width + head * size.hd + i % size.hd), 0.0);
        }
        check_stored(found.current.value_rows(), values, "split v " + what, false);
      }
    }
  }
}

// The latent-frame position turns the first pairs of a head only: 22 of 64, as released.
TEST(position_turns_frame_pairs_only) {
  constexpr int64_t kHeads = 2, kHeadDim = 128, kTokens = 12;
  test::Random random(13);
  const test::Cpu cpu = memory_cpu(kHeads * kHeadDim);
  const RopeTables tables(14, 2, 3, kHeadDim);
  CHECK_EQ(tables.view().pairs_frame, 22);
  CHECK_EQ(tables.view().pairs_row, 21);
  const Matrix qkv(kTokens, 3 * kHeads * kHeadDim, DType::f32,
                   random.normals(kTokens * 3 * kHeads * kHeadDim));
  const std::vector<float> gain(kHeads * kHeadDim, 1.0f);
  const SplitResult at0 = split(cpu, qkv, gain, gain, kHeads, tables, 0, DType::f32);
  const SplitResult at5 = split(cpu, qkv, gain, gain, kHeads, tables, 5, DType::f32);
  for (int64_t row = 0; row < kHeads * kTokens; ++row) {
    for (int64_t d = 0; d < kHeadDim; ++d) {
      const double k0 = test::value(at0.current.key_rows(), row, d);
      const double k5 = test::value(at5.current.key_rows(), row, d);
      if (d >= 2 * 22) {
        CHECK_EQ(at0.q(row, d), at5.q(row, d));
        CHECK_EQ(k0, k5);
      } else {
        CHECK(at0.q(row, d) != at5.q(row, d));
        CHECK(k0 != k5);
      }
    }
  }
  CHECK(std::memcmp(at0.current.view().v, at5.current.view().v, kTokens * kHeads * kHeadDim * 4) ==
        0);
}

TEST(value_scale) {
  constexpr int64_t kHeads = 3, kHeadDim = 8, kWidth = kHeads * kHeadDim, kTokens = 9;
  test::Random random(14);
  std::vector<float> values = random.normals(kTokens * 3 * kWidth);
  for (int64_t i = 0; i < kTokens * 3 * kWidth; ++i) {
    const int64_t column = i % (3 * kWidth);
    if (column < 2 * kWidth) values[i] = 100.0f;                // q and k do not count
    if (column / kHeadDim == 2 * kHeads + 2) values[i] = 0.0f;  // a head of zeros
  }
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const Matrix qkv(kTokens, 3 * kWidth, dtype, values);
    std::vector<float> scale(kHeads, -1.0f);
    const test::Cpu cpu = memory_cpu(kWidth);
    cpu->value_scale(qkv.rows().columns(2 * kWidth, kWidth), kHeads, scale.data());
    for (int64_t head = 0; head < kHeads; ++head) {
      double amax = kF8AmaxFloor;
      for (int64_t i = 0; i < kTokens * kHeadDim; ++i) {
        amax = std::max(amax,
                        std::abs(qkv(i / kHeadDim, 2 * kWidth + head * kHeadDim + i % kHeadDim)));
      }
      CHECK_NEAR(scale[head], 8 * amax / 448, 2 * kUlp * 8 * amax / 448);
    }
  }
}

TEST(store_kv) {
  constexpr int64_t kHeads = 3, kHeadDim = 8, kWidth = kHeads * kHeadDim, kTokens = 7;
  test::Random random(15);
  const std::vector<float> keys = random.normals(kTokens * kWidth);
  const std::vector<float> values = random.normals(kTokens * kWidth);
  const test::Cpu cpu = memory_cpu(kWidth);
  for (const DType in : {DType::f32, DType::bf16}) {
    for (const DType out : test::kAllTypes) {
      const Matrix k(kTokens, kWidth, in, keys);
      const Matrix v(kTokens, kWidth, in, values);
      const Segment segment(kHeads, kTokens, kHeadDim, out, {0.01f, 0.02f, 0.5f});
      cpu->store_kv(k.rows(), v.rows(), segment.view());
      Expected expected_k, expected_v;
      for (int64_t i = 0; i < kHeads * kTokens * kHeadDim; ++i) {
        const int64_t column = i / (kTokens * kHeadDim) * kHeadDim + i % kHeadDim;
        expected_k.add(k(i / kHeadDim % kTokens, column), 0.0);
        expected_v.add(v(i / kHeadDim % kTokens, column), 0.0);
      }
      check_stored(segment.key_rows(), expected_k, "store_kv k", false);
      check_stored(segment.value_rows(), expected_v, "store_kv v", false);
    }
  }
}

namespace {

struct MemoryCase {
  Memory memory;
  int64_t block;
  CompressFilter filter;
  DType dtype;
  std::string name;
};

constexpr SlotCounts kSlots;
constexpr int64_t kHeads = 2, kHeadDim = 8, kWidth = kHeads * kHeadDim;

// Expected context [H, 6F, hd], from the values before the update.
//
// fp32 bound: un-rotating costs 4·u of |even| + |odd|, the taps 6·u of what they add up, rotating
// again 4·u: together below 16·u of the pair's Σ|tap|·(|even| + |odd|).
void expect_update(const MemoryCase& c, const RopeTables& tables, const Segment& context,
                   const Segment& current, Expected& keys, Expected& values) {
  const int64_t frame = tables.frame_tokens();
  const int64_t first_slot = kSlots.first_slot_of_block(c.block);
  const auto at = [&](int64_t slot, int64_t token) {  // {segment, token index}
    return slot >= first_slot
               ? std::pair<const Segment*, int64_t>{&current, (slot - first_slot) * frame + token}
               : std::pair<const Segment*, int64_t>{&context, slot * frame + token};
  };
  const std::vector<SlotUpdate> table = update_table(kSlots, c.memory, c.block);
  for (int64_t head = 0; head < kHeads; ++head) {
    for (int64_t slot = 0; slot < kSlots.context(); ++slot) {
      const SlotUpdate* update = nullptr;
      for (const SlotUpdate& u : table) update = u.target == slot ? &u : update;
      for (int64_t t = 0; t < frame; ++t) {
        std::vector<double> key(kHeadDim), value(kHeadDim), sizes(kHeadDim), v_sizes(kHeadDim);
        for (int j = 0; update != nullptr && j < update->num_sources; ++j) {
          // Token axis: token 5t + j of the five source frames laid end to end.
          const bool tokens = update->compresses() && c.filter.axis == CompressAxis::token;
          const int64_t flat = tokens ? 5 * t + j : j * frame + t;
          const int64_t source_slot = update->sources[flat / frame];
          const auto [segment, index] = at(source_slot, flat % frame);
          std::vector<double> x(kHeadDim);
          for (int64_t d = 0; d < kHeadDim; ++d) x[d] = segment->key(head, index, d);
          tables.rotate(source_slot, flat % frame, -1.0, x.data());
          for (int64_t d = 0; d < kHeadDim; ++d) {
            const auto tap = [&](const float* taps) {
              if (!update->compresses()) return 1.0;
              return taps == nullptr ? 0.2 : taps[(head * kHeadDim + d) * 5 + j];
            };
            key[d] += tap(c.filter.key_taps) * x[d];
            sizes[d] += std::abs(tap(c.filter.key_taps)) * (std::abs(x[d]) + std::abs(x[d ^ 1]));
            const double v = segment->value(head, index, d);
            value[d] += tap(c.filter.value_taps) * v;
            v_sizes[d] += std::abs(tap(c.filter.value_taps) * v);
          }
        }
        tables.rotate(slot, t, 1.0, key.data());
        for (int64_t d = 0; d < kHeadDim; ++d) {
          const bool kept = update == nullptr;
          keys.add(kept ? context.key(head, slot * frame + t, d) : key[d],
                   kept ? 0.0 : 16 * kUlp * (sizes[d] + sizes[d ^ 1]));
          values.add(kept ? context.value(head, slot * frame + t, d) : value[d],
                     kept ? 0.0 : 8 * kUlp * v_sizes[d]);
        }
      }
    }
  }
}

void check_update(const test::Cpu& cpu, const MemoryCase& c, int grid_rows, int grid_cols) {
  test::Random random(16);
  const RopeTables tables(kSlots.total(), grid_rows, grid_cols, kHeadDim);
  const int64_t frame = tables.frame_tokens();
  const int64_t tokens = kSlots.context() * frame;
  const int64_t new_tokens = kSlots.frames_of_block(c.block) * frame;
  const Segment context(kHeads, tokens, kHeadDim, c.dtype, random);
  const Segment current(kHeads, new_tokens, kHeadDim, c.dtype, random);
  const Segment staging(kHeads, tokens, kHeadDim, c.dtype, {0.01f, 0.02f});
  Expected keys, values;
  expect_update(c, tables, context, current, keys, values);

  cpu->update_memory(update_table(kSlots, c.memory, c.block), c.filter, tables.view(),
                     kSlots.first_slot_of_block(c.block), current.view(), staging.view(),
                     context.view());
  const std::string what = test::text(c.name, " ", name(c.dtype), " F ", frame);
  check_stored(context.key_rows(), keys, "update k " + what, false);
  check_stored(context.value_rows(), values, "update v " + what, false);

  // export_kv undoes the rotation: token-major, keys un-rotated for the slot they are in now.
  std::vector<float> k(tokens * kWidth), v(tokens * kWidth);
  cpu->export_kv(context.view(), tables.view(), 0, k.data(), v.data());
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t head = 0; head < kHeads; ++head) {
      std::vector<double> x(kHeadDim);
      for (int64_t d = 0; d < kHeadDim; ++d) x[d] = context.key(head, t, d);
      const std::vector<double> stored = x;
      tables.rotate(t / frame, t % frame, -1.0, x.data());
      for (int64_t d = 0; d < kHeadDim; ++d) {
        const int64_t at = (t * kHeads + head) * kHeadDim + d;
        CHECK_NEAR(k[at], x[d], 5 * kUlp * (std::abs(stored[d]) + std::abs(stored[d ^ 1])));
        CHECK_NEAR(v[at], context.value(head, t, d), kUlp * std::abs(v[at]));
      }
    }
  }
}

}  // namespace

TEST(update_memory) {
  test::Random random(17);
  const test::Cpu cpu = memory_cpu(kWidth);
  const std::vector<float> key_taps = random.normals(kWidth * 5, 0.5f);
  const std::vector<float> value_taps = random.normals(kWidth * 5, 0.5f);
  const int grids[][2] = {{1, 1}, {1, 5}, {7, 1}, {3, 4}, {1, 13}};  // F = 1, 5, 7, 12, 13
  for (const DType dtype : test::kAllTypes) {
    for (const auto& grid : grids) {
      for (const CompressAxis axis : {CompressAxis::token, CompressAxis::frame}) {
        const CompressFilter both{key_taps.data(), key_taps.data(), axis};
        const CompressFilter own{key_taps.data(), value_taps.data(), axis};
        const CompressFilter mean{nullptr, nullptr, axis};
        const std::string along = axis == CompressAxis::token ? " token" : " frame";
        check_update(cpu, {Memory::sequential, 0, both, dtype, "block 0" + along}, grid[0],
                     grid[1]);
        check_update(cpu, {Memory::sequential, 1, both, dtype, "key" + along}, grid[0], grid[1]);
        check_update(cpu, {Memory::sequential, 2, own, dtype, "own" + along}, grid[0], grid[1]);
        check_update(cpu, {Memory::sharded, 1, own, dtype, "sharded" + along}, grid[0], grid[1]);
        check_update(cpu, {Memory::mean, 1, mean, dtype, "mean" + along}, grid[0], grid[1]);
      }
    }
  }
}

// With the scale of its head fixed, an fp8 value moves between slots without changing its code.
TEST(moved_values_keep_their_codes) {
  test::Random random(18);
  const RopeTables tables(kSlots.total(), 2, 3, kHeadDim);
  const int64_t frame = tables.frame_tokens();
  const Segment context(kHeads, kSlots.context() * frame, kHeadDim, DType::f8, random);
  const Segment current(kHeads, kSlots.current * frame, kHeadDim, DType::f8, random);
  const Segment staging(kHeads, kSlots.context() * frame, kHeadDim, DType::f8, {0.01f, 0.02f});
  // Every code but the two NaNs and negative zero, which may become zero.
  auto* codes = static_cast<uint8_t*>(current.view().v);
  const int64_t size = kHeads * current.view().tokens * kHeadDim;
  for (int64_t i = 0; i < size; ++i) codes[i] = static_cast<uint8_t>(i % 127 + (i / 127 % 2) * 128);
  for (int64_t i = 0; i < size; ++i) codes[i] = codes[i] == 0x80 ? 0 : codes[i];
  const test::Cpu cpu = memory_cpu(kWidth);
  cpu->update_memory(update_table(kSlots, Memory::sequential, 1), {}, tables.view(), 6,
                     current.view(), staging.view(), context.view());
  const auto* moved = static_cast<const uint8_t*>(context.view().v);
  for (int64_t head = 0; head < kHeads; ++head) {
    const int64_t target = (head * context.view().tokens + 4 * frame) * kHeadDim;
    const int64_t source = (head * current.view().tokens + 6 * frame) * kHeadDim;
    CHECK(std::memcmp(moved + target, codes + source, 2 * frame * kHeadDim) == 0);
  }
}

}  // namespace liveact
