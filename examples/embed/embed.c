/* The same program as embed.cpp, through the C interface: features in, latents out.
 *
 *   embed CHECKPOINT FOLDER WIDTH HEIGHT BLOCKS [DEVICE]
 *
 * FOLDER has the files that embed.cpp describes and gets latents.f32.
 */
#include <liveact/liveact.h>
#include <stdio.h>
#include <stdlib.h>

/* Raw float32 of a file. */
typedef struct values {
  float* data;
  int64_t count;
  int64_t at; /* how many were taken */
} values;

static void stop(const char* message) {
  fprintf(stderr, "embed: %s\n", message);
  exit(1);
}

static void check(liveact_status status) {
  if (status != LIVEACT_OK) stop(liveact_last_error());
}

static FILE* open_file(const char* folder, const char* name, const char* mode) {
  char path[4096];
  FILE* file;
  snprintf(path, sizeof(path), "%s/%s", folder, name);
  file = fopen(path, mode);
  if (file == NULL) stop(path);
  return file;
}

static values read_values(const char* folder, const char* name) {
  FILE* file = open_file(folder, name, "rb");
  values result = {NULL, 0, 0};
  long bytes;
  fseek(file, 0, SEEK_END);
  bytes = ftell(file);
  rewind(file);
  result.count = bytes / (long)sizeof(float);
  result.data = malloc(bytes > 0 ? (size_t)bytes : 1);
  if (result.data == NULL ||
      fread(result.data, sizeof(float), (size_t)result.count, file) != (size_t)result.count) {
    stop(name);
  }
  fclose(file);
  return result;
}

static const float* take(values* from, int64_t count) {
  if (from->count - from->at < count) stop("expected more values, found the end of a file");
  from->at += count;
  return from->data + from->at - count;
}

int main(int count, char** arguments) {
  liveact_device* device = NULL;
  liveact_model* model = NULL;
  liveact_stream* stream = NULL;
  liveact_model_sizes sizes = {sizeof(sizes), 0, 0, 0, 0, 0, 0, 0};
  liveact_stream_options options;
  liveact_block block = {sizeof(block), 0, 0, 0, 0};
  values prompt, portrait, condition, audio, noise;
  const char* folder;
  int64_t frame;
  FILE* out;
  int i;

  if (count < 6) {
    fprintf(stderr, "embed CHECKPOINT FOLDER WIDTH HEIGHT BLOCKS [DEVICE]\n");
    return 2;
  }
  folder = arguments[2];
  check(liveact_device_open(count > 6 ? arguments[6] : "cpu", NULL, &device));
  check(liveact_model_load(device, arguments[1], NULL, &model));
  check(liveact_model_get_sizes(model, &sizes));
  liveact_stream_options_init(&options);
  options.latent_width = atoi(arguments[3]) / 8;
  options.latent_height = atoi(arguments[4]) / 8;
  check(liveact_stream_open(model, &options, &stream));

  prompt = read_values(folder, "prompt.f32");
  check(liveact_stream_set_prompt(stream, prompt.data, prompt.count / sizes.text_dim));
  portrait = read_values(folder, "portrait.f32");
  condition = read_values(folder, "condition.f32");
  frame = options.latent_height * options.latent_width;
  check(liveact_stream_set_image(stream, portrait.data, portrait.count / sizes.image_dim,
                                 condition.data,
                                 condition.count / (sizes.condition_channels * frame)));

  audio = read_values(folder, "audio.f32");
  noise = read_values(folder, "noise.f32");
  out = open_file(folder, "latents.f32", "wb");
  for (i = 0; i < atoi(arguments[5]); ++i) {
    const float* first;
    const float* fresh;
    const float* heard;
    float* latent;
    check(liveact_stream_next_block(stream, &block));
    first = take(&noise, block.latent_size);
    fresh = take(&noise, 2 * block.latent_size);
    heard = take(&audio, block.audio_rows * sizes.audio_dim);
    latent = malloc((size_t)block.latent_size * sizeof(float));
    if (latent == NULL) stop("expected more memory");
    check(liveact_stream_denoise(stream, first, fresh, heard, latent));
    fwrite(latent, sizeof(float), (size_t)block.latent_size, out);
    free(latent);
  }
  fclose(out);
  printf("%s: %s blocks, %.1f MB\n", liveact_device_name(device), arguments[5],
         (double)liveact_device_bytes(device) / 1e6);

  free(prompt.data);
  free(portrait.data);
  free(condition.data);
  free(audio.data);
  free(noise.data);
  liveact_stream_close(stream);
  liveact_model_close(model);
  liveact_device_close(device);
  return 0;
}
