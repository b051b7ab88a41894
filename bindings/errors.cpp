// The runtime's exceptions as those of the package, so that nobody has to translate them in Python.

#include <cstring>
#include <new>

#include "bind.h"
#include "liveact/error.h"

namespace py = pybind11;

namespace liveact {

namespace {

// Classes of liveact.errors, kept for the life of the process.
PyObject* device_error = nullptr;
PyObject* input_error = nullptr;
PyObject* session_error = nullptr;

// A message may name a file whose name is not UTF-8.
void set(PyObject* type, const char* message) {
  const auto length = static_cast<Py_ssize_t>(std::strlen(message));
  PyObject* text = PyUnicode_DecodeUTF8(message, length, "surrogateescape");
  if (text != nullptr) PyErr_SetObject(type, text);
  Py_XDECREF(text);
}

void translate(std::exception_ptr thrown) {
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const DeviceError& error) {
    set(device_error, error.what());
  } catch (const NonFiniteError& error) {
    set(session_error, error.what());
  } catch (const CancelledError& error) {
    set(session_error, error.what());
  } catch (const Error& error) {
    set(input_error, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_SetString(device_error, "host: expected more memory, found not enough memory");
  }
}

}  // namespace

void bind_errors() {
  const py::module_ errors = py::module_::import("liveact.errors");
  device_error = py::object(errors.attr("DeviceError")).release().ptr();
  input_error = py::object(errors.attr("InputError")).release().ptr();
  session_error = py::object(errors.attr("SessionError")).release().ptr();
  // Of this module: each of the two has its own copy of the runtime.
  py::register_local_exception_translator(&translate);
}

}  // namespace liveact
