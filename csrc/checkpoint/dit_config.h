// config.json of a checkpoint: the sizes of the DiT, and what was done to it when it was converted.
#pragma once

#include <filesystem>
#include <optional>
#include <string>

#include "core/json.h"
#include "liveact/checkpoint.h"

namespace liveact {

// The linears of a layer that a product is made of; attention has none.
struct ProductLinears {
  const char* product;
  std::vector<const char*> linears;
};
const std::vector<ProductLinears>& product_linears();

// Sizes of the DiT; the two that are not in the file follow from the shapes of tensors. Throws
// Error for a key that is missing, of the wrong type or not supported.
ModelConfig read_config(const std::filesystem::path& path, const TensorFiles& tensors);

// What a precision means before a device is known: a name, or a policy with a name for messages.
struct NamedPrecision {
  std::string name;
  std::optional<Precision> policy;
};

// What `liveact convert` made of a checkpoint; nothing for one as released. Throws Error.
std::optional<NamedPrecision> converted_precision(const std::filesystem::path& directory);

// raw: of a policy file; where: names it in messages. Throws Error.
Precision policy_from(const Json& raw, const std::string& where);

}  // namespace liveact
