// What module.cpp adds to the extension module from other files.
#pragma once

#include <pybind11/pybind11.h>

namespace liveact {

// The submodule `ops`: single ops of a device on NumPy arrays, for tests of the backends.
void bind_ops(pybind11::module_& m);

// TimedDevice, after Device is known.
void bind_timed_device(pybind11::module_& m);

// `launch`: one of a CUDA device's kernels on a stream of the caller's.
void bind_launch(pybind11::module_& m);

}  // namespace liveact
