/* The C interface of the runtime: a DiT on a device, sessions on it, their blocks.
 *
 * For C, and for every language that calls C. What the sizes and words mean is said in stream.h,
 * model.h and docs/model.md. docs/sdk.md has a whole program, and says what is stable.
 *
 * Errors. A function that can fail returns a liveact_status. The text of the last failure of the
 * calling thread is liveact_last_error(), one line: what was expected and what was found. What a
 * function would have written is left alone when it fails. No C++ exception leaves the library, and
 * nothing in it prints or ends the process.
 *
 * Threads. Any number of threads may use different handles, devices and models at once, and one
 * model in many streams. One thread at a time may use a stream, but liveact_stream_cancel may be
 * called at any moment before the stream is closed. A process that was forked after a device was
 * opened must not use it.
 *
 * Lifetime. A handle is closed by its function, with null for nothing. A model keeps its device,
 * and a stream its model, for as long as they need it: the order of closing is free.
 *
 * Memory. Numbers go in and out as float in host memory that the caller owns, row-major. Nothing is
 * kept of what is given after a call returns.
 */
#ifndef LIVEACT_LIVEACT_H
#define LIVEACT_LIVEACT_H

#include <stddef.h>
#include <stdint.h>

#include "liveact/api.h"
#include "liveact/version.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum liveact_status {
  LIVEACT_OK = 0,
  LIVEACT_INVALID = 1,    /* what was given cannot be used: a file, a size, a null pointer */
  LIVEACT_DEVICE = 2,     /* a device or a library of it is missing, failing or out of memory */
  LIVEACT_NOT_FINITE = 3, /* a block with a NaN or an infinity: the stream is unusable now */
  LIVEACT_CANCELLED = 4,  /* a block that liveact_stream_cancel stopped: the stream is unusable */
  LIVEACT_INTERNAL = 5    /* a mistake of the library */
} liveact_status;

typedef struct liveact_device liveact_device;
typedef struct liveact_model liveact_model;
typedef struct liveact_stream liveact_stream;

/* The version of the library: LIVEACT_VERSION of the headers that it was built with. */
LIVEACT_API const char* liveact_version(void);

/* Of the last call of this thread that failed; "" before any. Valid until the next one fails. */
LIVEACT_API const char* liveact_last_error(void);

/* Structs that may grow begin with `size`: sizeof of what the caller was compiled with. */

typedef struct liveact_device_options {
  size_t size;          /* sizeof(liveact_device_options) */
  const char* kernels;  /* folder of GPU kernels; null: those that came with the library */
  const char* driver;   /* null: "libcuda.so.1" */
  const char* cublaslt; /* null: "libcublasLt.so.13" */
} liveact_device_options;

/* name: "cpu", "cuda" or "cuda:N". options: may be null. */
LIVEACT_API liveact_status liveact_device_open(const char* name,
                                               const liveact_device_options* options,
                                               liveact_device** device);
LIVEACT_API void liveact_device_close(liveact_device* device);
/* "cpu" or "cuda:N", valid until the device is closed. */
LIVEACT_API const char* liveact_device_name(const liveact_device* device);
/* Memory that models and streams have on it now. */
LIVEACT_API int64_t liveact_device_bytes(const liveact_device* device);

/* The DiT of a checkpoint directory. precision: "fp32" (CPU), "bf16", "fp8", "auto", the file of a
 * policy, or null for what the checkpoint was converted to, else fp32 on a CPU and auto on a GPU.
 * Files are mapped; on a CPU the model reads its weights there, so do not cut them meanwhile. */
LIVEACT_API liveact_status liveact_model_load(liveact_device* device, const char* directory,
                                              const char* precision, liveact_model** model);
LIVEACT_API void liveact_model_close(liveact_model* model);

typedef struct liveact_model_sizes {
  size_t size;                /* in: sizeof(liveact_model_sizes) */
  int64_t latent_channels;    /* of noise and latents */
  int64_t condition_channels; /* of y */
  int64_t text_dim;           /* width of a prompt token */
  int64_t text_len;           /* most tokens of a prompt */
  int64_t image_dim;          /* width of an image feature */
  int64_t audio_dim;          /* width of an audio feature: encoder layers * hidden size */
  int64_t num_layers;
} liveact_model_sizes;

LIVEACT_API liveact_status liveact_model_get_sizes(const liveact_model* model,
                                                   liveact_model_sizes* sizes);

typedef struct liveact_stream_options {
  size_t size;               /* sizeof(liveact_stream_options) */
  int64_t latent_height;     /* h = picture height / 8, even */
  int64_t latent_width;      /* w = picture width / 8, even */
  int32_t slots[4];          /* latent frames: reference, long-term, short-term, current block */
  const char* memory;        /* "sequential", "sharded" or "mean" */
  const char* compress_axis; /* "token" or "frame" */
  const char* value_filter;  /* "key" or "own" */
  const char* sampler;       /* "renoise" or "euler" */
  float audio_guidance;      /* 1: none */
  int64_t max_image_tokens;
} liveact_stream_options;

/* The released values, for pictures of 512x512. Sets `size` too. */
LIVEACT_API void liveact_stream_options_init(liveact_stream_options* options);

/* A session: every buffer is made here, and none later. options: null for the released values. */
LIVEACT_API liveact_status liveact_stream_open(const liveact_model* model,
                                               const liveact_stream_options* options,
                                               liveact_stream** stream);
LIVEACT_API void liveact_stream_close(liveact_stream* stream);

/* text [tokens, text_dim], 1 <= tokens <= text_len: the prompt from the next block on. */
LIVEACT_API liveact_status liveact_stream_set_prompt(liveact_stream* stream, const float* text,
                                                     int64_t tokens);

/* Once, before the first block: features [tokens, image_dim] of the portrait, and what its latent
 * frames are conditioned on, y [condition_channels, frames, h, w], frames >= those of block 0 and 1
 * together (14 with the released slots). */
LIVEACT_API liveact_status liveact_stream_set_image(liveact_stream* stream, const float* features,
                                                    int64_t tokens, const float* y, int64_t frames);

typedef struct liveact_block {
  size_t size;         /* in: sizeof(liveact_block) */
  int64_t index;       /* 0, 1, ... */
  int64_t frames;      /* n latent frames: 6, then 8 with the released slots */
  int64_t audio_rows;  /* audio features that it needs: 4 n + 1, then 4 n + 4 */
  int64_t latent_size; /* floats of a latent: latent_channels * n * h * w */
} liveact_block;

/* What the next liveact_stream_denoise takes and gives. */
LIVEACT_API liveact_status liveact_stream_next_block(const liveact_stream* stream,
                                                     liveact_block* block);

/* noise [c, n, h, w]; renoise [2, c, n, h, w], the fresh noise after steps 0 and 1, null with the
 * sampler "euler"; audio [audio_rows, audio_dim]; latent [c, n, h, w] receives the result. */
LIVEACT_API liveact_status liveact_stream_denoise(liveact_stream* stream, const float* noise,
                                                  const float* renoise, const float* audio,
                                                  float* latent);

/* From any thread: a running liveact_stream_denoise returns LIVEACT_CANCELLED at its next layer,
 * and so does every later one. */
LIVEACT_API void liveact_stream_cancel(liveact_stream* stream);

/* Memory of the device that the stream has. */
LIVEACT_API int64_t liveact_stream_bytes(const liveact_stream* stream);

#ifdef __cplusplus
}
#endif

#endif
