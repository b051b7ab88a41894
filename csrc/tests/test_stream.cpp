// Model and Stream on a tiny random model: what a session may rely on, not the numbers (those are
// compared with recordings elsewhere).

#include <atomic>
#include <thread>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "core/host_rows.h"
#include "core/host_tensors.h"
#include "core/weights.h"
#include "tests/session.h"

namespace liveact {

namespace {

using test::check_throws;
using test::Checkpoint;
using test::Fixture;
using test::kConfig;
using test::kReordered;
using test::kTextTokens;
using test::options_with;
using test::relative_difference;
using test::same_bits;
using test::Session;

bool all_finite(const std::vector<float>& x) {
  return std::all_of(x.begin(), x.end(), [](float value) { return std::isfinite(value); });
}

}  // namespace

// By the norm over D channels a key is at most sqrt(D) times the largest gain of its head.
TEST(scales_of_keys_are_the_bound_of_their_norm) {
  const Fixture fixture(DType::f8);
  const int64_t hd = kConfig.head_dim();
  for (int64_t layer = 0; layer < kConfig.num_layers; ++layer) {
    const std::string name = "blocks." + std::to_string(layer) + ".self_attn.norm_k.weight";
    const std::vector<float> gain = to_f32(fixture.checkpoint.tensors.at(name));
    for (int64_t head = 0; head < kConfig.num_heads; ++head) {
      const double bound =
          std::sqrt(static_cast<double>(kConfig.dim)) * amax(gain.data() + head * hd, hd) / kF8Max;
      const float* scales = fixture.model->weights().layers[layer].key_scale;
      CHECK_NEAR(scales[head], bound, 4 * test::kUlp * bound);
    }
  }
}

TEST(blocks_and_their_sizes) {
  const Fixture fixture(DType::f32);
  Session session(fixture.model, options_with(), 1);
  for (int64_t block = 0; block < 3; ++block) {
    CHECK_EQ(session.stream.next_block(), block);
    CHECK_EQ(session.stream.frames_of_next_block(), block == 0 ? 6 : 8);
    CHECK_EQ(session.stream.audio_rows_of_next_block(), block == 0 ? 25 : 36);
    CHECK(all_finite(session.run(1)));
  }
  CHECK_EQ(session.stream.next_block(), 3);
  CHECK_EQ(session.stream.tokens_per_frame(), 6);
}

TEST(other_slot_counts_run) {
  const Fixture fixture(DType::f32);
  for (const SlotCounts& slots :
       {SlotCounts{1, 2, 2, 6}, SlotCounts{1, 0, 0, 2}, SlotCounts{4, 3, 2, 5}}) {
    StreamOptions options = options_with(1.7f);
    options.slots = slots;
    Session session(fixture.model, options, 2);
    CHECK_EQ(session.stream.frames_of_next_block(), slots.context());
    CHECK(all_finite(session.run(3)));
    CHECK_EQ(session.stream.frames_of_next_block(), slots.current);
  }
}

// The tokens of a prompt that is not full are completed with zero rows: writing them out must
// change nothing but the order of a sum.
TEST(short_prompts_are_padded_with_zeros) {
  const Fixture fixture(DType::f32, DType::f32);
  Session padded(fixture.model, options_with(), 3);
  Session literal(fixture.model, options_with(), 3);
  std::vector<float> text = test::Random(4).normals(kConfig.text_len * kConfig.text_dim);
  std::fill(text.begin() + kTextTokens * kConfig.text_dim, text.end(), 0.0f);
  padded.stream.set_prompt(text.data(), kTextTokens);
  literal.stream.set_prompt(text.data(), kConfig.text_len);
  const std::vector<float> a = padded.run(2);
  const std::vector<float> b = literal.run(2);
  CHECK(relative_difference(a, b) < kReordered);
  CHECK(!same_bits(a, b));
}

// Nothing but the prompt is attended to when it is full: among identical tokens their number does
// not matter, a padding key beside them would.
TEST(full_prompts_have_no_padding) {
  const Fixture fixture(DType::f32);
  ModelConfig half = kConfig;
  half.text_len = kConfig.text_len / 2;
  const auto other = std::make_shared<Model>(fixture.device, half, fixture.checkpoint.tensors,
                                             fixture.model->precision());
  const std::vector<float> token = test::Random(12).normals(kConfig.text_dim);
  std::vector<float> text;
  for (int64_t i = 0; i < kConfig.text_len; ++i)
    text.insert(text.end(), token.begin(), token.end());
  Session full(fixture.model, options_with(), 13);
  Session short_full(other, options_with(), 13);
  full.stream.set_prompt(text.data(), kConfig.text_len);
  short_full.stream.set_prompt(text.data(), half.text_len);
  CHECK(relative_difference(full.run(2), short_full.run(2)) < kReordered);
}

TEST(wrong_inputs_are_refused) {
  const Fixture fixture(DType::f32);
  const std::vector<float> zeros(4096, 0.0f);
  Stream stream(fixture.model, options_with());
  const auto denoise = [&] {
    stream.denoise(zeros.data(), zeros.data(), zeros.data(), nullptr, nullptr);
  };
  check_throws<Error>(denoise, "denoise: expected set_prompt and set_image before the first block");
  check_throws<Error>([&] { stream.set_prompt(zeros.data(), 0); },
                      "set_prompt: expected 1 to 16 tokens, found 0");
  check_throws<Error>([&] { stream.set_prompt(zeros.data(), 17); }, "found 17");
  check_throws<Error>([&] { stream.set_image(zeros.data(), 0, zeros.data(), 14); },
                      "set_image: expected 1 to 9 image tokens, found 0");
  check_throws<Error>([&] { stream.set_image(zeros.data(), 10, zeros.data(), 14); }, "found 10");
  check_throws<Error>([&] { stream.set_image(zeros.data(), 9, zeros.data(), 13); },
                      "set_image: expected at least 14 latent frames of conditioning, found 13");
  check_throws<Error>([&] { stream.export_context(0, 0, nullptr, nullptr); },
                      "export_context: expected at least one block, found none");
  stream.set_prompt(zeros.data(), 1);
  check_throws<Error>(denoise, "expected set_prompt and set_image");  // still no image

  Session session(fixture.model, options_with(), 5);
  session.run(1);
  check_throws<Error>([&] { session.stream.set_image(zeros.data(), 9, zeros.data(), 14); },
                      "set_image: expected before the first block, found block 1");
  check_throws<Error>([&] { session.stream.export_context(3, 0, nullptr, nullptr); },
                      "export_context: expected step 0..2 and a layer of the model, found 3, 0");
  check_throws<Error>([&] { session.stream.export_context(0, 2, nullptr, nullptr); }, "found 0, 2");
  CHECK(all_finite(session.run(1)));  // a refused call leaves a stream as it was
}

TEST(wrong_options_are_refused) {
  const Fixture fixture(DType::f32);
  const int64_t before = fixture.device->allocation_count();
  const auto refused = [&](auto change, const std::string& expected) {
    StreamOptions options = options_with();
    change(options);
    check_throws<Error>([&] { Stream(fixture.model, options); }, expected);
    check_throws<Error>(
        [&] {
          Stream::required_bytes(*fixture.device, kConfig, fixture.model->precision(), options);
        },
        expected);
  };
  refused([](StreamOptions& o) { o.latent_height = 5; },
          "expected an even latent height and width of 2 to 1024, found 5x6");
  refused([](StreamOptions& o) { o.latent_width = 0; }, "found 4x0");
  refused([](StreamOptions& o) { o.latent_width = 1026; }, "found 4x1026");
  refused([](StreamOptions& o) { o.max_image_tokens = 0; }, "expected at least 1 image token");
  refused([](StreamOptions& o) { o.audio_guidance = 0.5f; }, "audio guidance >= 1, found 0.5");
  refused([](StreamOptions& o) { o.audio_guidance = NAN; }, "expected a finite audio guidance");
  refused([](StreamOptions& o) { o.audio_guidance = INFINITY; }, "expected a finite");
  refused([](StreamOptions& o) { o.slots.short_term = 9; }, "short-term slots");
  refused(
      [](StreamOptions& o) {
        o.slots.current = 6;
        o.memory.memory = Memory::sharded;
      },
      "sharded memory is defined for slot counts 2,2,2,8 only");
  CHECK_EQ(fixture.device->allocation_count(), before);
}

TEST(wrong_models_are_refused) {
  const Checkpoint checkpoint(DType::bf16);
  const auto device = std::make_shared<cpu::CpuDevice>();
  const auto refused = [&](ModelConfig config, HostTensors tensors, int64_t policy_layers,
                           const std::string& expected) {
    check_throws<Error>(
        [&] { Model(device, config, tensors, Precision::uniform(DType::f32, policy_layers)); },
        expected);
    CHECK_EQ(device->allocated_bytes(), 0);
  };
  HostTensors tensors = checkpoint.tensors;
  tensors.erase("blocks.1.ffn.0.bias");
  refused(kConfig, tensors, 2, "checkpoint: expected tensor blocks.1.ffn.0.bias [96], found none");
  tensors = checkpoint.tensors;
  tensors["head.head.weight"].shape = {16, 63};
  refused(kConfig, tensors, 2, "expected tensor head.head.weight to be [16, 64], found [16, 63]");
  refused(kConfig, checkpoint.tensors, 3, "precision policy: expected 2 layers, found 3");
  ModelConfig config = kConfig;
  config.num_heads = 3;
  refused(config, checkpoint.tensors, 2, "dim to be a multiple of num_heads, found 64 and 3");
  config.num_heads = 16;
  refused(config, checkpoint.tensors, 2, "even head dim of at least 8, found 4");
  config = kConfig;
  config.in_dim = config.out_dim;
  refused(config, checkpoint.tensors, 2, "in_dim > out_dim");
}

// The widest rows of all are those of the head, in fp32, where the rest is narrow and bf16.
TEST(narrow_model_of_a_wide_latent) {
  ModelConfig config = kConfig;
  config.dim = config.ffn_dim = 16;
  config.in_dim = 43;
  config.out_dim = 40;
  const Checkpoint checkpoint(DType::bf16, config);
  for (const DType precision : test::kAllTypes) {
    Session session(
        std::make_shared<Model>(std::make_shared<cpu::CpuDevice>(), config, checkpoint.tensors,
                                Precision::uniform(precision, config.num_layers)),
        options_with(), 14);
    CHECK(all_finite(session.run(2)));
  }
}

// Each product of each layer may have another format, as long as it fits where activations do.
TEST(mixed_precision_policies_run) {
  const Checkpoint checkpoint(DType::bf16);
  const auto device = std::make_shared<cpu::CpuDevice>();
  for (const DType activations : {DType::f32, DType::bf16}) {
    for (int shift = 0; shift < 3; ++shift) {
      Precision policy = Precision::uniform(activations, kConfig.num_layers);
      int turn = shift;
      for (LayerPrecision& layer : policy.layers) {
        for (const Product& product : kProducts) {
          const DType dtype = test::kAllTypes[++turn % 3];
          layer.*product.format = std::max(dtype, activations);  // wider formats come first
        }
      }
      const auto model = std::make_shared<Model>(device, kConfig, checkpoint.tensors, policy);
      const int64_t before = device->allocated_bytes();
      Session session(model, options_with(1.7f), 11);
      CHECK(all_finite(session.run(3)));
      CHECK_EQ(Stream::required_bytes(*device, kConfig, policy, options_with(1.7f)),
               device->allocated_bytes() - before);
    }
  }
  Precision wide = Precision::uniform(DType::bf16, kConfig.num_layers);
  wide.layers[1].ffn_up = DType::f32;
  check_throws<Error>(
      [&] { Model(device, kConfig, checkpoint.tensors, wide); },
      "precision policy: expected no format in layer 1 wider than bf16, found fp32");
  wide.layers.pop_back();
  check_throws<Error>([&] { Stream::required_bytes(*device, kConfig, wide, options_with()); },
                      "precision policy: expected 2 layers, found 1");
}

TEST(nan_fails_one_stream_only) {
  for (const DType precision : test::kAllTypes) {
    const Fixture fixture(precision);
    Session alone(fixture.model, options_with(), 6);
    const std::vector<float> expected = alone.run(3);

    Session other(fixture.model, options_with(), 6);
    std::vector<float> found = other.run(1);
    for (const float bad : {NAN, INFINITY}) {
      Session broken(fixture.model, options_with(), 7);
      broken.run(1);
      broken.noise[11] = bad;
      check_throws<NonFiniteError>([&] { broken.denoise(); },
                                   "denoise: block 1 has a NaN or an infinity in its latent");
      CHECK_EQ(broken.stream.next_block(), 1);
      broken.noise[11] = 0.0f;
      check_throws<Error>([&] { broken.denoise(); },
                          "denoise: expected a working stream, found one that failed before");
    }
    const std::vector<float> rest = other.run(2);
    found.insert(found.end(), rest.begin(), rest.end());
    CHECK(same_bits(found, expected));
  }
}

TEST(cancel_stops_a_running_denoise) {
  const Fixture fixture(DType::f32);
  Session session(fixture.model, options_with(), 8);
  constexpr int64_t kMost = 1000;
  std::atomic<int64_t> blocks{0};
  std::string message;
  std::thread worker([&] {
    try {
      for (; blocks < kMost; ++blocks) session.denoise();
    } catch (const CancelledError& error) {
      message = error.what();
    }
  });
  while (blocks < 2) std::this_thread::yield();
  session.stream.cancel();
  worker.join();
  CHECK_EQ(message, "denoise: cancelled");
  CHECK(blocks < kMost);
  check_throws<Error>([&] { session.denoise(); }, "expected a working stream");
}

// Everything is allocated when a stream opens: no device memory ever after, and from block 2 on
// nothing on the heap either, whatever the number of the block.
TEST(denoise_allocates_nothing) {
  for (const DType precision : test::kAllTypes) {
    const Fixture fixture(precision);
    Session session(fixture.model, options_with(1.7f), 9);
    const int64_t device_count = fixture.device->allocation_count();
    const int64_t device_bytes = fixture.device->allocated_bytes();
    for (int block = 0; block < 3; ++block) session.denoise();
    const int64_t calls = test::new_count();
#if defined(__GLIBC__)
    const size_t heap_bytes = mallinfo2().uordblks;  // 0 under a sanitizer
#endif
    const int last = precision == DType::f32 ? 300 : 10;
    while (session.stream.next_block() <= last) session.denoise();
    CHECK_EQ(test::new_count(), calls);
#if defined(__GLIBC__)
    CHECK_EQ(mallinfo2().uordblks, heap_bytes);
#endif
    CHECK_EQ(fixture.device->allocation_count(), device_count);
    CHECK_EQ(fixture.device->allocated_bytes(), device_bytes);
  }
}

TEST(streams_in_two_threads_get_the_bits_they_get_alone) {
  for (const DType precision : test::kAllTypes) {
    const Fixture fixture(precision);
    std::vector<float> alone[2], together[2];
    for (int i = 0; i < 2; ++i) {
      Session session(fixture.model, options_with(), 20 + i);
      alone[i] = session.run(3);
    }
    CHECK(!same_bits(alone[0], alone[1]));
    Session sessions[] = {{fixture.model, options_with(), 20}, {fixture.model, options_with(), 21}};
    std::thread first([&] { together[0] = sessions[0].run(3); });
    std::thread second([&] { together[1] = sessions[1].run(3); });
    first.join();
    second.join();
    for (int i = 0; i < 2; ++i) CHECK(same_bits(together[i], alone[i]));
  }
}

TEST(required_bytes_are_what_a_stream_takes) {
  for (const DType precision : test::kAllTypes) {
    for (const float guidance : {1.0f, 1.7f}) {
      Fixture fixture(precision);
      const int64_t before = fixture.device->allocated_bytes();
      const int64_t required = Stream::required_bytes(
          *fixture.device, kConfig, fixture.model->precision(), options_with(guidance));
      CHECK_EQ(fixture.device->allocated_bytes(), before);
      {
        Session session(fixture.model, options_with(guidance), 10);
        CHECK_EQ(fixture.device->allocated_bytes() - before, required);
        CHECK_EQ(session.stream.device_bytes(), required);
      }
      CHECK_EQ(fixture.device->allocated_bytes(), before);
      fixture.model.reset();
      CHECK_EQ(fixture.device->allocated_bytes(), 0);
    }
  }
}

TEST(weight_bytes_are_what_a_model_holds) {
  for (const DType stored : {DType::f32, DType::bf16}) {
    for (const DType precision : test::kAllTypes) {
      const Fixture fixture(precision, stored);
      const Weights& w = fixture.model->weights();
      std::vector<const Linear*> linears = {&w.patch_embedding, &w.text_in,      &w.text_out,
                                            &w.image_in,        &w.image_out,    &w.head,
                                            &w.audio_window,    &w.audio_hidden, &w.audio_out};
      for (const Layer& layer : w.layers) {
        for (const Linear* linear :
             {&layer.self_qkv, &layer.self_o, &layer.cross_q, &layer.cross_o, &layer.text_k,
              &layer.text_v, &layer.image_k, &layer.image_v, &layer.audio_q, &layer.audio_kv,
              &layer.audio_o, &layer.ffn_up, &layer.ffn_down}) {
          linears.push_back(linear);
        }
      }
      int64_t bytes = 0;
      for (const Linear* linear : linears) {
        const Weight& weight = linear->weight;
        bytes += weight.n * weight.k * size_bytes(weight.dtype);
        if (weight.dtype == DType::f8) bytes += 4 * weight.n;
      }
      CHECK_EQ(weight_bytes(kConfig, fixture.model->precision(), stored), bytes);
    }
  }
}

}  // namespace liveact
