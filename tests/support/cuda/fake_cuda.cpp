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
EXPORT void fake_fail_after(long calls, int code) {
  calls_left = calls;
  late_event = [=] { return code; };
}
EXPORT void fake_interrupt_after(long calls, Interruption action) {
  calls_left = calls;
  late_event = [=] { return action(), 0; };
}
// The device of that call, or of that piece of work, is lost.
EXPORT void fake_lose_after(long calls) {
  calls_left = calls;
  late_event = [] {
    if (contexts.empty()) return kLaunchFailed;
    lose(current_device());
    return 0;
  };
}
EXPORT void fake_lose_after_work(long pieces) { work_left = pieces; }
// All devices work again, and no event is to come.
EXPORT void fake_recover() {
  calls_left = work_left = -1;
  lost.clear();
}
EXPORT void fake_multiplies(int on) { multiplies = on != 0; }
// Log and trace are left out; instead there are digests of the calls from now on.
EXPORT void fake_brief(int on) {
  brief = on != 0;
  digests.clear();
  first_allocation = all_allocations;
}
EXPORT long fake_calls() { return static_cast<long>(digests.size()); }
EXPORT const char* fake_call(long call) { return digests.at(call).first; }
EXPORT size_t fake_digest(long call) { return digests.at(call).second; }
EXPORT long fake_hung() { return hung; }
// What was made and is not destroyed: "stream 2", a line each.
EXPORT const char* fake_live() {
  static std::string text;
  text.clear();
  for (const auto& [kind, count] : live) text += kind + " " + std::to_string(count) + "\n";
  return text.c_str();
}
EXPORT void fake_declare(const char* kernel, const char* types) { declared[kernel] = types; }
EXPORT void fake_algorithms(const double* ms, int count) { algorithms.assign(ms, ms + count); }
EXPORT void fake_kernel_ms(const char* kernel, double ms) { kernel_ms[kernel] = ms; }
EXPORT void fake_separate_residuals(int separate) { separate_residuals = separate != 0; }
EXPORT void fake_interrupt(const char* call, Interruption action) { interruptions[call] = action; }
EXPORT long fake_busy_frees() { return busy_frees; }
EXPORT void fake_hook(Hook new_hook) { hook = new_hook; }
EXPORT long fake_live_allocations() { return live["memory"]; }
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
// From now on work only runs while somebody waits, in an order that is drawn; 0: at once again.
EXPORT void fake_interleave(unsigned seed) {
  if (seed == 0) {
    drawing.reset();
    while (progress()) {
    }
  } else {
    drawing.emplace(seed);
  }
}
EXPORT void fake_link(int access, int atomics) {
  peer_access = access;
  peer_atomics = atomics;
}
EXPORT void fake_name(int device, const char* name) { device_names.at(device) = name; }
// What ran since the last call, a line each: device, kernel, homes of its parameters.
EXPORT const char* fake_trace() {
  static std::string text;
  text.clear();
  for (const std::string& line : trace) text += line + "\n";
  trace.clear();
  return text.c_str();
}
// Pieces of work that have not run.
EXPORT long fake_waiting() {
  long count = 0;
  for (const auto& [stream, queue] : queues) count += static_cast<long>(queue.size());
  return count;
}
EXPORT const char* fake_fault() { return fault.c_str(); }
EXPORT void fake_free_memory(size_t bytes) { free_memory = bytes; }
EXPORT long fake_live_events() { return live["event"]; }

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
EXPORT int cuDeviceGetName(char* name, int n, int device) {
  std::strncpy(name, device_names.at(device).c_str(), n);
  return record("cuDeviceGetName", device);
}
EXPORT int cuDeviceCanAccessPeer(int* able, int device, int peer) {
  *able = device != peer && peer_access != 0;
  return record("cuDeviceCanAccessPeer", device, peer);
}
EXPORT int cuDeviceGetP2PAttribute(int* value, int attribute, int device, int peer) {
  *value = attribute == 3 && peer_atomics != 0;
  return record("cuDeviceGetP2PAttribute", attribute, device, peer);
}
EXPORT int cuCtxEnablePeerAccess(void* peer, unsigned) {
  const int other = static_cast<int>(reinterpret_cast<uintptr_t>(peer)) - 0xc0;
  const int code = record("cuCtxEnablePeerAccess", current_device(), other);
  if (code != 0) return code;
  return peers.insert({current_device(), other}).second ? 0 : 704;  // …PEER_ACCESS_ALREADY_ENABLED
}
EXPORT int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 97 ? 232448 : 132;
  return record("cuDeviceGetAttribute", attribute);
}
EXPORT int cuDevicePrimaryCtxRetain(void** context, int device) {
  if (const int code = record("cuDevicePrimaryCtxRetain", device)) return code;
  give(context, 0xc0 + device);
  ++live["context"];
  return 0;
}
EXPORT int cuDevicePrimaryCtxRelease_v2(int device) {
  --live["context"];
  return record("cuDevicePrimaryCtxRelease", device);
}
EXPORT int cuCtxPushCurrent_v2(void* context) {
  const std::lock_guard lock(mutex);
  const int device = static_cast<int>(reinterpret_cast<uintptr_t>(context)) - 0xc0;
  if (lost.contains(device)) return kLaunchFailed;
  contexts.push_back(device);
  return 0;
}
EXPORT int cuCtxPopCurrent_v2(void** context) {
  *context = nullptr;
  if (contexts.empty()) return 201;  // CUDA_ERROR_INVALID_CONTEXT
  contexts.pop_back();
  return 0;
}
EXPORT int cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
  *free_bytes = free_memory;
  *total = size_t{1} << 40;
  return record("cuMemGetInfo");
}
// Address space first, pages when they are written: a test may ask for more than there is.
EXPORT int cuMemAlloc_v2(unsigned long long* pointer, size_t bytes) {
  const std::lock_guard lock(mutex);
  *pointer = 0;
  if (const int code = record("cuMemAlloc", bytes)) return code;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return 2;  // CUDA_ERROR_OUT_OF_MEMORY
  *pointer = reinterpret_cast<unsigned long long>(memory);
  allocations[*pointer] = bytes;
  homes[*pointer] = current_device();
  births[*pointer] = all_allocations++;
  ++live["memory"];
  return 0;
}
EXPORT int cuMemFree_v2(unsigned long long pointer) {
  const std::lock_guard lock(mutex);
  if (!busy.empty()) ++busy_frees;
  munmap(reinterpret_cast<void*>(pointer), allocations.at(pointer));
  allocations.erase(pointer);
  --live["memory"];
  return record("cuMemFree");
}
EXPORT int cuMemsetD8Async(unsigned long long pointer, unsigned char value, size_t bytes, void*) {
  const std::lock_guard lock(mutex);
  if (const int code = record("cuMemsetD8Async", bytes)) return code;
  // Dropped pages read as zeros.
  const bool whole = allocations.contains(pointer) && allocations.at(pointer) == bytes;
  if (value != 0 || !whole || madvise(reinterpret_cast<void*>(pointer), bytes, MADV_DONTNEED) != 0)
    std::memset(reinterpret_cast<void*>(pointer), value, bytes);
  return 0;
}
// On the queue, but not in a graph: what is copied there would be gone when it is launched.
EXPORT int cuMemcpyHtoDAsync_v2(unsigned long long target, const void* source, size_t bytes,
                                void* stream) {
  if (const int code = record("cuMemcpyHtoDAsync", bytes)) return code;
  const auto copy = [=] { std::memcpy(reinterpret_cast<void*>(target), source, bytes); };
  captures.contains(stream) ? copy() : run(stream, {copy});
  return 0;
}
EXPORT int cuMemcpyDtoHAsync_v2(void* target, unsigned long long source, size_t bytes,
                                void* stream) {
  if (const int code = record("cuMemcpyDtoHAsync", bytes)) return code;
  const auto copy = [=] { std::memcpy(target, reinterpret_cast<void*>(source), bytes); };
  captures.contains(stream) ? copy() : run(stream, {copy});
  return 0;
}
EXPORT int cuMemcpyAsync(unsigned long long target, unsigned long long source, size_t bytes,
                         void*) {
  const std::lock_guard lock(mutex);
  const auto from = sealed.find(source);
  const bool to_device = home_of(target) >= 0;
  const int code = record("cuMemcpyAsync", from != sealed.end() ? "device" : "host",
                          to_device ? "device" : "host", bytes);
  if (code != 0) return code;
  if (from != sealed.end()) mprotect(reinterpret_cast<void*>(source), from->second, PROT_READ);
  std::memcpy(reinterpret_cast<void*>(target), reinterpret_cast<void*>(source), bytes);
  if (from != sealed.end()) mprotect(reinterpret_cast<void*>(source), from->second, PROT_NONE);
  return 0;
}
EXPORT int cuPointerGetAttribute(void* value, int attribute, unsigned long long pointer) {
  if (attribute != 2 || !sealed.contains(pointer)) return 1;  // CUDA_ERROR_INVALID_VALUE
  *static_cast<unsigned*>(value) = 2;                         // CU_MEMORYTYPE_DEVICE
  return 0;
}
EXPORT int cuMemcpyDtoDAsync_v2(unsigned long long target, unsigned long long source, size_t bytes,
                                void* stream) {
  if (const int code = record("cuMemcpyDtoDAsync", bytes)) return code;
  run(stream, {[=] {
        std::memcpy(reinterpret_cast<void*>(target), reinterpret_cast<void*>(source), bytes);
      }});
  return 0;
}
EXPORT int cuStreamCreateWithPriority(void** stream, unsigned flags, int priority) {
  const std::lock_guard lock(mutex);
  if (const int code = record("cuStreamCreateWithPriority", flags, priority)) return code;
  give(stream, next_handle++);
  stream_devices[*stream] = current_device();
  ++live["stream"];
  return 0;
}
EXPORT int cuStreamDestroy_v2(void* stream) {
  const std::lock_guard lock(mutex);
  drain(stream);
  queues.erase(stream);
  --live["stream"];
  return record("cuStreamDestroy");
}
// Some work runs from one query to the next. Who asks again and again while nothing can run would
// do so for ever; once is no wait, as another queue may know more.
EXPORT int cuStreamQuery(void* stream) {
  const std::lock_guard lock(mutex);
  if (const int code = record("cuStreamQuery")) return code;
  for (auto pieces = drawing ? (*drawing)() % 32 : 0; !is_idle(stream); --pieces) {
    if (!progress()) {
      if (++fruitless_queries < kPatience) return 600;
      fruitless_queries = 0;
      return ++hung, kNothingCanRun;
    }
    if (pieces == 0) return 600;  // CUDA_ERROR_NOT_READY
  }
  busy.erase(stream);
  return 0;
}
// Where it fails, what was to be waited for is over.
EXPORT int cuStreamSynchronize(void* stream) {
  const std::lock_guard lock(mutex);
  if (const int code = captures.contains(stream) ? 0 : drain(stream)) {
    record("cuStreamSynchronize");
    return code;
  }
  for (Event* event : events) event->waited_for |= event->stream == stream;
  busy.erase(stream);
  const int code = record("cuStreamSynchronize");
  return captures.contains(stream) ? 900 : code;  // CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
}
EXPORT int cuEventCreate(void** event, unsigned) {
  const std::lock_guard lock(mutex);
  if (const int code = record("cuEventCreate")) return code;
  *event = *events.insert(new Event).first;
  ++live["event"];
  return 0;
}
EXPORT int cuEventDestroy_v2(void* event) {
  const std::lock_guard lock(mutex);
  if (events.erase(static_cast<Event*>(event)) == 0) return 400;  // CUDA_ERROR_INVALID_HANDLE
  delete static_cast<Event*>(event);
  --live["event"];
  return record("cuEventDestroy");
}
EXPORT int cuEventRecord(Event* event, void* stream) {
  if (const int code = record("cuEventRecord")) return code;
  event->stream = stream;
  event->waited_for = false;
  run(stream, {[event] { event->ms = clock_ms; }});
  return 0;
}
EXPORT int cuEventSynchronize(Event* event) {
  event->waited_for = true;
  return record("cuEventSynchronize");
}
EXPORT int cuEventElapsedTime(float* ms, Event* first, Event* second) {
  if (const int code = record("cuEventElapsedTime")) return code;
  if (first->ms < 0 || second->ms < 0) return 400;            // CUDA_ERROR_INVALID_HANDLE
  if (!first->waited_for || !second->waited_for) return 600;  // CUDA_ERROR_NOT_READY
  *ms = static_cast<float>(second->ms - first->ms);
  return 0;
}
EXPORT int cuModuleLoadData(void** module, const void* image) {
  const std::lock_guard lock(mutex);
  if (const int code = record("cuModuleLoadData", static_cast<const char*>(image))) return code;
  give(module, next_handle);
  modules[next_handle++] = static_cast<const char*>(image);
  ++live["module"];
  return 0;
}
EXPORT int cuModuleUnload(void*) {
  --live["module"];
  return record("cuModuleUnload");
}
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
  const std::lock_guard lock(mutex);
  const Launch launch(functions[reinterpret_cast<uintptr_t>(function)], gx, gy, gz, parameters);
  const int code = record("cuLaunchKernel", launch.name, gx, gy, gz, bx, by, bz, shared, launch);
  const auto device = stream_devices.find(stream);
  for (size_t i = 0; device != stream_devices.end() && i < launch.values.size(); ++i) {
    const bool pointer = declared[launch.name][i] == 'p';
    if (pointer && !is_reachable(device->second, launch.values[i]) && fault.empty()) {
      fault = launch.homes_text() + " on device " + std::to_string(device->second);
    }
  }
  if (code == 0) {
    run(stream, {launch, brief ? "" : launch.homes_text(), [=] { return launch.is_ready(); }});
  }
  return dead_captures.contains(stream) ? kCaptureInvalidated : code;
}
EXPORT int cuStreamBeginCapture_v2(void* stream, int mode) {
  if (const int code = record("cuStreamBeginCapture", mode)) return code;
  captures[stream] = new Graph;
  ++live["graph"];
  return 0;
}
// Where it fails there is no graph, but the capture is over.
EXPORT int cuStreamEndCapture(void* stream, void** graph) {
  const std::lock_guard lock(mutex);
  const auto found = captures.find(stream);
  if (found == captures.end()) return 1;  // CUDA_ERROR_INVALID_VALUE
  *graph = found->second;
  captures.erase(found);
  int code = record("cuStreamEndCapture");
  if (dead_captures.erase(stream) != 0) code = kCaptureInvalidated;
  if (code == 0) return 0;
  delete static_cast<Graph*>(*graph);
  --live["graph"];
  *graph = nullptr;
  return code;
}
EXPORT int cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
  if (const int code = record("cuGraphInstantiate")) return code;
  *executable = new Graph(*static_cast<Graph*>(graph));
  ++live["executable graph"];
  return 0;
}
EXPORT int cuGraphLaunch(void* executable, void* stream) {
  const int code = record("cuGraphLaunch", stream_devices[stream]);
  if (code != 0) return code;
  for (const Work& work : static_cast<Graph*>(executable)->work) run(stream, work);
  return 0;
}
EXPORT int cuGraphExecDestroy(void* executable) {
  delete static_cast<Graph*>(executable);
  --live["executable graph"];
  return record("cuGraphExecDestroy");
}
EXPORT int cuGraphDestroy(void* graph) {
  delete static_cast<Graph*>(graph);
  --live["graph"];
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
