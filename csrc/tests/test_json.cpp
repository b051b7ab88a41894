// The reader of JSON: what is taken, what is refused, how values are shown.

#include <string>

#include "core/json.h"
#include "core/sha256.h"
#include "tests/check.h"

namespace liveact {
namespace {

std::string refusal(const std::string& text) {
  try {
    Json::parse(text);
  } catch (const Error& error) {
    return error.what();
  }
  return "none";
}

TEST(json_values) {
  const Json found = Json::parse(
      " {\"a\": [1, -2, 0, 9223372036854775807], \"b\": {\"c\": true, \"d\": null},\n"
      "\t\"e\": \"\\u00e4\\n\\ud83d\\ude00\\/ü\", \"f\": 1.5e2, \"g\": 1e-7, \"h\": false} ");
  const Json::List& list = *found.find("a")->list();
  CHECK(list.size() == 4 && *list[1].integer() == -2);
  CHECK(*list[3].integer() == INT64_MAX);
  CHECK(*found.find("b")->find("c")->boolean());
  CHECK(found.find("b")->find("d")->is_null());
  CHECK(*found.find("e")->string() == "ä\n😀/ü");
  CHECK(*found.find("f")->real() == 150.0 && *found.find("g")->real() == 1e-7);
  CHECK(!*found.find("h")->boolean() && found.find("i") == nullptr);
  CHECK(Json::parse("[]").list()->empty() && Json::parse("{}").object()->empty());
  CHECK(Json::parse("-0").integer() != nullptr && Json::parse("0.0").integer() == nullptr);
  // Beyond 64 bits a number is real, beyond that infinite: no size is either.
  CHECK(*Json::parse("9223372036854775808").real() == 9223372036854775808.0);
  CHECK(*Json::parse("1e999").real() > 1e308 && *Json::parse("1e-999").real() == 0.0);
}

TEST(json_refusals) {
  CHECK(refusal("") == "no value at byte 0");
  CHECK(refusal("{\"a\": ") == "no value at byte 6");
  CHECK(refusal("{} {}") == "more than one value at byte 3");
  CHECK(refusal("{\"a\" 1}") == "no ':' at byte 5");
  CHECK(refusal("{a: 1}") == "no name of a member at byte 1");
  CHECK(refusal("{\"a\": 1,}") == "no name of a member at byte 8");
  CHECK(refusal("{\"a\": 1") == "no ',' or '}' at byte 7");
  CHECK(refusal("[1 2]") == "no ',' or ']' at byte 3");
  CHECK(refusal("[1,]") == "no value at byte 3");
  CHECK(refusal("{\"a\": 1, \"a\": 2}") == "the name 'a' twice in an object");
  CHECK(refusal("\"a") == "no end of a string at byte 2");
  CHECK(refusal("\"\n\"") == "a control character in a string at byte 1");
  CHECK(refusal("\"\\x\"") == "an unknown escape at byte 2");
  CHECK(refusal("\"\\") == "an unknown escape at byte 2");
  CHECK(refusal("\"\\u12g4\"") == "no four hexadecimal digits at byte 3");
  for (const char* half : {"\"\\ud800\"", "\"\\udc00\"", "\"\\ud800\\u0041\""}) {
    CHECK(refusal(half).starts_with("half of a surrogate pair"));
  }
  for (const char* bytes :
       {"\"\xff\"", "\"\xc0\x80\"", "\"\xed\xa0\x80\"", "\"\xf4\x90\x80\x80\"", "\"\xe2\x82\""}) {
    CHECK(refusal(bytes) == "a byte that is not UTF-8 at byte 1");
  }
  for (const char* number : {"-", "1.", "1e", "1e+", ".5", "+1", "NaN", "Infinity"}) {
    CHECK(refusal(number) != "none");
  }
  CHECK(refusal("01") == "more than one value at byte 1");
  CHECK(refusal("tru") == "no value at byte 0");
  CHECK(refusal("\xef\xbb\xbf{}") == "no value at byte 0");
  CHECK(refusal(std::string("1\0", 2)) == "more than one value at byte 1");
}

TEST(json_depth) {
  const auto nested = [](size_t depth) {
    return std::string(depth, '[') + std::string(depth, ']');
  };
  CHECK(refusal(nested(Json::kMaxDepth + 1)) == "none");
  CHECK(refusal(nested(Json::kMaxDepth + 2)).starts_with("too deep a nesting"));
  CHECK(refusal(std::string(1 << 20, '[')).starts_with("too deep a nesting"));
}

TEST(json_shown) {
  CHECK(Json::parse("[1, 2.0, true, null, \"it's\", {\"a\": \"\\n\"}]").text() ==
        "[1, 2.0, True, None, \"it's\", {'a': '\\n'}]");
  CHECK(Json::parse("\"\\u0000'\\\"\"").text() == "'\\x00\\'\"'");
  CHECK(Json::parse("[\"äöü\"]").text(4) == "['ä");
  CHECK(Json::parse("\"0123456789\"").text(5) == "'0123");
}

TEST(sha256_digests) {
  const std::string empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
  const std::string abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
  const std::string two_blocks = "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1";
  const std::string million = "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0";
  CHECK(sha256("") == empty);
  CHECK(sha256("abc") == abc);
  CHECK(sha256("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq") == two_blocks);
  CHECK(sha256(std::string(1'000'000, 'a')) == million);
}

}  // namespace
}  // namespace liveact
