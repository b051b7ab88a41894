#include "checkpoint/identify.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <fstream>
#include <string_view>
#include <system_error>
#include <utility>

#include "core/json.h"

namespace liveact {

namespace {

namespace fs = std::filesystem;
using namespace std::string_view_literals;

constexpr auto kConvert = "torch.load it and write it with safetensors.torch.save_file";
constexpr std::array kPickles = {"PK\x03\x04"sv, "\x80\x02"sv, "\x80\x03"sv, "\x80\x04"sv,
                                 "\x80\x05"sv};
constexpr std::array kPages = {"<!doctype html"sv, "<html"sv};
constexpr std::array kSuffixes = {".bin"sv, ".ckpt"sv, ".gguf"sv,
                                  ".pt"sv,  ".pth"sv,  ".safetensors"sv};
// Of the VAE and the encoders: they lie beside those of the DiT.
constexpr std::array kOfOthers = {"Wan2.1_VAE.pth"sv, "models_t5_umt5-xxl-enc-bf16.pth"sv,
                                  "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"sv};
// What trainers and other programs put in front of the released names.
constexpr std::array kPrefixes = {
    "model.diffusion_model.", "diffusion_model.",   "model.", "module.",      "_orig_mod.",
    "transformer.",           "first_stage_model.", "vae.",   "text_encoder."};
// Part of a name -> whose names those are. None of them is in a released file.
constexpr std::array<std::pair<const char*, const char*>, 6> kOtherNames = {{
    {"condition_embedder.", "diffusers"},
    {".attn1.to_q.", "diffusers"},
    {".down_blocks.", "diffusers"},
    {".SelfAttention.", "transformers"},
    {"vision_model.", "transformers"},
    {".lora_", "a LoRA"},
}};

template <typename Beginnings>
bool starts_with_any(std::string_view text, const Beginnings& beginnings) {
  return std::any_of(beginnings.begin(), beginnings.end(),
                     [&](std::string_view one) { return text.starts_with(one); });
}

std::string lower(std::string_view text) {
  std::string result(text);
  for (char& c : result) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return result;
}

}  // namespace

std::string other_form(const fs::path& path, const std::string& expected) {
  std::string head(64, '\0');
  std::ifstream file(path, std::ios::binary);
  if (!file) return "";
  file.read(head.data(), static_cast<std::streamsize>(head.size()));
  head.resize(static_cast<size_t>(file.gcount()));
  if (head.empty()) return "an empty file: download it again";
  if (head.starts_with("version https://git-lfs")) {
    return "a git-lfs pointer in its place: run `git lfs pull` in " + path.parent_path().string();
  }
  if (head.starts_with("GGUF")) {
    return "a GGUF file: get the weights as released, GGUF is not read";
  }
  const size_t text = std::min(head.find_first_not_of(" \t\r\n\v\f"), head.size());
  if (starts_with_any(lower(std::string_view(head).substr(text)), kPages)) {
    return "a web page in its place: download it again";
  }
  const bool is_pickle = starts_with_any(head, kPickles);
  if (expected == "safetensors" && is_pickle) {
    return std::string("a pickle of torch.save: ") + kConvert;
  }
  const bool is_safetensors = head.size() > 8 && head[8] == '{' && head.substr(5, 3) == "\0\0\0"sv;
  if (expected == "torch" && !is_pickle && is_safetensors) {
    return "a safetensors file: get the .pth as released, or write it with torch.save";
  }
  return "";
}

std::string other_files(const fs::path& directory, const std::string& stem,
                        const std::string& expected) {
  std::error_code error;
  std::set<fs::path> names;
  for (fs::directory_iterator it(directory, error), end; !error && it != end; it.increment(error)) {
    names.insert(it->path().filename());
  }
  for (const fs::path& name : names) {
    const auto is = [](const std::string& text) {
      return [&text](std::string_view one) { return text == one; };
    };
    const bool meant =
        std::any_of(kSuffixes.begin(), kSuffixes.end(), is(name.extension().string())) &&
        std::none_of(kOfOthers.begin(), kOfOthers.end(), is(name.string()));
    const fs::path path = directory / name;
    if (meant && name.stem().string().starts_with(stem) && fs::is_regular_file(path, error)) {
      const std::string form = other_form(path, expected);
      return ", but " + name.string() + (form.empty() ? "" : ", " + form);
    }
  }
  return "";
}

std::string other_names(const std::set<std::string>& found, const std::string& name) {
  for (const char* prefix : kPrefixes) {
    if (found.contains(prefix + name)) {
      return repr(prefix + name) + ": remove " + repr(prefix) + " from the names";
    }
  }
  for (const auto& [part, owner] : kOtherNames) {
    for (const std::string& other : found) {
      if (other.find(part) != std::string::npos) {
        return std::string("none of this name but those of ") + owner +
               ": get the weights as released";
      }
    }
  }
  return "none of this name";
}

}  // namespace liveact
