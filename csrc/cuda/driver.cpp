#include "cuda/driver.h"

#include <dlfcn.h>

#include "core/check.h"

namespace liveact::cuda {

DynamicLibrary::DynamicLibrary(const std::string& name)
    : name_(name),
      // It stays in the process: drivers do not expect to be unloaded, and torch may open it again.
      handle_(dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE)) {
  if (handle_ == nullptr) {
    const char* reason = dlerror();
    detail::fail<DeviceError>("expected the library ", name,
                              ", found none: ", reason ? reason : "no reason");
  }
}

DynamicLibrary::~DynamicLibrary() { dlclose(handle_); }

void* DynamicLibrary::symbol(const char* symbol) const {
  void* address = dlsym(handle_, symbol);
  LIVEACT_DEVICE_CHECK(address != nullptr, name_, ": expected the function ", symbol,
                       ", found none: the library is too old");
  return address;
}

Driver::Driver(const std::string& library) : library_(library) {
#define LIVEACT_BIND(member, symbol_name, parameters) \
  member = reinterpret_cast<CUresult(*) parameters>(library_.symbol(symbol_name));
  LIVEACT_DRIVER_FUNCTIONS(LIVEACT_BIND)
#undef LIVEACT_BIND
  check(init(0), "cuInit");
}

void Driver::check(CUresult result, const char* call) const {
  if (result == kSuccess) return;
  const char* error = nullptr;
  const char* description = nullptr;
  error_name(result, &error);
  error_string(result, &description);
  detail::fail<DeviceError>(call, ": ", error ? error : "unknown error", " (", result,
                            "): ", description ? description : "no description");
}

}  // namespace liveact::cuda
