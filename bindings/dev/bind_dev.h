// The parts of the extension module _core_dev, one per file.
#pragma once

#include <pybind11/pybind11.h>

namespace liveact {

// The submodule `ops`.
void bind_ops_rows(pybind11::module_& m);
void bind_ops_latent(pybind11::module_& m);
void bind_ops_keys(pybind11::module_& m);
void bind_ops_attention(pybind11::module_& m);

}  // namespace liveact
