// The stand-in for libcublasLt: products as plain loops. Part of fake_cuda.cpp.
#pragma once

#include "fake_device.h"

namespace {

struct Layout {
  int type;
  int64_t rows, cols, ld;
};

struct Desc {
  std::map<int, int64_t> attributes;
  int64_t get(int attribute) const {
    const auto found = attributes.find(attribute);
    return found == attributes.end() ? 0 : found->second;
  }
};

float element(const void* data, int type, int64_t index) {
  using namespace liveact;
  if (type == 28) return f32_from_f8(static_cast<const uint8_t*>(data)[index]);
  if (type == 14) return f32_from_bf16(static_cast<const uint16_t*>(data)[index]);
  return static_cast<const float*>(data)[index];
}

// Another algorithm is the fastest for another N (the rows of the column-major output).
double product_ms(uint64_t algorithm, int64_t n) {
  return algorithms.at((algorithm + static_cast<uint64_t>(n) / 16) % algorithms.size());
}

// D = A^T B in column-major with the scales, bias and beta of the descriptor.
void matmul(const Desc& desc, const void* a, const Layout& la, const void* b, const Layout& lb,
            float beta, void* d, const Layout& ld) {
  const auto* a_scale = reinterpret_cast<const float*>(desc.get(17));
  const auto* b_scale = reinterpret_cast<const float*>(desc.get(18));
  const auto* bias = desc.get(7) == 4 ? reinterpret_cast<const void*>(desc.get(8)) : nullptr;
  std::vector<float> left(la.rows * la.cols);
  std::vector<float> right(lb.rows * lb.cols);
  for (int64_t i = 0; i < la.cols; ++i) {
    for (int64_t k = 0; k < la.rows; ++k)
      left[i * la.rows + k] = element(a, la.type, i * la.ld + k);
  }
  for (int64_t j = 0; j < lb.cols; ++j) {
    for (int64_t k = 0; k < lb.rows; ++k)
      right[j * lb.rows + k] = element(b, lb.type, j * lb.ld + k);
  }
  for (int64_t j = 0; j < ld.cols; ++j) {
    for (int64_t i = 0; i < ld.rows; ++i) {
      float sum = 0;
      for (int64_t k = 0; k < la.rows; ++k) sum += left[i * la.rows + k] * right[j * lb.rows + k];
      if (la.type == 28) sum *= a_scale[i] * b_scale[j];
      if (bias != nullptr) sum += element(bias, static_cast<int>(desc.get(26)), i);
      const int64_t at = j * ld.ld + i;
      if (beta != 0) sum += beta * element(d, ld.type, at);
      if (ld.type == 14) {
        static_cast<uint16_t*>(d)[at] = liveact::bf16_from_f32(sum);
      } else {
        static_cast<float*>(d)[at] = sum;
      }
    }
  }
}

}  // namespace

EXPORT size_t cublasLtGetVersion() { return 130000; }
EXPORT const char* cublasLtGetStatusString(int) { return "a failure that the test asked for"; }
EXPORT int cublasLtCreate(void** handle) {
  if (const int code = record("cublasLtCreate")) return code;
  give(handle, next_handle++);
  ++live["handle"];
  return 0;
}
EXPORT int cublasLtDestroy(void*) {
  wait_for_device();
  --live["handle"];
  return record("cublasLtDestroy");
}
EXPORT int cublasLtMatmulDescCreate(Desc** desc, int compute, int scale) {
  if (const int code = record("cublasLtMatmulDescCreate", compute, scale)) return code;
  *desc = new Desc;
  ++live["product"];
  return 0;
}
EXPORT int cublasLtMatmulDescDestroy(Desc* desc) {
  delete desc;
  --live["product"];
  return record("cublasLtMatmulDescDestroy");
}
EXPORT int cublasLtMatmulDescSetAttribute(Desc* desc, int attribute, const void* value,
                                          size_t bytes) {
  int64_t number = 0;
  std::memcpy(&number, value, bytes);
  desc->attributes[attribute] = number;
  return record("cublasLtMatmulDescSetAttribute", attribute,
                bytes <= 4 ? std::to_string(number) : "pointer");
}
EXPORT int cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t cols,
                                      int64_t ld) {
  if (const int code = record("cublasLtMatrixLayoutCreate", type, rows, cols, ld)) return code;
  *layout = new Layout{type, static_cast<int64_t>(rows), static_cast<int64_t>(cols), ld};
  ++live["layout"];
  return 0;
}
EXPORT int cublasLtMatrixLayoutDestroy(Layout* layout) {
  delete layout;
  --live["layout"];
  return record("cublasLtMatrixLayoutDestroy");
}
EXPORT int cublasLtMatmulPreferenceCreate(void** preference) {
  if (const int code = record("cublasLtMatmulPreferenceCreate")) return code;
  give(preference, next_handle++);
  ++live["preference"];
  return 0;
}
EXPORT int cublasLtMatmulPreferenceDestroy(void*) {
  --live["preference"];
  return record("cublasLtMatmulPreferenceDestroy");
}
EXPORT int cublasLtMatmulPreferenceSetAttribute(void*, int attribute, const void*, size_t) {
  return record("cublasLtMatmulPreferenceSetAttribute", attribute);
}
EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, Desc* desc, void*, void*, void*, void*, void*,
                                          int at_most, uint64_t* results, int* found) {
  constexpr int kResultWords = 12;  // 96 bytes, the algorithm first
  constexpr int kInvalidValue = 7;
  // "The scaling mode for A scale (OUTER_VEC_32F) requires a custom pointer for A scale"
  for (const auto& [mode, pointer] : {std::pair(31, 17), std::pair(32, 18)}) {
    if (desc->get(mode) != 0 && desc->get(pointer) == 0) return kInvalidValue;
  }
  *found = std::min(at_most, static_cast<int>(algorithms.size()));
  std::fill_n(results, kResultWords * *found, 0);
  for (int i = 0; i < *found; ++i) results[kResultWords * i] = i;
  return record("cublasLtMatmulAlgoGetHeuristic", at_most);
}
EXPORT int cublasLtMatmul(void*, Desc* desc, const void* alpha, const void* a, Layout* la,
                          const void* b, Layout* lb, const void* beta_pointer, const void*, Layout*,
                          void* d, Layout* ld, const uint64_t* algorithm, void*, size_t,
                          void* stream) {
  const float beta = *static_cast<const float*>(beta_pointer);
  const int code = record(kMatmul, *static_cast<const float*>(alpha), beta, '|', ld->cols, ld->rows,
                          la->rows, *algorithm);
  if (code != 0) return code;
  if (separate_residuals && beta != 0 && desc->get(7) == 4 && la->type == 28) return kNotSupported;
  const size_t element_bytes = ld->type == 14 ? 2 : 4;
  if (!is_inside(d, ld->ld * ld->cols * element_bytes)) return kExecutionFailed;
  run(stream, {[=, attributes = *desc, la = *la, lb = *lb, ld = *ld, algorithm = *algorithm] {
                 clock_ms += product_ms(algorithm, ld.rows);
                 if (multiplies) matmul(attributes, a, la, b, lb, beta, d, ld);
               },
               "product"});
  return 0;
}
