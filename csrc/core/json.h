// A strict reader of JSON (RFC 8259): configurations, headers of weight files, manifests of
// kernels.
//
// Ours, and no library, because it is what strangers' bytes meet first: 200 lines that refuse what
// a file of ours never has (a name twice in an object, nesting beyond kMaxDepth, bytes that are not
// UTF-8, NaN), take memory in proportion to the text, and are fuzzed (csrc/fuzz/).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "liveact/error.h"

namespace liveact {

class Json {
 public:
  static constexpr int kMaxDepth = 64;

  using List = std::vector<Json>;
  using Object = std::vector<std::pair<std::string, Json>>;  // in the order of the text

  // Throws Error without naming a file: "no value at byte 6".
  static Json parse(std::string_view text);

  Json() = default;  // null
  template <typename T>
  explicit Json(T value) : value_(std::move(value)) {}

  bool is_null() const { return std::holds_alternative<std::monostate>(value_); }
  // Null where the value is of another kind.
  const bool* boolean() const { return std::get_if<bool>(&value_); }
  const int64_t* integer() const { return std::get_if<int64_t>(&value_); }
  const double* real() const { return std::get_if<double>(&value_); }  // with . or e, or too large
  const std::string* string() const { return std::get_if<std::string>(&value_); }
  const List* list() const { return std::get_if<List>(&value_); }
  const Object* object() const { return std::get_if<Object>(&value_); }

  // A member of an object; null where there is none, or this is no object.
  const Json* find(std::string_view name) const;

  // For messages, in one line of at most `limit` characters: 'text', 3, True, None, [1, 2]. As
  // Python shows values, whose messages these are too.
  std::string text(size_t limit = 80) const;
  const char* type_name() const;  // "list", "dict", "str", ..., as of these values

  bool operator==(const Json&) const = default;

 private:
  std::variant<std::monostate, bool, int64_t, double, std::string, List, Object> value_;
};

// 'text' with what is no printable ASCII or letter of UTF-8 escaped, cut to `limit` characters.
std::string repr(std::string_view text, size_t limit = std::string::npos);

}  // namespace liveact
