// Calls of single ops of a device on NumPy arrays, so that tests can compare the backends and the
// kernels.
//
// Formats travel as array types: float32 is fp32, uint16 is bf16, uint8 is fp8. fp8 rows are a
// tuple (codes, scale). Every call uploads, runs one op and downloads: made for tests, not for
// speed.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/buffer.h"
#include "core/ops.h"

namespace liveact {

using Floats = pybind11::array_t<float, pybind11::array::c_style | pybind11::array::forcecast>;
// (frame [positions, pairs, 2], row [grid_rows, pairs, 2], col [grid_cols, pairs, 2])
using Tables = std::array<Floats, 3>;

DType dtype_of(const pybind11::array& array);

// One call: a device, its ops, and the device memory of the operands.
class Call {
 public:
  // max_operand, full_sums: of the op queue, see OpsLimits; more than the small operands of most
  // tests need.
  explicit Call(Device& device, int64_t max_operand = 1 << 22, bool full_sums = false);

  Ops& ops() { return *ops_; }

  template <typename T = void>
  T* memory(int64_t bytes) {
    buffers_.emplace_back(device_, bytes);
    return static_cast<T*>(buffers_.back().data());
  }

  template <typename T = void>
  T* put(const pybind11::array& array) {
    return static_cast<T*>(put_bytes(array));
  }
  float* put(const std::optional<Floats>& array);
  pybind11::array get(const void* pointer, DType dtype,
                      const std::vector<pybind11::ssize_t>& shape);

  // An array [rows, cols], or (codes, scale [rows]).
  Rows rows(const pybind11::object& object);
  Rows new_rows(int64_t count, int64_t cols, const std::string& dtype);
  pybind11::object get(const Rows& rows);

  // (k, v, k_scale or None, v_scale or None); k is [H, tokens, hd], v in the backend's layout.
  KvSegment segment(const pybind11::tuple& parts);
  KvSegment new_segment(int64_t heads, int64_t tokens, int64_t head_dim, DType dtype);
  // (k, v [value_shape])
  pybind11::tuple get(const KvSegment& s, const std::vector<pybind11::ssize_t>& value_shape);

  Rope rope(const Tables& tables);

 private:
  void* put_bytes(const pybind11::array& array);

  Device& device_;
  std::vector<Buffer> buffers_;
  std::unique_ptr<Ops> ops_;  // after the buffers: closed before them, it waits for what uses them
};

}  // namespace liveact
