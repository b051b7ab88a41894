// The kernels in a folder, as its manifest describes them (triton_kernels/README.md).
#pragma once

#include <string>
#include <vector>

#include "core/json.h"
#include "liveact/kernel_image.h"

namespace liveact {

struct DescribedKernel {
  KernelImage image;   // without its cubin, which is
  std::string file;    // beside the manifest, and
  std::string sha256;  // has this digest
};

// The entries of a manifest. where: the file, for messages. Throws DeviceError for another format
// or architecture, and for an entry that does not describe a kernel.
std::vector<DescribedKernel> read_manifest(const Json& manifest, const std::string& where,
                                           const std::string& architecture);

}  // namespace liveact
