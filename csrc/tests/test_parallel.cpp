// One stream on two devices, against the same on one.
//
// The split itself changes nothing: where every row is computed alone, all results are equal bit
// for bit. OpenBLAS computes rows in groups, so a product of half the rows may sum in another
// order; that is the only difference, and is compared within such a reordering.

#include <algorithm>
#include <functional>

#include "measure/proxy.h"
#include "tests/session.h"

namespace liveact {

namespace {

using test::check_throws;
using test::Checkpoint;
using test::Fixture;
using test::kConfig;
using test::options_with;
using test::relative_difference;
using test::same_bits;
using test::Session;

using Models = std::vector<std::shared_ptr<const Model>>;

constexpr int kBlocks = 2;  // all later ones do what the second one does
constexpr int kCompared =
    16;  // of so many sessions that are disturbed: one by the next one's results

// Products and cross-attention one row at a time; every op passes `before`.
class ByRowOps final : public ProxyOps {
 public:
  ByRowOps(std::unique_ptr<Ops> inner, const std::function<void()>& before, const bool& by_row)
      : ProxyOps(std::move(inner)), before_(before), by_row_(by_row) {}
  void around(const std::string&, const std::function<void()>& op) override {
    before_();
    op();
  }
  void linear(const Rows& x, const Weight& weight, const Epilogue& epilogue,
              const Rows& out) override {
    before_();
    if (!by_row_) return inner().linear(x, weight, epilogue, out);
    for (int64_t i = 0; i < x.rows; ++i) inner().linear(row(x, i), weight, epilogue, row(out, i));
  }
  void cross_attention(const Rows& q, const KvSegment& text, int64_t pad_count,
                       const KvSegment& image, const Rows& out) override {
    before_();
    if (!by_row_) return inner().cross_attention(q, text, pad_count, image, out);
    for (int64_t i = 0; i < q.rows; ++i) {
      inner().cross_attention(row(q, i), text, pad_count, image, row(out, i));
    }
  }
  void signal(const Barrier& barrier) override {
    before_();
    inner().signal(barrier);
  }
  void wait(const Barrier& barrier) override {
    before_();
    inner().wait(barrier);
  }
  void upload(void* target, const void* host, int64_t bytes) override {
    before_();
    inner().upload(target, host, bytes);
  }
  void download(void* host, const void* source, int64_t bytes) override {
    before_();
    inner().download(host, source, bytes);
  }

 private:
  static Rows row(const Rows& rows, int64_t i) {
    Rows result = rows.from(i);
    result.rows = 1;
    return result;
  }

  const std::function<void()>& before_;
  const bool& by_row_;
};

class ByRowDevice final : public ProxyDevice {
 public:
  ByRowDevice() : ProxyDevice(std::make_shared<cpu::CpuDevice>()) {}
  void connect(Device&) override {}
  std::unique_ptr<Ops> open_ops(const OpsLimits& limits) override {
    return std::make_unique<ByRowOps>(inner().open_ops(limits), before, by_row);
  }
  std::function<void()> before = [] {};
  bool by_row = true;
};

// A model of random weights on devices of a kind.
struct OnTwo {
  explicit OnTwo(DType precision, const ModelConfig& config = kConfig)
      : checkpoint(DType::bf16, config) {
    models = load_models({first, second}, config, checkpoint.tensors,
                         Precision::uniform(precision, config.num_layers));
  }
  const Checkpoint checkpoint;
  std::shared_ptr<ByRowDevice> first = std::make_shared<ByRowDevice>();
  std::shared_ptr<ByRowDevice> second = std::make_shared<ByRowDevice>();
  Models models;
};

// Latents, velocities and every context of some blocks.
std::vector<float> outcome(const Models& models, const StreamOptions& options, int blocks) {
  Session session(models, options, 7);
  std::vector<float> all = session.run(blocks);
  const ModelConfig& config = session.config();
  const int64_t size = options.slots.context() * session.stream.tokens_per_frame() * config.dim;
  std::vector<float> k(size);
  std::vector<float> v(size);
  for (int step = 0; step < kSteps; ++step) {
    for (int64_t layer = 0; layer < config.num_layers; ++layer) {
      session.stream.export_context(step, layer, k.data(), v.data());
      all.insert(all.end(), k.begin(), k.end());
      all.insert(all.end(), v.begin(), v.end());
    }
  }
  return all;
}

bool bit_equal(const OnTwo& on, const StreamOptions& options, int blocks) {
  return same_bits(outcome({on.models[0]}, options, blocks), outcome(on.models, options, blocks));
}

// For every op and copy of both devices, in the first blocks of a session: `run` does something in
// front of it. All memory is back each time, and now and then the next session is compared with one
// that nothing disturbed. `run` gets the device and the number of its op.
void at_every_op(int64_t layers, const std::function<void(Session&, ByRowDevice&, int64_t)>& run) {
  ModelConfig config = kConfig;
  config.num_layers = layers;
  const OnTwo on(DType::f8, config);
  on.first->by_row = on.second->by_row = false;  // which takes much less time
  const StreamOptions options = options_with();
  const auto undisturbed = [&] { return Session(on.models, options, 7).run(kBlocks); };
  const std::vector<float> expected = undisturbed();
  const int64_t bytes[] = {on.first->allocated_bytes(), on.second->allocated_bytes()};
  for (ByRowDevice* device : {on.first.get(), on.second.get()}) {
    int64_t ops = 0;
    {
      Session session(on.models, options, 7);
      device->before = [&] { ++ops; };
      session.run(kBlocks);
      device->before = [] {};
    }
    for (int64_t op = 0; op < ops; ++op) {
      {
        Session session(on.models, options, 7);
        run(session, *device, op);
        device->before = [] {};
      }
      CHECK_EQ(on.first->allocated_bytes(), bytes[0]);
      CHECK_EQ(on.second->allocated_bytes(), bytes[1]);
      if (op % kCompared == 0) CHECK(same_bits(undisturbed(), expected));
    }
  }
}

}  // namespace

TEST(two_devices_give_the_bits_of_one) {
  for (const DType precision : test::kAllTypes) {
    const OnTwo on(precision);
    for (const float guidance : {1.0f, 1.7f}) {
      for (const Memory memory : {Memory::sequential, Memory::sharded, Memory::mean}) {
        StreamOptions options = options_with(guidance);
        options.memory.memory = memory;
        CHECK(bit_equal(on, options, 4));
      }
    }
  }
}

// Whatever is drawn: frames that halve or do not, tiles of queries across the split, more heads.
TEST(two_devices_give_the_bits_of_one_for_any_sizes) {
  test::Random random(20);
  const auto draw = [&](int least, int most) {
    return least + static_cast<int>(random.uniform() * (most - least + 1));
  };
  ModelConfig config = kConfig;
  config.num_heads = 4;
  for (int i = 0; i < 18; ++i) {
    const OnTwo on(test::kAllTypes[i % 3], config);
    StreamOptions options = options_with(draw(0, 2) == 0 ? 1.7f : 1.0f);
    options.latent_height = 2 * draw(1, 7);
    options.latent_width = 2 * draw(1, 7);
    options.memory = {draw(0, 1) == 0 ? Memory::sequential : Memory::mean,
                      draw(0, 1) == 0 ? CompressAxis::token : CompressAxis::frame,
                      draw(0, 1) == 0 ? ValueFilter::key : ValueFilter::own};
    options.sampler = draw(0, 3) == 0 ? Sampler::euler : Sampler::renoise;
    SlotCounts& slots = options.slots;
    slots.current = draw(2, 9);
    slots.reference = draw(1, 3);
    slots.short_term = draw(1, std::min(3, slots.current));
    slots.long_term = slots.current >= kCompressTaps ? draw(0, 2) : 0;
    CHECK(bit_equal(on, options, 3));
  }
}

// The products of half the rows may be summed in another order, and nothing else.
TEST(two_devices_with_products_of_many_rows) {
  const Fixture fixture(DType::f32);
  const auto second =
      std::make_shared<Model>(std::make_shared<cpu::CpuDevice>(), kConfig,
                              fixture.checkpoint.tensors, fixture.model->precision());
  StreamOptions options = options_with(1.7f);
  options.latent_height = options.latent_width = 14;
  const std::vector<float> one = outcome({fixture.model}, options, 4);
  const std::vector<float> two = outcome({fixture.model, second}, options, 4);
  CHECK(relative_difference(two, one) < test::kReordered);
}

TEST(two_devices_share_the_memory_of_a_session) {
  const OnTwo on(DType::f8);
  const StreamOptions options = options_with();
  const auto required = [&](int devices) {
    return Stream::required_bytes(*on.first, kConfig, on.models[0]->precision(), options, devices);
  };
  const int64_t before[] = {on.first->allocated_bytes(), on.second->allocated_bytes()};
  {
    Session session(on.models, options, 3);
    CHECK_EQ(on.first->allocated_bytes() - before[0], required(2));
    CHECK_EQ(on.second->allocated_bytes() - before[1], required(2));
    CHECK_EQ(session.stream.device_bytes(), 2 * required(2));
    CHECK(required(2) < required(1));
    const int64_t count = on.first->allocation_count();
    session.run(3);
    CHECK_EQ(on.first->allocation_count(), count);
  }
  CHECK_EQ(on.first->allocated_bytes(), before[0]);
  CHECK_EQ(on.second->allocated_bytes(), before[1]);
}

TEST(two_devices_are_refused_what_they_cannot_share) {
  const OnTwo on(DType::f32);
  const auto refused = [](const Models& models, const StreamOptions& options,
                          const std::string& expected) {
    check_throws<Error>([&] { Stream(models, options); }, expected);
  };
  StreamOptions options = options_with();
  refused({}, options, "stream: expected a model on each of 1 or 2 devices, found 0");
  refused({on.models[0], on.models[0]}, options, "expected two of them, found cpu twice");
  refused({on.models[0], OnTwo(DType::bf16).models[1]}, options, "found two precisions");
  ModelConfig config = kConfig;
  config.text_len = 8;
  refused({on.models[0], OnTwo(DType::f32, config).models[1]}, options, "found two sizes");
  config.num_heads = 1;
  refused(OnTwo(DType::f32, config).models, options, "expected an even number of heads, found 1");
  options.slots = {1, 0, 0, 4};
  refused(on.models, options,
          "expected at least 2 latent frames in every block, found 1 in the first and 4 in later");
  options.slots = {2, 0, 0, 1};
  refused(on.models, options, "found 2 in the first and 1 in later ones");
  const Fixture plain(DType::f32);
  refused({plain.model, on.models[1]}, options_with(), "expected another cpu beside it");
}

TEST(two_devices_after_any_op_that_failed) {
  at_every_op(1, [](Session& session, ByRowDevice& device, int64_t failing) {
    device.before = [left = failing]() mutable {
      if (left-- == 0) throw DeviceError("it broke");
    };
    check_throws<DeviceError>([&] { session.run(kBlocks); }, "it broke");
    check_throws<Error>([&] { session.run(1); }, "found one that failed before");
  });
}

TEST(two_devices_are_cancelled_at_any_op) {
  at_every_op(2, [](Session& session, ByRowDevice& device, int64_t at) {
    device.before = [&session, left = at]() mutable {
      if (left-- == 0) session.stream.cancel();
    };
    check_throws<CancelledError>([&] { session.run(kBlocks + 1); }, "cancelled");
  });
}

// A device that would have to wait for ever says so: the other one has not signalled.
TEST(a_barrier_that_nobody_reaches_is_an_error) {
  const auto device = std::make_shared<cpu::CpuDevice>();
  const auto ops =
      device->open_ops({.max_cols = 8, .max_operand = 8, .max_keys = 8, .head_dim = 8});
  int64_t memory[2][3] = {};
  const Barrier first{memory[0], &memory[0][2], &memory[1][2]};
  const Barrier second{memory[1], &memory[1][2], &memory[0][2]};
  ops->signal(first);
  ops->signal(second);
  ops->wait(first);
  ops->wait(second);
  check_throws<DeviceError>([&] { ops->wait(first); },
                            "expected 2 signals of the other device before this wait, found 1");
  memory[0][2] = kBarrierOpen;
  ops->signal(second);  // takes nothing back
  for (int i = 0; i < 3; ++i) ops->wait(first);
}

}  // namespace liveact
