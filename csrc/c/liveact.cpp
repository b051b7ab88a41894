// The C interface: every function forwards to include/liveact/*.h and turns exceptions into a
// status and a text of the thread.

#include "liveact/liveact.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <new>
#include <string>
#include <utility>

#include "core/check.h"
#include "liveact/checkpoint.h"
#include "liveact/stream.h"

struct liveact_device {
  std::shared_ptr<liveact::Device> device;
};
struct liveact_model {
  std::shared_ptr<const liveact::Model> model;
};
struct liveact_stream {
  liveact::Stream stream;
};

namespace {

using liveact::detail::fail;

std::string& last_error() {
  thread_local std::string text;
  return text;
}

// noexcept: to keep the text may need memory that there is not; then the status alone is said.
liveact_status failed(liveact_status status, const char* text) noexcept {
  try {
    last_error() = text;
  } catch (...) {
    last_error().clear();
  }
  return status;
}

// Runs one call; nothing is thrown out of it.
template <typename Call>
liveact_status guarded(const Call& call) noexcept {
  try {
    call();
    return LIVEACT_OK;
  } catch (const liveact::DeviceError& error) {
    return failed(LIVEACT_DEVICE, error.what());
  } catch (const liveact::NonFiniteError& error) {
    return failed(LIVEACT_NOT_FINITE, error.what());
  } catch (const liveact::CancelledError& error) {
    return failed(LIVEACT_CANCELLED, error.what());
  } catch (const liveact::Error& error) {
    return failed(LIVEACT_INVALID, error.what());
  } catch (const std::bad_alloc&) {
    return failed(LIVEACT_DEVICE, "host: expected more memory, found not enough memory");
  } catch (const std::exception& error) {
    return failed(LIVEACT_INTERNAL, error.what());
  } catch (...) {
    return failed(LIVEACT_INTERNAL, "an unknown exception");
  }
}

template <typename T>
T& given(T* pointer, const char* what) {
  LIVEACT_CHECK(pointer != nullptr, what, ": expected a pointer, found null");
  return *pointer;
}

// A struct of the caller as this version has it: members that the caller does not know keep what
// they have in `ours`.
template <typename T>
T known(const T& theirs, T ours, const char* what) {
  LIVEACT_CHECK(theirs.size >= sizeof(size_t) && theirs.size <= 4096, what,
                ": expected its size to be set, found ", theirs.size);
  std::memcpy(&ours, &theirs, std::min(theirs.size, sizeof(T)));
  return ours;
}

// Fills a struct of the caller, as far as the caller knows it.
template <typename T>
void fill(T& theirs, T ours, const char* what) {
  ours.size = known(theirs, ours, what).size;
  std::memcpy(&theirs, &ours, std::min(theirs.size, sizeof(T)));
}

liveact_stream_options default_options() {
  const liveact::StreamOptions released;
  const liveact::SlotCounts& slots = released.slots;
  return {.size = sizeof(liveact_stream_options),
          .latent_height = released.latent_height,
          .latent_width = released.latent_width,
          .slots = {slots.reference, slots.long_term, slots.short_term, slots.current},
          .memory = "sequential",
          .compress_axis = "token",
          .value_filter = "key",
          .sampler = "renoise",
          .audio_guidance = released.audio_guidance,
          .max_image_tokens = released.max_image_tokens};
}

liveact::StreamOptions options_of(const liveact_stream_options* theirs) {
  liveact_stream_options o = default_options();
  if (theirs != nullptr) o = known(*theirs, o, "liveact_stream_options");
  liveact::StreamOptions result;
  result.latent_height = o.latent_height;
  result.latent_width = o.latent_width;
  result.slots = {o.slots[0], o.slots[1], o.slots[2], o.slots[3]};
  result.memory = {liveact::memory_from_name(&given(o.memory, "memory")),
                   liveact::compress_axis_from_name(&given(o.compress_axis, "compress_axis")),
                   liveact::value_filter_from_name(&given(o.value_filter, "value_filter"))};
  result.sampler = liveact::sampler_from_name(&given(o.sampler, "sampler"));
  result.audio_guidance = o.audio_guidance;
  result.max_image_tokens = o.max_image_tokens;
  return result;
}

}  // namespace

const char* liveact_version(void) { return LIVEACT_VERSION; }

const char* liveact_last_error(void) { return last_error().c_str(); }

liveact_status liveact_device_open(const char* name, const liveact_device_options* options,
                                   liveact_device** device) {
  return guarded([&] {
    given(name, "name");
    given(device, "device");
    liveact_device_options o = {sizeof(liveact_device_options), nullptr, nullptr, nullptr};
    if (options != nullptr) o = known(*options, o, "liveact_device_options");
    liveact::CudaLibraries libraries;
    if (o.driver != nullptr) libraries.driver = o.driver;
    if (o.cublaslt != nullptr) libraries.cublaslt = o.cublaslt;
    const char* kernels = o.kernels == nullptr ? "" : o.kernels;
    *device = new liveact_device{liveact::open_device(name, kernels, libraries)};
  });
}

void liveact_device_close(liveact_device* device) { delete device; }

const char* liveact_device_name(const liveact_device* device) {
  return device == nullptr ? "" : device->device->name();
}

int64_t liveact_device_bytes(const liveact_device* device) {
  return device == nullptr ? 0 : device->device->allocated_bytes();
}

liveact_status liveact_model_load(liveact_device* device, const char* directory,
                                  const char* precision, liveact_model** model) {
  return guarded([&] {
    given(device, "device");
    given(directory, "directory");
    given(model, "model");
    const char* name = precision == nullptr ? "" : precision;
    *model = new liveact_model{liveact::load_model(device->device, directory, name)};
  });
}

void liveact_model_close(liveact_model* model) { delete model; }

liveact_status liveact_model_get_sizes(const liveact_model* model, liveact_model_sizes* sizes) {
  return guarded([&] {
    const liveact::ModelConfig& config = given(model, "model").model->config();
    fill(given(sizes, "sizes"),
         {.size = 0,
          .latent_channels = config.out_dim,
          .condition_channels = config.in_dim - config.out_dim,
          .text_dim = config.text_dim,
          .text_len = config.text_len,
          .image_dim = config.image_dim,
          .audio_dim = config.audio_dim,
          .num_layers = config.num_layers},
         "liveact_model_sizes");
  });
}

void liveact_stream_options_init(liveact_stream_options* options) {
  if (options != nullptr) *options = default_options();
}

liveact_status liveact_stream_open(const liveact_model* model,
                                   const liveact_stream_options* options, liveact_stream** stream) {
  return guarded([&] {
    given(model, "model");
    given(stream, "stream");
    *stream = new liveact_stream{liveact::Stream(model->model, options_of(options))};
  });
}

void liveact_stream_close(liveact_stream* stream) { delete stream; }

liveact_status liveact_stream_set_prompt(liveact_stream* stream, const float* text,
                                         int64_t tokens) {
  return guarded([&] { given(stream, "stream").stream.set_prompt(&given(text, "text"), tokens); });
}

liveact_status liveact_stream_set_image(liveact_stream* stream, const float* features,
                                        int64_t tokens, const float* y, int64_t frames) {
  return guarded([&] {
    given(stream, "stream")
        .stream.set_image(&given(features, "features"), tokens, &given(y, "y"), frames);
  });
}

liveact_status liveact_stream_next_block(const liveact_stream* stream, liveact_block* block) {
  return guarded([&] {
    const liveact::Stream& s = given(stream, "stream").stream;
    const int64_t frames = s.frames_of_next_block();
    const liveact::StreamOptions& options = s.options();
    fill(given(block, "block"),
         {.size = 0,
          .index = s.next_block(),
          .frames = frames,
          .audio_rows = s.audio_rows_of_next_block(),
          .latent_size =
              s.model().config().out_dim * frames * options.latent_height * options.latent_width},
         "liveact_block");
  });
}

liveact_status liveact_stream_denoise(liveact_stream* stream, const float* noise,
                                      const float* renoise, const float* audio, float* latent) {
  return guarded([&] {
    liveact::Stream& s = given(stream, "stream").stream;
    if (s.options().sampler == liveact::Sampler::renoise) given(renoise, "renoise");
    s.denoise(&given(noise, "noise"), renoise, &given(audio, "audio"), &given(latent, "latent"),
              nullptr);
  });
}

void liveact_stream_cancel(liveact_stream* stream) {
  if (stream != nullptr) stream->stream.cancel();
}

int64_t liveact_stream_bytes(const liveact_stream* stream) {
  return stream == nullptr ? 0 : stream->stream.device_bytes();
}
