// The parts of the extension module _core, one per file.
#pragma once

#include <pybind11/pybind11.h>

namespace liveact {

void bind_errors();  // first: in both modules
void bind_checkpoint(pybind11::module_& m);
void bind_device(pybind11::module_& m);
void bind_kernels(pybind11::module_& m);
void bind_model(pybind11::module_& m);
void bind_stream(pybind11::module_& m);
void bind_calibration(pybind11::module_& m);

}  // namespace liveact
