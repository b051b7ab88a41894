// A stand-in for libcuda and libcublasLt without a GPU: the launch path can be tested anywhere.
//
// Device memory is host memory, so copies are real, and so are the products (plain loops). A kernel
// does nothing, unless the test gives a hook that runs it (Triton's interpreter does). Graphs keep
// what was captured and run it when launched. Every call is one line of a log; a test can make any
// call fail once, and do something of its own in the middle of one. What a device would do behind
// the runtime's back is done too: a capture dies where something waits for the whole device, a
// product that writes outside of its memory fails, and memory that is freed while work is under way
// is counted. Modules are named by their image: a test passes a kernel's name as its cubin. A
// clock stands still but for kernels and products, which take as long as the constants below say.

#include "fake_cublaslt.h"
#include "fake_device.h"

// For the tests.
EXPORT const char* fake_log() { return log_text.c_str(); }
EXPORT void fake_clear() { log_text.clear(); }
EXPORT void fake_fail(const char* call, int code) { failures[call] = code; }
EXPORT void fake_declare(const char* kernel, const char* types) { declared[kernel] = types; }
EXPORT void fake_algorithms(const double* ms, int count) { algorithms.assign(ms, ms + count); }
EXPORT void fake_kernel_ms(const char* kernel, double ms) { kernel_ms[kernel] = ms; }
EXPORT void fake_separate_residuals(int separate) { separate_residuals = separate != 0; }
EXPORT void fake_interrupt(const char* call, Interruption action) { interruptions[call] = action; }
EXPORT long fake_busy_frees() { return busy_frees; }
EXPORT void fake_hook(Hook new_hook) { hook = new_hook; }
EXPORT long fake_live_allocations() { return static_cast<long>(allocations.size()); }
// A copy of host memory where only copies of this driver may read.
EXPORT void* fake_seal(const void* data, size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  std::memcpy(memory, data, bytes);
  mprotect(memory, bytes, PROT_NONE);
  sealed[reinterpret_cast<unsigned long long>(memory)] = bytes;
  return memory;
}
// The contents of everything allocated, as sorted hashes: where it lies does not matter.
EXPORT const char* fake_contents() {
  static std::string text;
  std::multiset<size_t> hashes;
  for (const auto& [pointer, bytes] : allocations) {
    hashes.insert(std::hash<std::string_view>()({reinterpret_cast<const char*>(pointer), bytes}));
  }
  text.clear();
  for (const size_t hash : hashes) text += std::to_string(hash) + " ";
  return text.c_str();
}
EXPORT void fake_free_memory(size_t bytes) { free_memory = bytes; }
EXPORT long fake_live_events() { return static_cast<long>(events.size()); }

// libcuda.
EXPORT int cuInit(unsigned) { return record("cuInit"); }
EXPORT int cuDriverGetVersion(int* v) {
  *v = 13000;
  return record("cuDriverGetVersion");
}
EXPORT int cuDeviceGetCount(int* n) {
  *n = 2;
  return record("cuDeviceGetCount");
}
EXPORT int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return record("cuDeviceGet", ordinal);
}
EXPORT int cuDeviceGetName(char* name, int n, int) {
  std::strncpy(name, "Fake H200", n);
  return 0;
}
EXPORT int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 97 ? 232448 : 132;
  return record("cuDeviceGetAttribute", attribute);
}
EXPORT int cuDevicePrimaryCtxRetain(void** context, int device) {
  give(context, 0xc0 + device);
  return record("cuDevicePrimaryCtxRetain", device);
}
EXPORT int cuDevicePrimaryCtxRelease_v2(int device) {
  return record("cuDevicePrimaryCtxRelease", device);
}
EXPORT int cuCtxPushCurrent_v2(void*) { return 0; }
EXPORT int cuCtxPopCurrent_v2(void** context) {
  *context = nullptr;
  return 0;
}
EXPORT int cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
  *free_bytes = free_memory;
  *total = size_t{1} << 40;
  return 0;
}
// Address space first, pages when they are written: a test may ask for more than there is.
EXPORT int cuMemAlloc_v2(unsigned long long* pointer, size_t bytes) {
  *pointer = 0;
  if (const int code = record("cuMemAlloc", bytes)) return code;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return 2;  // CUDA_ERROR_OUT_OF_MEMORY
  *pointer = reinterpret_cast<unsigned long long>(memory);
  allocations[*pointer] = bytes;
  return 0;
}
EXPORT int cuMemFree_v2(unsigned long long pointer) {
  if (!busy.empty()) ++busy_frees;
  munmap(reinterpret_cast<void*>(pointer), allocations.at(pointer));
  allocations.erase(pointer);
  return record("cuMemFree");
}
EXPORT int cuMemsetD8Async(unsigned long long pointer, unsigned char value, size_t bytes, void*) {
  // Dropped pages read as zeros.
  const bool whole = allocations.contains(pointer) && allocations.at(pointer) == bytes;
  if (value != 0 || !whole || madvise(reinterpret_cast<void*>(pointer), bytes, MADV_DONTNEED) != 0)
    std::memset(reinterpret_cast<void*>(pointer), value, bytes);
  return record("cuMemsetD8Async", bytes);
}
EXPORT int cuMemcpyHtoDAsync_v2(unsigned long long target, const void* source, size_t bytes,
                                void*) {
  std::memcpy(reinterpret_cast<void*>(target), source, bytes);
  return record("cuMemcpyHtoDAsync", bytes);
}
EXPORT int cuMemcpyDtoHAsync_v2(void* target, unsigned long long source, size_t bytes, void*) {
  std::memcpy(target, reinterpret_cast<void*>(source), bytes);
  return record("cuMemcpyDtoHAsync", bytes);
}
EXPORT int cuMemcpyAsync(unsigned long long target, unsigned long long source, size_t bytes,
                         void*) {
  const auto from = sealed.find(source);
  if (from != sealed.end()) mprotect(reinterpret_cast<void*>(source), from->second, PROT_READ);
  std::memcpy(reinterpret_cast<void*>(target), reinterpret_cast<void*>(source), bytes);
  if (from != sealed.end()) mprotect(reinterpret_cast<void*>(source), from->second, PROT_NONE);
  auto block = allocations.upper_bound(target);
  const bool to_device = block != allocations.begin() && target < (--block)->first + block->second;
  return record("cuMemcpyAsync", from != sealed.end() ? "device" : "host",
                to_device ? "device" : "host", bytes);
}
EXPORT int cuPointerGetAttribute(void* value, int attribute, unsigned long long pointer) {
  if (attribute != 2 || !sealed.contains(pointer)) return 1;  // CUDA_ERROR_INVALID_VALUE
  *static_cast<unsigned*>(value) = 2;                         // CU_MEMORYTYPE_DEVICE
  return 0;
}
EXPORT int cuMemcpyDtoDAsync_v2(unsigned long long target, unsigned long long source, size_t bytes,
                                void* stream) {
  run(stream, [=] {
    std::memcpy(reinterpret_cast<void*>(target), reinterpret_cast<void*>(source), bytes);
  });
  return record("cuMemcpyDtoDAsync", bytes);
}
EXPORT int cuStreamCreateWithPriority(void** stream, unsigned flags, int priority) {
  give(stream, next_handle++);
  return record("cuStreamCreateWithPriority", flags, priority);
}
EXPORT int cuStreamDestroy_v2(void*) { return record("cuStreamDestroy"); }
EXPORT int cuStreamSynchronize(void* stream) {
  for (Event* event : events) event->waited_for |= event->stream == stream;
  busy.erase(stream);
  const int code = record("cuStreamSynchronize");
  return captures.contains(stream) ? 900 : code;  // CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
}
EXPORT int cuEventCreate(void** event, unsigned) {
  *event = *events.insert(new Event).first;
  return record("cuEventCreate");
}
EXPORT int cuEventDestroy_v2(void* event) {
  if (events.erase(static_cast<Event*>(event)) == 0) return 400;  // CUDA_ERROR_INVALID_HANDLE
  delete static_cast<Event*>(event);
  return record("cuEventDestroy");
}
EXPORT int cuEventRecord(Event* event, void* stream) {
  event->stream = stream;
  event->waited_for = false;
  run(stream, [event] { event->ms = clock_ms; });
  return record("cuEventRecord");
}
EXPORT int cuEventSynchronize(Event* event) {
  event->waited_for = true;
  return record("cuEventSynchronize");
}
EXPORT int cuEventElapsedTime(float* ms, Event* first, Event* second) {
  if (first->ms < 0 || second->ms < 0) return 400;            // CUDA_ERROR_INVALID_HANDLE
  if (!first->waited_for || !second->waited_for) return 600;  // CUDA_ERROR_NOT_READY
  *ms = static_cast<float>(second->ms - first->ms);
  return record("cuEventElapsedTime");
}
EXPORT int cuModuleLoadData(void** module, const void* image) {
  give(module, next_handle);
  modules[next_handle++] = static_cast<const char*>(image);
  return record("cuModuleLoadData", static_cast<const char*>(image));
}
EXPORT int cuModuleUnload(void*) { return record("cuModuleUnload"); }
EXPORT int cuModuleGetFunction(void** function, void* module, const char* symbol) {
  give(function, next_handle);
  functions[next_handle++] = modules[reinterpret_cast<uintptr_t>(module)];
  return record("cuModuleGetFunction", symbol);
}
EXPORT int cuFuncSetAttribute(void* function, int attribute, int value) {
  return record("cuFuncSetAttribute", functions[reinterpret_cast<uintptr_t>(function)], attribute,
                value);
}
EXPORT int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                          unsigned by, unsigned bz, unsigned shared, void* stream,
                          void** parameters, void**) {
  const Launch launch(functions[reinterpret_cast<uintptr_t>(function)], gx, gy, gz, parameters);
  const int code =
      record("cuLaunchKernel", launch.name, gx, gy, gz, bx, by, bz, shared, "|" + launch.text());
  if (code == 0) run(stream, launch);
  return dead_captures.contains(stream) ? kCaptureInvalidated : code;
}
EXPORT int cuStreamBeginCapture_v2(void* stream, int mode) {
  const int code = record("cuStreamBeginCapture", mode);
  if (code == 0) captures[stream] = new Graph;
  return code;
}
EXPORT int cuStreamEndCapture(void* stream, void** graph) {
  *graph = captures.at(stream);
  captures.erase(stream);
  const int code = record("cuStreamEndCapture");
  if (dead_captures.erase(stream) == 0) return code;
  delete static_cast<Graph*>(*graph);
  *graph = nullptr;
  return kCaptureInvalidated;
}
EXPORT int cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
  *executable = new Graph(*static_cast<Graph*>(graph));
  return record("cuGraphInstantiate");
}
EXPORT int cuGraphLaunch(void* executable, void* stream) {
  busy.insert(stream);
  for (const auto& work : static_cast<Graph*>(executable)->work) work();
  return record("cuGraphLaunch");
}
EXPORT int cuGraphExecDestroy(void* executable) {
  delete static_cast<Graph*>(executable);
  return record("cuGraphExecDestroy");
}
EXPORT int cuGraphDestroy(void* graph) {
  delete static_cast<Graph*>(graph);
  return record("cuGraphDestroy");
}
EXPORT int cuGetErrorName(int code, const char** text) {
  *text = code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_FAKE";
  return 0;
}
EXPORT int cuGetErrorString(int, const char** text) {
  *text = "a failure that the test asked for";
  return 0;
}
