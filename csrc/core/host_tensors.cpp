#include "core/host_tensors.h"

#include <algorithm>

#include "core/check.h"
#include "core/host_rows.h"

namespace liveact {

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

int64_t element_count(const HostTensor& tensor) {
  int64_t count = 1;
  for (int64_t extent : tensor.shape) count *= extent;
  return count;
}

std::vector<float> to_f32(const HostTensor& tensor) {
  const int64_t n = element_count(tensor);
  std::vector<float> values(n);
  const float* source = read_f32(tensor.data, tensor.dtype, 0, n, 1.0f, values.data());
  if (source != values.data()) std::copy_n(source, n, values.data());
  return values;
}

void encode_rows(const HostTensor& tensor, const Rows& out, Threads& threads) {
  threads.run([&](int lane, int lanes) {
    std::vector<float> scratch(out.cols);
    const Share share(out.rows, lane, lanes);
    for (int64_t row = share.begin; row < share.end; ++row) {
      write_row(
          out, row,
          read_f32(tensor.data, tensor.dtype, row * out.cols, out.cols, 1.0f, scratch.data()));
    }
  });
}

std::vector<float> host_linear(const std::vector<float>& x, const HostTensor& weight,
                               const HostTensor& bias, Threads& threads) {
  const int64_t n = weight.shape[0];
  const int64_t k = weight.shape[1];
  std::vector<float> out = to_f32(bias);
  threads.run([&](int lane, int lanes) {
    std::vector<float> scratch(k);
    const Share share(n, lane, lanes);
    for (int64_t i = share.begin; i < share.end; ++i) {
      const float* row = read_f32(weight.data, weight.dtype, i * k, k, 1.0f, scratch.data());
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < k; ++j) sum += row[j] * x[j];
      out[i] += sum;
    }
  });
  return out;
}

void quantize_weight(const HostTensor& weight, uint8_t* codes, float* scale) {
  LIVEACT_CHECK(weight.dtype != DType::f8 && !weight.shape.empty() && weight.shape[0] > 0,
                "quantize_weight: expected rows in bf16 or fp32, found ", name(weight.dtype), " ",
                shape_text(weight.shape));
  const int64_t n = weight.shape[0];
  Threads threads;
  encode_rows(weight,
              {.data = codes,
               .dtype = DType::f8,
               .rows = n,
               .cols = element_count(weight) / n,
               .scale = scale},
              threads);
}

}  // namespace liveact
