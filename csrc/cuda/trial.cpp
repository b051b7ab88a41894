#include "cuda/trial.h"

#include <cstring>
#include <random>
#include <vector>

namespace liveact::cuda {

namespace {

constexpr int64_t kDrawnBytes = 1 << 20;  // the rest repeats them

std::vector<uint8_t> draw(DType dtype, int64_t bytes, float sigma) {
  std::minstd_rand random(1);
  std::normal_distribution<float> normal;
  std::vector<uint8_t> values(std::min(bytes, kDrawnBytes));
  const size_t element = size_bytes(dtype);
  for (size_t i = 0; i + element <= values.size(); i += element) {
    if (dtype == DType::f8) {
      values[i] = f8_from_f32(normal(random) * sigma);
    } else {
      const uint16_t value = bf16_from_f32(normal(random));
      std::memcpy(&values[i], &value, sizeof(value));
    }
  }
  return values;
}

}  // namespace

Stopwatch::Stopwatch(const Driver& driver, CUstream stream) : driver_(driver), stream_(stream) {
  LIVEACT_DRIVER(driver_, event_create(&start_, 0));
  const CUresult result = driver_.event_create(&stop_, 0);
  if (result != kSuccess) driver_.event_destroy(start_);
  driver_.check(result, "cuEventCreate");
}

Stopwatch::~Stopwatch() {
  driver_.event_destroy(start_);
  driver_.event_destroy(stop_);
}

void fill_randomly(const Driver& driver, DType dtype, void* data, int64_t count, float* scale,
                   int64_t scales, CUstream stream, float sigma) {
  const int64_t bytes = count * size_bytes(dtype);
  const std::vector<uint8_t> values = draw(dtype, bytes, sigma);
  const auto target = reinterpret_cast<CUdeviceptr>(data);
  auto filled = static_cast<int64_t>(values.size());
  driver.check(driver.copy_to_device(target, values.data(), values.size(), stream),
               "cuMemcpyHtoDAsync");
  for (; filled < bytes; filled *= 2) {
    const auto more = static_cast<size_t>(std::min(filled, bytes - filled));
    driver.check(driver.copy_on_device(target + filled, target, more, stream), "cuMemcpyDtoDAsync");
  }
  const std::vector<float> drawn_scale(scale == nullptr ? 0 : scales, 4 / kF8Max);
  if (!drawn_scale.empty()) {
    driver.check(driver.copy_to_device(reinterpret_cast<CUdeviceptr>(scale), drawn_scale.data(),
                                       drawn_scale.size() * sizeof(float), stream),
                 "cuMemcpyHtoDAsync");
  }
  LIVEACT_DRIVER(driver, stream_synchronize(stream));
}

}  // namespace liveact::cuda
