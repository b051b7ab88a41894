#include "checkpoint/dit_config.h"

#include <array>
#include <set>

#include "checkpoint/identify.h"
#include "core/check.h"
#include "core/files.h"
#include "core/host_tensors.h"

namespace liveact {

namespace fs = std::filesystem;

namespace {

constexpr auto kConvertedKey = "_converted";
constexpr int64_t kConvertedVersion = 1;

// What this engine is written for; another value is refused.
const std::vector<std::pair<const char*, Json>>& fixed() {
  static const auto patch = [] {
    Json::List sizes;
    for (int64_t size : {1, 2, 2}) sizes.emplace_back(size);
    return Json(std::move(sizes));
  }();
  static const std::vector<std::pair<const char*, Json>> values = {
      {"model_type", Json(std::string("i2v"))},
      {"patch_size", patch},
      {"qk_norm", Json(true)},
      {"cross_attn_norm", Json(true)},
      {"audio_window", Json(int64_t{5})},
      {"vae_scale", Json(int64_t{4})},
      {"norm_input_visual", Json(true)},
      {"norm_output_audio", Json(true)}};
  return values;
}

// The largest value that is believed, far above any model, so that a wrong one is refused and not
// allocated.
struct Size {
  const char* key;
  int64_t ModelConfig::* member;
  int64_t at_most;
  bool may_be_missing = false;
};
constexpr std::array<Size, 12> kSizes = {{
    {"dim", &ModelConfig::dim, 1 << 16},
    {"ffn_dim", &ModelConfig::ffn_dim, 1 << 18},
    {"num_heads", &ModelConfig::num_heads, 1 << 10},
    {"num_layers", &ModelConfig::num_layers, 1 << 10},
    {"in_dim", &ModelConfig::in_dim, 1 << 10},
    {"out_dim", &ModelConfig::out_dim, 1 << 10},
    {"text_dim", &ModelConfig::text_dim, 1 << 16},
    {"text_len", &ModelConfig::text_len, 1 << 13, true},
    {"freq_dim", &ModelConfig::freq_dim, 1 << 16, true},
    {"intermediate_dim", &ModelConfig::intermediate_dim, 1 << 16},
    {"output_dim", &ModelConfig::output_dim, 1 << 16},
    {"context_tokens", &ModelConfig::context_tokens, 1 << 10},
}};

std::string shown(const Json* value, size_t limit = 80) {
  return value == nullptr ? "None" : value->text(limit);
}

int64_t columns(const TensorFiles& files, const std::string& name, int64_t windows) {
  const auto found = files.tensors().find(name);
  if (found == files.tensors().end()) {
    std::set<std::string> names;
    for (const auto& [other, _] : files.tensors()) names.insert(other);
    detail::fail(files.source().string(), ": DiT: expected tensor ", repr(name), ", found ",
                 other_names(names, name));
  }
  const std::vector<int64_t>& shape = found->second.shape;
  LIVEACT_CHECK(shape.size() == 2 && shape[1] > 0 && shape[1] % windows == 0,
                found->second.file.string(), ": expected ", name,
                " to be a matrix whose columns are a multiple of ", windows, ", found ",
                shape_text(shape));
  return shape[1] / windows;
}

float epsilon(const Json& raw, const std::string& where) {
  const Json* given = raw.find("eps");
  if (given == nullptr) return ModelConfig{}.eps;
  const double value = given->real() != nullptr      ? *given->real()
                       : given->integer() != nullptr ? static_cast<double>(*given->integer())
                                                     : -1.0;
  LIVEACT_CHECK(value >= 0 && value < 1, where, ": expected eps to be a number from 0 to 1, found ",
                given->text());
  return static_cast<float>(value);
}

}  // namespace

const std::vector<ProductLinears>& product_linears() {
  static const std::vector<ProductLinears> table = {
      {"self_qkv", {"self_attn.q", "self_attn.k", "self_attn.v"}},
      {"self_o", {"self_attn.o"}},
      {"cross_q", {"cross_attn.q"}},
      {"cross_kv", {"cross_attn.k", "cross_attn.v", "cross_attn.k_img", "cross_attn.v_img"}},
      {"cross_o", {"cross_attn.o"}},
      {"audio_q", {"audio_cross_attn.q_linear"}},
      {"audio_o", {"audio_cross_attn.proj"}},
      {"ffn_up", {"ffn.0"}},
      {"ffn_down", {"ffn.2"}},
      {"attention", {}},
  };
  return table;
}

ModelConfig read_config(const fs::path& path, const TensorFiles& tensors) {
  const Json raw = read_json(path);
  const std::string where = path.string();
  for (const auto& [key, expected] : fixed()) {
    const Json* found = raw.find(key);
    LIVEACT_CHECK(found == nullptr || *found == expected, where, ": expected ", key, " to be ",
                  expected.text(), ", found ", shown(found));
  }
  ModelConfig config;
  for (const Size& size : kSizes) {
    const Json* found = raw.find(size.key);
    LIVEACT_CHECK(found != nullptr || size.may_be_missing, where, ": expected the key ", size.key,
                  ", found none");
    if (found == nullptr) continue;
    const int64_t* value = found->integer();
    LIVEACT_CHECK(value != nullptr && *value >= 1 && *value <= size.at_most, where, ": expected ",
                  size.key, " to be in 1..", size.at_most, ", found ", found->text());
    config.*size.member = *value;
  }
  config.eps = epsilon(raw, where);
  config.image_dim = columns(tensors, "img_emb.proj.1.weight", 1);
  config.audio_dim = columns(tensors, "audio_proj.proj1_vf.weight", 8);
  try {
    config.check();
  } catch (const Error& error) {
    detail::fail(where, ": ", error.what());
  }
  return config;
}

std::optional<NamedPrecision> converted_precision(const fs::path& directory) {
  const fs::path path = directory / "config.json";
  const Json raw = read_json(path);
  const Json* record = raw.find(kConvertedKey);
  if (record == nullptr || record->is_null()) return std::nullopt;
  const Json* version = record->find("version");
  LIVEACT_CHECK(version != nullptr && *version == Json(kConvertedVersion), path.string(),
                ": expected ", kConvertedKey, " of version ", kConvertedVersion, ", found ",
                record->text());
  const Json* precision = record->find("precision");
  if (precision != nullptr && precision->object() != nullptr) {
    return NamedPrecision{directory.filename().string(), policy_from(*precision, path.string())};
  }
  const std::string* name = precision == nullptr ? nullptr : precision->string();
  LIVEACT_CHECK(name != nullptr && (*name == "auto" || *name == "fp8"), path.string(),
                ": expected precision auto, fp8 or a policy, found ", shown(precision));
  return NamedPrecision{*name, std::nullopt};
}

}  // namespace liveact
