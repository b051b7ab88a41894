// The DiT of a checkpoint in a C++ program: features in, latents out.
//
//   embed CHECKPOINT FOLDER WIDTH HEIGHT BLOCKS [DEVICE]
//
// FOLDER has what encoders made, as raw little-endian float32 (docs/sdk.md says how to get it):
//   prompt.f32     [tokens, text_dim]
//   portrait.f32   [image tokens, image_dim]
//   condition.f32  [in_dim - out_dim, 14, h, w] with h = HEIGHT / 8, w = WIDTH / 8
//   audio.f32      [rows, audio_dim], the rows of all blocks one after another
//   noise.f32      for each block noise [out_dim, n, h, w], then renoise [2, out_dim, n, h, w]
// and gets latents.f32, [out_dim, n, h, w] of each block: what a VAE decodes.

#include <liveact/checkpoint.h>
#include <liveact/error.h>
#include <liveact/stream.h>

#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

namespace {

std::vector<float> read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw liveact::Error(path.string() + ": expected a file, found none");
  std::vector<float> values(std::filesystem::file_size(path) / sizeof(float));
  file.read(reinterpret_cast<char*>(values.data()),
            static_cast<std::streamsize>(values.size() * sizeof(float)));
  return values;
}

// The next `count` of the values, `at` moves on. Throws where there are fewer.
const float* take(const std::vector<float>& values, size_t& at, int64_t count, const char* what) {
  if (values.size() - at < static_cast<size_t>(count)) {
    throw liveact::Error(std::string(what) + ": expected more values, found the end");
  }
  at += static_cast<size_t>(count);
  return values.data() + at - count;
}

void run(int count, char** arguments) {
  const std::filesystem::path folder = arguments[2];
  const auto device = liveact::open_device(count > 6 ? arguments[6] : "cpu");
  const auto model = liveact::load_model(device, arguments[1]);
  const liveact::ModelConfig& sizes = model->config();

  liveact::StreamOptions options;
  options.latent_width = std::stoi(arguments[3]) / 8;
  options.latent_height = std::stoi(arguments[4]) / 8;
  liveact::Stream stream(model, options);

  const std::vector<float> prompt = read(folder / "prompt.f32");
  stream.set_prompt(prompt.data(), static_cast<int64_t>(prompt.size()) / sizes.text_dim);
  const std::vector<float> portrait = read(folder / "portrait.f32");
  const std::vector<float> condition = read(folder / "condition.f32");
  const int64_t frame = options.latent_height * options.latent_width;
  stream.set_image(
      portrait.data(), static_cast<int64_t>(portrait.size()) / sizes.image_dim, condition.data(),
      static_cast<int64_t>(condition.size()) / ((sizes.in_dim - sizes.out_dim) * frame));

  const std::vector<float> audio = read(folder / "audio.f32");
  const std::vector<float> noise = read(folder / "noise.f32");
  size_t audio_at = 0;
  size_t noise_at = 0;
  std::ofstream out(folder / "latents.f32", std::ios::binary);
  for (int block = 0; block < std::stoi(arguments[5]); ++block) {
    const int64_t size = sizes.out_dim * stream.frames_of_next_block() * frame;
    const int64_t rows = stream.audio_rows_of_next_block();
    const float* first = take(noise, noise_at, size, "noise.f32");
    const float* fresh = take(noise, noise_at, 2 * size, "noise.f32");
    const float* heard = take(audio, audio_at, rows * sizes.audio_dim, "audio.f32");
    std::vector<float> latent(static_cast<size_t>(size));
    stream.denoise(first, fresh, heard, latent.data(), nullptr);
    out.write(reinterpret_cast<const char*>(latent.data()),
              static_cast<std::streamsize>(latent.size() * sizeof(float)));
  }
  std::printf("%s: %s blocks, %.1f MB\n", device->name(), arguments[5],
              static_cast<double>(device->allocated_bytes()) / 1e6);
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 6) {
    std::fprintf(stderr, "embed CHECKPOINT FOLDER WIDTH HEIGHT BLOCKS [DEVICE]\n");
    return 2;
  }
  try {
    run(count, arguments);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "embed: %s\n", error.what());
    return 1;
  }
}
