#include "core/json.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>

#include "core/check.h"

namespace liveact {

namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }

// Bytes of the UTF-8 sequence at the beginning of `text`; 0 where there is none (RFC 3629: no
// overlong ones, no surrogates, nothing beyond U+10FFFF).
size_t utf8_length(std::string_view text) {
  const auto byte = [&](size_t i) {
    return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u;
  };
  const auto continues = [&](size_t i) { return (byte(i) & 0xc0u) == 0x80u; };
  const unsigned first = byte(0);
  if (first < 0x80) return 1;
  if (first >= 0xc2 && first <= 0xdf) return continues(1) ? 2 : 0;
  if (first >= 0xe0 && first <= 0xef) {
    const unsigned low = first == 0xe0 ? 0xa0 : 0x80;
    const unsigned high = first == 0xed ? 0x9f : 0xbf;
    return byte(1) >= low && byte(1) <= high && continues(2) ? 3 : 0;
  }
  if (first >= 0xf0 && first <= 0xf4) {
    const unsigned low = first == 0xf0 ? 0x90 : 0x80;
    const unsigned high = first == 0xf4 ? 0x8f : 0xbf;
    return byte(1) >= low && byte(1) <= high && continues(2) && continues(3) ? 4 : 0;
  }
  return 0;
}

void append_utf8(std::string& out, uint32_t code) {
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xc0 | (code >> 6));
    out += static_cast<char>(0x80 | (code & 0x3f));
  } else if (code < 0x10000) {
    out += static_cast<char>(0xe0 | (code >> 12));
    out += static_cast<char>(0x80 | ((code >> 6) & 0x3f));
    out += static_cast<char>(0x80 | (code & 0x3f));
  } else {
    out += static_cast<char>(0xf0 | (code >> 18));
    out += static_cast<char>(0x80 | ((code >> 12) & 0x3f));
    out += static_cast<char>(0x80 | ((code >> 6) & 0x3f));
    out += static_cast<char>(0x80 | (code & 0x3f));
  }
}

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Json document() {
    Json value = this->value(0);
    skip_space();
    if (at_ < text_.size()) fail("more than one value");
    return value;
  }

 private:
  [[noreturn]] void fail(const char* found) const { detail::fail(found, " at byte ", at_); }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  void skip_space() {
    while (at_ < text_.size() &&
           (peek() == ' ' || peek() == '\n' || peek() == '\t' || peek() == '\r')) {
      ++at_;
    }
  }

  bool take(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  Json value(int depth) {
    if (depth > Json::kMaxDepth) fail("too deep a nesting");
    skip_space();
    switch (peek()) {
      case '{':
        return object(depth);
      case '[':
        return list(depth);
      case '"':
        return Json(string());
      default:
        break;
    }
    if (peek() == '-' || is_digit(peek())) return number();
    if (take("true")) return Json(true);
    if (take("false")) return Json(false);
    if (take("null")) return Json();
    fail("no value");
  }

  Json object(int depth) {
    Json::Object members;
    ++at_;
    skip_space();
    if (take("}")) return Json(std::move(members));
    do {
      skip_space();
      if (peek() != '"') fail("no name of a member");
      std::string name = string();
      skip_space();
      if (!take(":")) fail("no ':'");
      members.emplace_back(std::move(name), value(depth + 1));
      skip_space();
    } while (take(","));
    if (!take("}")) fail("no ',' or '}'");
    refuse_twins(members);
    return Json(std::move(members));
  }

  void refuse_twins(const Json::Object& members) const {
    std::vector<std::string_view> names;
    for (const auto& [name, _] : members) names.push_back(name);
    std::sort(names.begin(), names.end());
    const auto twin = std::adjacent_find(names.begin(), names.end());
    if (twin != names.end()) detail::fail("the name ", repr(*twin, 80), " twice in an object");
  }

  Json list(int depth) {
    Json::List items;
    ++at_;
    skip_space();
    if (take("]")) return Json(std::move(items));
    do {
      items.push_back(value(depth + 1));
      skip_space();
    } while (take(","));
    if (!take("]")) fail("no ',' or ']'");
    return Json(std::move(items));
  }

  std::string string() {
    std::string out;
    ++at_;
    while (true) {
      if (at_ >= text_.size()) fail("no end of a string");
      const char c = text_[at_];
      if (c == '"') {
        ++at_;
        return out;
      }
      if (c == '\\') {
        ++at_;
        escape(out);
        continue;
      }
      if (static_cast<unsigned char>(c) < 0x20) fail("a control character in a string");
      const size_t length = utf8_length(text_.substr(at_, 4));
      if (length == 0) fail("a byte that is not UTF-8");
      out.append(text_.substr(at_, length));
      at_ += length;
    }
  }

  void escape(std::string& out) {
    static constexpr std::string_view kLetters = "\"\\/bfnrt";
    static constexpr std::string_view kMeanings = "\"\\/\b\f\n\r\t";
    const char c = peek();
    if (c == 'u') {
      ++at_;
      uint32_t code = hexadecimal();
      if (code >= 0xd800 && code < 0xdc00 && take("\\u")) {
        const uint32_t low = hexadecimal();
        if (low < 0xdc00 || low > 0xdfff) fail("half of a surrogate pair");
        code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
      } else if (code >= 0xd800 && code <= 0xdfff) {
        fail("half of a surrogate pair");
      }
      append_utf8(out, code);
      return;
    }
    const size_t which = at_ < text_.size() ? kLetters.find(c) : std::string_view::npos;
    if (which == std::string_view::npos) fail("an unknown escape");
    out += kMeanings[which];
    ++at_;
  }

  uint32_t hexadecimal() {
    const std::string_view digits = text_.substr(at_, 4);
    uint32_t code = 0;
    const auto [end, error] =
        std::from_chars(digits.data(), digits.data() + digits.size(), code, 16);
    if (digits.size() != 4 || error != std::errc() || end != digits.data() + 4) {
      fail("no four hexadecimal digits");
    }
    at_ += 4;
    return code;
  }

  void digits() {
    if (!is_digit(peek())) fail("no digit");
    while (is_digit(peek())) ++at_;
  }

  Json number() {
    const size_t start = at_;
    take("-");
    if (peek() == '0') {
      ++at_;
    } else {
      digits();
    }
    bool whole = true;
    if (take(".")) {
      whole = false;
      digits();
    }
    if (peek() == 'e' || peek() == 'E') {
      whole = false;
      ++at_;
      if (!take("+")) take("-");
      digits();
    }
    const std::string_view text = text_.substr(start, at_ - start);
    int64_t integer = 0;
    const char* end = text.data() + text.size();
    if (whole && std::from_chars(text.data(), end, integer).ec == std::errc()) return Json(integer);
    double real = 0;
    if (std::from_chars(text.data(), end, real).ec == std::errc()) return Json(real);
    // Out of range: 0 where it is too small, else infinite; nobody who reads sizes takes either.
    const bool tiny =
        text.find("e-") != std::string_view::npos || text.find("E-") != std::string_view::npos;
    return Json(tiny ? 0.0 : text[0] == '-' ? -HUGE_VAL : HUGE_VAL);
  }

  std::string_view text_;
  size_t at_ = 0;
};

}  // namespace

Json Json::parse(std::string_view text) { return Parser(text).document(); }

const Json* Json::find(std::string_view name) const {
  if (object() == nullptr) return nullptr;
  for (const auto& [key, value] : *object()) {
    if (key == name) return &value;
  }
  return nullptr;
}

const char* Json::type_name() const {
  static constexpr const char* kNames[] = {"NoneType", "bool", "int", "float",
                                           "str",      "list", "dict"};
  return kNames[value_.index()];
}

std::string Json::text(size_t limit) const {
  std::string out;
  const auto join = [&](const auto& items, char open, char close, const auto& show) {
    out += open;
    for (size_t i = 0; i < items.size() && out.size() < limit; ++i) {
      out += (i == 0 ? "" : ", ") + show(items[i]);
    }
    out += close;
  };
  if (is_null()) {
    out = "None";
  } else if (boolean() != nullptr) {
    out = *boolean() ? "True" : "False";
  } else if (integer() != nullptr) {
    out = std::to_string(*integer());
  } else if (real() != nullptr) {
    char digits[32];
    const auto end = std::to_chars(digits, digits + sizeof(digits), *real()).ptr;
    out.assign(digits, end);
    if (out.find_first_not_of("-0123456789") == std::string::npos) out += ".0";
  } else if (string() != nullptr) {
    out = repr(*string());
  } else if (list() != nullptr) {
    join(*list(), '[', ']', [&](const Json& item) { return item.text(limit); });
  } else {
    join(*object(), '{', '}',
         [&](const auto& member) { return repr(member.first) + ": " + member.second.text(limit); });
  }
  size_t end = std::min(limit, out.size());
  while (end > 0 && end < out.size() && (static_cast<unsigned char>(out[end]) & 0xc0) == 0x80)
    --end;
  return out.substr(0, end);  // no letter is cut
}

std::string repr(std::string_view text, size_t limit) {
  const bool apostrophe = text.find('\'') != std::string_view::npos;
  const char mark = apostrophe && text.find('"') == std::string_view::npos ? '"' : '\'';
  std::string out(1, mark);
  while (!text.empty() && out.size() < limit) {
    const size_t length = utf8_length(text);
    const char c = text[0];
    if (length == 1 && static_cast<unsigned char>(c) >= 0x20 && c != 0x7f) {
      if (c == '\\' || c == mark) out += '\\';
      out += c;
    } else if (length > 1) {
      out += text.substr(0, length);
    } else if (c == '\n' || c == '\r' || c == '\t') {
      out += c == '\n' ? "\\n" : c == '\r' ? "\\r" : "\\t";
    } else {
      char hexadecimal[5];
      std::snprintf(hexadecimal, sizeof(hexadecimal), "\\x%02x", static_cast<unsigned char>(c));
      out += hexadecimal;
    }
    text.remove_prefix(std::max<size_t>(length, 1));
  }
  if (text.empty()) out += mark;
  return out;
}

}  // namespace liveact
