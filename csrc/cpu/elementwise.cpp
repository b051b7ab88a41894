// Ops that walk rows: norms, activations, format changes, patches, the sampler.

#include <cstring>

#include "core/host_rows.h"
#include "cpu/cpu_backend.h"
#include "cpu/exp2.h"

namespace liveact::cpu {

CpuOps::CpuOps(CpuDevice& device, const OpsLimits& limits)
    : threads_(device.pool()),
      limits_(limits),
      attention_floats_(attention_floats(limits)),
      rows_(device, sizeof(float) * threads_.lanes() * 3 * limits.max_cols),
      activations_(device, sizeof(float) * limits.max_operand),
      panels_(device, sizeof(float) * threads_.lanes() * panel_floats()),
      attention_(device, sizeof(float) * threads_.lanes() * attention_floats_) {}

int64_t CpuDevice::ops_bytes(const OpsLimits& limits) const {
  return sizeof(float) *
         (threads_.lanes() * (3 * limits.max_cols + panel_floats() + attention_floats(limits)) +
          limits.max_operand);
}

float* CpuOps::row_scratch(int lane) const { return rows_.f32() + lane * 3 * limits_.max_cols; }

void CpuOps::layer_norm(const Rows& x, const float* gain, const float* bias, float eps,
                        const Rows& out) {
  const int64_t n = x.cols;
  threads_.each(x.rows, [&](int64_t r, int lane) {
    float* scratch = row_scratch(lane);
    const float* row = read_row(x, r, scratch);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += row[i];
    const float mean = sum / static_cast<float>(n);
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < n; ++i) squares += (row[i] - mean) * (row[i] - mean);
    const float inverse = 1.0f / std::sqrt(squares / static_cast<float>(n) + eps);
    float* target = row_target(out, r, scratch + n);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) target[i] = (row[i] - mean) * inverse * gain[i] + bias[i];
    write_row(out, r, target);
  });
}

namespace {
float inverse_rms(const float* row, int64_t n, float eps) {
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; ++i) squares += row[i] * row[i];
  return 1.0f / std::sqrt(squares / static_cast<float>(n) + eps);
}
}  // namespace

void CpuOps::rms_norm(const Rows& x, const float* gain, float eps, const Rows& out) {
  threads_.each(x.rows, [&](int64_t r, int lane) {
    float* scratch = row_scratch(lane);
    const float* row = read_row(x, r, scratch);
    const float inverse = inverse_rms(row, x.cols, eps);
    float* target = row_target(out, r, scratch + x.cols);
#pragma omp simd
    for (int64_t i = 0; i < x.cols; ++i) target[i] = row[i] * inverse * gain[i];
    write_row(out, r, target);
  });
}

void CpuOps::activate(const Rows& x, Activation activation, const Rows& out) {
  const int64_t n = x.cols;
  threads_.each(x.rows, [&](int64_t r, int lane) {
    float* scratch = row_scratch(lane);
    const float* row = read_row(x, r, scratch);
    float* target = row_target(out, r, scratch + n);
    switch (activation) {
      case Activation::gelu_tanh:
        // 0.5·x·(1 + tanh(u)) = x / (1 + exp(−2u)), u = √(2/π)·(x + 0.044715·x³)
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          const float v = row[i];
          const float u = 0.7978845608028654f * (v + 0.044715f * v * v * v);
          const float e = std::min(-2.0f * kLog2E * u, 126.0f);
          target[i] = v / (1.0f + exp2_approx(e));
        }
        break;
      case Activation::gelu_erf:
        for (int64_t i = 0; i < n; ++i) {
          target[i] = 0.5f * row[i] * (1.0f + std::erf(row[i] * 0.70710678118654752f));
        }
        break;
      case Activation::relu:
        for (int64_t i = 0; i < n; ++i) target[i] = std::max(row[i], 0.0f);
        break;
    }
    write_row(out, r, target);
  });
}

void CpuOps::quantize(const Rows& x, const Rows& out) {
  threads_.each(x.rows,
                [&](int64_t r, int lane) { write_row(out, r, read_row(x, r, row_scratch(lane))); });
}

void CpuOps::patchify(const float* z, const float* y, int64_t z_channels, int64_t y_channels,
                      int64_t y_frames, int64_t y_first, int64_t n, int64_t h, int64_t w,
                      const Rows& tokens) {
  const int64_t grid_rows = h / 2;
  const int64_t grid_cols = w / 2;
  const int64_t channels = z_channels + y_channels;
  threads_.each(n * grid_rows * grid_cols, [&](int64_t t, int lane) {
    const int64_t frame = t / (grid_rows * grid_cols);
    const int64_t row = t / grid_cols % grid_rows;
    const int64_t col = t % grid_cols;
    float* scratch = row_scratch(lane);
    float* target = row_target(tokens, t, scratch);
    for (int64_t c = 0; c < channels; ++c) {
      const float* plane = c < z_channels
                               ? z + (c * n + frame) * h * w
                               : y + ((c - z_channels) * y_frames + y_first + frame) * h * w;
      for (int64_t p = 0; p < 4; ++p) {
        target[c * 4 + p] = plane[(row * 2 + p / 2) * w + col * 2 + p % 2];
      }
    }
    write_row(tokens, t, target);
  });
}

void CpuOps::unpatchify(const Rows& tokens, int64_t channels, int64_t n, int64_t h, int64_t w,
                        float* v) {
  const int64_t grid_rows = h / 2;
  const int64_t grid_cols = w / 2;
  threads_.each(n * grid_rows * grid_cols, [&](int64_t t, int lane) {
    const int64_t frame = t / (grid_rows * grid_cols);
    const int64_t row = t / grid_cols % grid_rows;
    const int64_t col = t % grid_cols;
    const float* source = read_row(tokens, t, row_scratch(lane));
    for (int64_t p = 0; p < 4; ++p) {
      for (int64_t c = 0; c < channels; ++c) {
        v[((c * n + frame) * h + row * 2 + p / 2) * w + col * 2 + p % 2] = source[p * channels + c];
      }
    }
  });
}

void CpuOps::guide(float* v, const float* v_null, float guidance, int64_t size) {
  threads_.run([&](int lane, int lanes) {
    const Share share(size, lane, lanes);
#pragma omp simd
    for (int64_t i = share.begin; i < share.end; ++i) {
      v[i] = v_null[i] + guidance * (v[i] - v_null[i]);
    }
  });
}

void CpuOps::sampler_step(float* z, const float* v, const float* noise, float sigma,
                          float next_sigma, int64_t size) {
  threads_.run([&](int lane, int lanes) {
    const Share share(size, lane, lanes);
#pragma omp simd
    for (int64_t i = share.begin; i < share.end; ++i) {
      const float x0 = z[i] - sigma * v[i];
      z[i] = noise == nullptr ? x0 : (1.0f - next_sigma) * x0 + next_sigma * noise[i];
    }
  });
}

bool CpuOps::all_finite(const float* x, int64_t size) {
  bool finite = true;
  for (int64_t i = 0; i < size; ++i) finite = finite && std::isfinite(x[i]);
  return finite;
}

}  // namespace liveact::cpu
