// Tensors of a checkpoint in host memory, and the little mathematics that is done with them there.
#pragma once

#include <string>
#include <vector>

#include "core/ops.h"
#include "core/threads.h"
#include "liveact/model.h"

namespace liveact {

std::string shape_text(const std::vector<int64_t>& shape);  // "[5120, 1, 5]"
int64_t element_count(const HostTensor& tensor);
std::vector<float> to_f32(const HostTensor& tensor);

// The rows of a bf16 or fp32 tensor in the format of `out`, which is host memory.
void encode_rows(const HostTensor& tensor, const Rows& out, Threads& threads);

// out [n] = weight [n, k] · x [k] + bias.
std::vector<float> host_linear(const std::vector<float>& x, const HostTensor& weight,
                               const HostTensor& bias, Threads& threads);

}  // namespace liveact
