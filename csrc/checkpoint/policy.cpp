// Policy files: which product of which layer has its operands in which format.

#include <algorithm>
#include <cmath>
#include <string_view>

#include "checkpoint/dit_config.h"
#include "core/check.h"
#include "core/files.h"

namespace liveact {

namespace {

constexpr auto kVersionKey = "liveact_precision_policy";
constexpr uintmax_t kMaxPolicyBytes = 1 << 24;

void only(const Json& raw, const std::vector<std::string_view>& keys, const std::string& where) {
  std::string known;
  for (std::string_view key : keys) known += (known.empty() ? "" : ", ") + std::string(key);
  for (const auto& [key, _] : *raw.object()) {
    const bool expected = std::find(keys.begin(), keys.end(), key) != keys.end();
    LIVEACT_CHECK(expected, where, ": expected only ", known, ", found ", repr(key, 80));
  }
}

std::string shown(const Json* value) { return value == nullptr ? "None" : value->text(); }

void expect(const Json& raw, const char* key, const Json& value, const std::string& where) {
  const Json* found = raw.find(key);
  LIVEACT_CHECK(found != nullptr && *found == value, where, ": expected ", key, " to be ",
                value.text(), ", found ", shown(found));
}

// A number of 0 or more, or nothing.
bool is_error(const Json* given) {
  if (given == nullptr || given->is_null()) return true;
  if (given->integer() != nullptr) return *given->integer() >= 0;
  return given->real() != nullptr && *given->real() >= 0 && std::isfinite(*given->real());
}

DType read_choice(const Json* raw, const std::string& where) {
  LIVEACT_CHECK(raw != nullptr && raw->object() != nullptr, where,
                ": expected an object with a format, found ", shown(raw));
  only(*raw, {"format", "error"}, where);
  const Json* format = raw->find("format");
  const std::string* name = format == nullptr ? nullptr : format->string();
  LIVEACT_CHECK(name != nullptr && (*name == "fp8" || *name == "bf16"), where,
                ": expected format fp8 or bf16, found ", shown(format));
  LIVEACT_CHECK(is_error(raw->find("error")), where, ": expected error to be 0 or more, found ",
                shown(raw->find("error")));
  return *name == "fp8" ? DType::f8 : DType::bf16;
}

LayerPrecision read_layer(const Json& raw, const std::string& where) {
  LIVEACT_CHECK(raw.object() != nullptr, where, ": expected an object, found ", raw.text());
  std::vector<std::string_view> names;
  for (const Product& product : kProducts) names.emplace_back(product.name);
  only(raw, names, where);
  LayerPrecision layer{};
  for (const Product& product : kProducts) {
    layer.*product.format = read_choice(raw.find(product.name), where + ": " + product.name);
  }
  return layer;
}

}  // namespace

Precision policy_from(const Json& raw, const std::string& where) {
  LIVEACT_CHECK(raw.find(kVersionKey) != nullptr, where, ": expected a precision policy (",
                kVersionKey, "), found none");
  expect(raw, kVersionKey, Json(int64_t{1}), where);
  expect(raw, "activations", Json(std::string("bf16")), where);
  only(raw, {kVersionKey, "activations", "sums", "measured", "layers"}, where);
  const Json* layers = raw.find("layers");
  LIVEACT_CHECK(layers != nullptr && layers->list() != nullptr && !layers->list()->empty(), where,
                ": expected a list layers, found ", shown(layers));
  const Json* measured = raw.find("measured");
  LIVEACT_CHECK(measured == nullptr || measured->object() != nullptr, where,
                ": expected an object measured, found ", shown(measured));
  const Json* sums = raw.find("sums");
  const bool full = sums != nullptr && *sums == Json(std::string("full"));
  LIVEACT_CHECK(sums == nullptr || full || *sums == Json(std::string("fast")), where,
                ": expected sums fast or full, found ", shown(sums));
  Precision result;
  result.activations = DType::bf16;
  result.full_sums = full;
  for (size_t i = 0; i < layers->list()->size(); ++i) {
    const std::string layer = where + ": layer " + std::to_string(i);
    result.layers.push_back(read_layer((*layers->list())[i], layer));
  }
  return result;
}

Precision read_policy(const std::filesystem::path& file) {
  const uintmax_t bytes = std::filesystem::file_size(require_file(file));
  LIVEACT_CHECK(bytes <= kMaxPolicyBytes, file.string(), ": expected at most ", kMaxPolicyBytes,
                " bytes, found ", bytes);
  return policy_from(read_json(file), file.string());
}

}  // namespace liveact
