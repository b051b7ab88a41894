// linear: x · Wᵀ through OpenBLAS.
//
// Each lane owns a range of output channels. It takes them panel by panel: expands a panel of
// the weight to fp32 where it is bf16 (used where the file is mapped) or fp8 codes, multiplies all
// rows with it in one sgemm per row chunk, and applies the epilogue while the tile is in cache.
// Expanding costs n·k conversions against 2·m·n·k operations, under 2 % from a few hundred rows on.

#include "cblas.h"
#include "core/host_rows.h"
#include "cpu/cpu_backend.h"

namespace liveact::cpu {

namespace {

constexpr int64_t kMaxPanel = 1024;          // output channels: amortises the packing of x
constexpr int64_t kChunk = 1024;             // rows per sgemm: amortises packing the panel
constexpr int64_t kPanelElements = 4 << 20;  // of an expanded panel: bounds the scratch

int64_t panel_channels(int64_t k) {
  return std::clamp(kPanelElements / k / 16 * 16, int64_t{16}, kMaxPanel);
}

// BLAS wants rows that do not overlap; the audio windows do.
bool usable_in_place(const Rows& x) { return x.dtype == DType::f32 && x.row_stride() >= x.cols; }

// The operand's values as fp32 without its scale, [rows, cols] where not in place.
const float* expand(const Rows& x, float* scratch, Threads& threads) {
  if (usable_in_place(x)) return static_cast<const float*>(x.data);
  threads.each(x.rows, [&](int64_t row, int) {
    float* target = scratch + row * x.cols;
    const float* values = read_f32(x.data, x.dtype, row * x.row_stride(), x.cols, 1.0f, target);
    if (values != target) std::copy_n(values, x.cols, target);
  });
  return scratch;
}

void apply_epilogue(const float* tile, int64_t tile_stride, int64_t row0, int64_t rows, int64_t n0,
                    int64_t n, const float* row_scale, const Epilogue& epilogue, const Rows& out,
                    float* scratch) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* acc = tile + r * tile_stride;
    const float a = row_scale == nullptr ? 1.0f : row_scale[row0 + r];
    const int64_t offset = (row0 + r) * out.row_stride() + n0;
    const float* before = scratch;
    if (epilogue.accumulate) before = read_f32(out.data, out.dtype, offset, n, 1.0f, scratch);
    float* target = out.dtype == DType::f32 ? static_cast<float*>(out.data) + offset : scratch;
    const float* scale = epilogue.scale == nullptr ? nullptr : epilogue.scale + n0;
    const auto* biases = static_cast<const float*>(epilogue.bias);
    const float* bias = biases == nullptr ? nullptr : biases + n0;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float scaled = acc[i] * a * (scale == nullptr ? 1.0f : scale[i]);
      const float shifted = scaled + (bias == nullptr ? 0.0f : bias[i]);
      target[i] = epilogue.accumulate ? before[i] + shifted : shifted;
    }
    if (out.dtype == DType::bf16) encode_bf16(target, n, static_cast<uint16_t*>(out.data) + offset);
  }
}

}  // namespace

int64_t panel_floats() { return kPanelElements + kMaxPanel * kChunk + kMaxPanel; }

void CpuOps::linear(const Rows& x, const Weight& weight, const Epilogue& epilogue,
                    const Rows& out) {
  const float* a = expand(x, activations_.f32(), threads_);
  const int64_t lda = usable_in_place(x) ? x.row_stride() : x.cols;
  const int64_t max_panel = panel_channels(weight.k);
  const float* row_scale = x.dtype == DType::f8 ? x.scale : nullptr;
  threads_.run([&](int64_t lane, int64_t lanes) {
    float* panel = panels_.f32() + lane * panel_floats();
    float* tile = panel + kPanelElements;
    float* scratch = tile + kMaxPanel * kChunk;
    int64_t part_n0 = 0;
    for (const Weight::Part& part : weight.parts) {
      // A range of whole cache lines of output channels for this lane.
      const int64_t share = (part.n + lanes * 16 - 1) / (lanes * 16) * 16;
      const int64_t end = std::min(part.n, (lane + 1) * share);
      for (int64_t n0 = lane * share; n0 < end; n0 += max_panel) {
        const int64_t n = std::min(max_panel, end - n0);
        const float* b =
            read_f32(part.data, weight.dtype, n0 * weight.k, n * weight.k, 1.0f, panel);
        for (int64_t row0 = 0; row0 < x.rows; row0 += kChunk) {
          const int64_t rows = std::min(kChunk, x.rows - row0);
          scipy_cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, static_cast<int>(rows),
                            static_cast<int>(n), static_cast<int>(weight.k), 1.0f, a + row0 * lda,
                            static_cast<int>(lda), b, static_cast<int>(weight.k), 0.0f, tile,
                            static_cast<int>(n));
          apply_epilogue(tile, n, row0, rows, part_n0 + n0, n, row_scale, epilogue, out, scratch);
        }
      }
      part_n0 += part.n;
    }
  });
}

}  // namespace liveact::cpu
