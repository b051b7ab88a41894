// Weights that are stored in fp8, and the device that measures what fp8 would cost.

#include "core/weights.h"
#include "measure/calibrate.h"
#include "tests/session.h"

namespace liveact {

namespace {

using test::check_throws;
using test::Checkpoint;
using test::kConfig;
using test::options_with;
using test::same_bits;
using test::Session;

// The products of layers quantised as `liveact convert` does, with their scales beside them.
struct ConvertedCheckpoint : Checkpoint {
  ConvertedCheckpoint() : Checkpoint(DType::bf16) {
    const HostTensors wide = tensors;
    for (const auto& [name, tensor] : wide) {
      const bool product = name.starts_with("blocks.") && name.ends_with(".weight") &&
                           tensor.shape.size() == 2 && !name.ends_with("kv_linear.weight");
      if (!product) continue;
      const int64_t n = tensor.shape[0];
      uint8_t* codes = memory.emplace_back(n * tensor.shape[1]).data();
      auto* scale = reinterpret_cast<float*>(memory.emplace_back(4 * n).data());
      quantize_weight(tensor, codes, scale);
      tensors[name] = {codes, DType::f8, tensor.shape};
      tensors[name + "_scale"] = {scale, DType::f32, {n}};
    }
  }
};

std::shared_ptr<Model> load(const Checkpoint& checkpoint, DType precision,
                            std::shared_ptr<Device> device = std::make_shared<cpu::CpuDevice>()) {
  return std::make_shared<Model>(std::move(device), kConfig, checkpoint.tensors,
                                 Precision::uniform(precision, kConfig.num_layers));
}

}  // namespace

TEST(stored_fp8_gives_the_bits_of_quantising_at_load) {
  const Checkpoint wide(DType::bf16);
  const ConvertedCheckpoint narrow;
  const auto expected = Session(load(wide, DType::f8), options_with(), 1).run(3);
  const auto model = load(narrow, DType::f8);
  CHECK(same_bits(Session(model, options_with(), 1).run(3), expected));
  // Used where it lies.
  const Weight& weight = model->weights().layers[1].ffn_up.weight;
  CHECK(weight.parts[0].data == narrow.tensors.at("blocks.1.ffn.0.weight").data);
}

TEST(stored_fp8_is_not_widened_and_needs_its_scales) {
  ConvertedCheckpoint narrow;
  check_throws<Error>(
      [&] { load(narrow, DType::bf16); },
      "expected blocks.0.self_attn.q.weight in bf16 or fp32 for a product in bf16, found");
  HostTensor& scale = narrow.tensors.at("blocks.1.ffn.2.weight_scale");
  scale.shape = {3};
  check_throws<Error>([&] { load(narrow, DType::f8); },
                      "expected tensor blocks.1.ffn.2.weight_scale [64] in fp32");
  narrow.tensors.erase("blocks.1.ffn.2.weight_scale");
  check_throws<Error>([&] { load(narrow, DType::f8); },
                      "expected tensor blocks.1.ffn.2.weight_scale [64] in fp32");
  narrow.tensors.at("blocks.0.norm3.weight").dtype = DType::f8;
  check_throws<Error>([&] { load(narrow, DType::f8); }, "blocks.0.norm3.weight in bf16 or fp32");
}

TEST(measuring_changes_nothing_and_measures_everything) {
  const Checkpoint checkpoint(DType::bf16);
  const auto expected = Session(load(checkpoint, DType::bf16), options_with(1.5f), 2).run(4);
  const auto device = std::make_shared<CalibrationDevice>(std::make_shared<cpu::CpuDevice>());
  const auto model = load(checkpoint, DType::bf16, device);
  device->watch(*model);
  CHECK(same_bits(Session(model, options_with(1.5f), 2).run(4), expected));
  CHECK(std::ssize(device->errors()) == kConfig.num_layers);
  for (const LayerErrors& layer : device->errors()) {
    for (size_t i = 0; i < kProducts.size(); ++i) {
      CHECK(layer[i].size() == (std::string(kProducts[i].name) == "cross_kv" ? 4 : 1));
      for (const SquaredError& error : layer[i]) {
        // Rounding two operands to 3 mantissa bits: 3.8 %; attention is two products.
        const double relative = std::sqrt(error.difference / error.reference);
        CHECK(relative > 0.002 && relative < 0.1);
      }
    }
  }
}

}  // namespace liveact
