// The Python face of the runtime: buffers in and out by pointer, the GIL released while it works.
// Shapes are checked here once; everything else is in csrc/.

#include "bind.h"
#include "liveact/version.h"

namespace py = pybind11;

PYBIND11_MODULE(_core, m) {
  m.doc() = "LiveAct runtime: a DiT (Model), sessions on it (Stream), and the devices they run on.";
  m.attr("__version__") = LIVEACT_VERSION;
  liveact::bind_errors();
  liveact::bind_device(m);
  liveact::bind_kernels(m);
  liveact::bind_model(m);
  liveact::bind_checkpoint(m);
  liveact::bind_stream(m);
  liveact::bind_calibration(m);
}
