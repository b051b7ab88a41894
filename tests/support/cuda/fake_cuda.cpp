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

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "liveact/dtype.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// kernel name, addresses of the parameters, grid
using Hook = void (*)(const char*, void**, unsigned, unsigned, unsigned);

struct Graph {
  std::vector<std::function<void()>> work;
};

std::recursive_mutex mutex;
std::string log_text;
std::map<std::string, int> failures;          // call (and its first arguments) -> code, once
std::map<std::string, std::string> declared;  // kernel -> 'p', 'i' or 'f' per parameter
std::map<uintptr_t, std::string> modules;     // CUmodule -> image
std::map<uintptr_t, std::string> functions;   // CUfunction -> image of its module
uintptr_t next_handle = 0x1000;
std::map<unsigned long long, size_t> allocations;
std::map<unsigned long long, size_t> sealed;  // memory that only copies may read, as on a device
size_t free_memory = size_t{1} << 40;         // as cuMemGetInfo says; nothing is subtracted from it
std::map<void*, Graph*> captures;             // CUstream -> what is being captured
std::set<void*> dead_captures;                // CUstream whose capture was broken
std::set<void*> busy;                         // CUstream with work that nobody has waited for
long busy_frees = 0;
Hook hook = nullptr;
double clock_ms = 0;
constexpr double kKernelMs = 0.25;        // sums of it are exact
std::map<std::string, double> kernel_ms;  // of kernels that take another time
bool separate_residuals = false;          // cuBLASLt refuses a bias together with beta = 1
using Interruption = void (*)();
std::map<std::string, Interruption> interruptions;  // call (and its first arguments), once
// What the algorithms that the heuristic suggests take, in ms; see product_ms.
std::vector<double> algorithms = {0.0};

struct Event {
  double ms = -1;  // when the work before it was done; negative until then
  void* stream = nullptr;
  bool waited_for = false;
};
std::set<Event*> events;

constexpr int kCaptureInvalidated = 901;
constexpr int kNotSupported = 15;     // CUBLAS_STATUS_NOT_SUPPORTED
constexpr int kExecutionFailed = 13;  // CUBLAS_STATUS_EXECUTION_FAILED

// Everything on the device has come to its end, which no capture can.
void wait_for_device() {
  for (const auto& [stream, graph] : captures) dead_captures.insert(stream);
  busy.clear();
}

bool is_inside(const void* pointer, size_t bytes) {
  const auto start = reinterpret_cast<unsigned long long>(pointer);
  auto block = allocations.upper_bound(start);
  return block != allocations.begin() && start + bytes <= (--block)->first + block->second;
}

template <typename... Parts>
int record(const char* call, const Parts&... parts) {
  const std::lock_guard lock(mutex);
  std::ostringstream line;
  line << call;
  ((line << ' ' << parts), ...);
  log_text += line.str() + "\n";
  const std::string called = line.str() + ' ';
  const auto interruption =
      std::find_if(interruptions.begin(), interruptions.end(),
                   [&](const auto& entry) { return called.starts_with(entry.first + ' '); });
  if (interruption != interruptions.end()) {
    const Interruption interrupt = interruption->second;
    interruptions.erase(interruption);
    interrupt();
  }
  const auto failure = std::find_if(failures.begin(), failures.end(), [&](const auto& entry) {
    return called.starts_with(entry.first + ' ');
  });
  if (failure == failures.end()) return 0;
  const int code = failure->second;
  failures.erase(failure);
  return code;
}

template <typename T>
void give(T* target, uintptr_t handle) {
  std::memcpy(target, &handle, sizeof(handle));
}

// Now, or when the graph being captured is launched.
void run(void* stream, std::function<void()> work) {
  const auto found = captures.find(stream);
  if (found != captures.end()) {
    found->second->work.push_back(std::move(work));
  } else {
    busy.insert(stream);
    work();
  }
}

// The parameters of a launch, copied: the caller's go away.
struct Launch {
  std::string name;
  unsigned grid[3];
  std::vector<uint64_t> values;

  Launch(std::string kernel, unsigned x, unsigned y, unsigned z, void** parameters)
      : name(std::move(kernel)), grid{x, y, z} {
    for (const char type : declared[name]) {
      uint64_t value = 0;
      std::memcpy(&value, parameters[values.size()], type == 'p' ? 8 : 4);
      values.push_back(value);
    }
  }

  void operator()() {
    const auto known = kernel_ms.find(name);
    clock_ms += known == kernel_ms.end() ? kKernelMs : known->second;
    if (hook != nullptr) {
      std::vector<void*> addresses;
      for (uint64_t& value : values) addresses.push_back(&value);
      hook(name.c_str(), addresses.data(), grid[0], grid[1], grid[2]);
    } else if (name == "all_finite") {  // the one kernel whose result the runtime waits for
      *reinterpret_cast<int32_t*>(values.at(1)) = 1;
    }
  }

  std::string text() const {
    std::ostringstream line;
    const std::string& types = declared[name];
    for (size_t i = 0; i < values.size(); ++i) {
      float number = 0;
      std::memcpy(&number, &values[i], 4);
      line << ' ';
      if (types[i] == 'p') line << reinterpret_cast<void*>(values[i]);
      if (types[i] == 'i') line << static_cast<int32_t>(values[i]);
      if (types[i] == 'f') line << number;
    }
    return line.str();
  }
};

struct Layout {
  int type;
  int64_t rows, cols, ld;
};

struct Desc {
  std::map<int, int64_t> attributes;
  int64_t get(int attribute) const {
    const auto found = attributes.find(attribute);
    return found == attributes.end() ? 0 : found->second;
  }
};

float element(const void* data, int type, int64_t index) {
  using namespace liveact;
  if (type == 28) return f32_from_f8(static_cast<const uint8_t*>(data)[index]);
  if (type == 14) return f32_from_bf16(static_cast<const uint16_t*>(data)[index]);
  return static_cast<const float*>(data)[index];
}

// Another algorithm is the fastest for another N (the rows of the column-major output).
double product_ms(uint64_t algorithm, int64_t n) {
  return algorithms.at((algorithm + static_cast<uint64_t>(n) / 16) % algorithms.size());
}

// D = A^T B in column-major with the scales, bias and beta of the descriptor.
void matmul(const Desc& desc, const void* a, const Layout& la, const void* b, const Layout& lb,
            float beta, void* d, const Layout& ld) {
  const auto* a_scale = reinterpret_cast<const float*>(desc.get(17));
  const auto* b_scale = reinterpret_cast<const float*>(desc.get(18));
  const auto* bias = desc.get(7) == 4 ? reinterpret_cast<const void*>(desc.get(8)) : nullptr;
  std::vector<float> left(la.rows * la.cols);
  std::vector<float> right(lb.rows * lb.cols);
  for (int64_t i = 0; i < la.cols; ++i) {
    for (int64_t k = 0; k < la.rows; ++k)
      left[i * la.rows + k] = element(a, la.type, i * la.ld + k);
  }
  for (int64_t j = 0; j < lb.cols; ++j) {
    for (int64_t k = 0; k < lb.rows; ++k)
      right[j * lb.rows + k] = element(b, lb.type, j * lb.ld + k);
  }
  for (int64_t j = 0; j < ld.cols; ++j) {
    for (int64_t i = 0; i < ld.rows; ++i) {
      float sum = 0;
      for (int64_t k = 0; k < la.rows; ++k) sum += left[i * la.rows + k] * right[j * lb.rows + k];
      if (la.type == 28) sum *= a_scale[i] * b_scale[j];
      if (bias != nullptr) sum += element(bias, static_cast<int>(desc.get(26)), i);
      const int64_t at = j * ld.ld + i;
      if (beta != 0) sum += beta * element(d, ld.type, at);
      if (ld.type == 14) {
        static_cast<uint16_t*>(d)[at] = liveact::bf16_from_f32(sum);
      } else {
        static_cast<float*>(d)[at] = sum;
      }
    }
  }
}

}  // namespace

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

// libcublasLt.
EXPORT size_t cublasLtGetVersion() { return 130000; }
EXPORT const char* cublasLtGetStatusString(int) { return "a failure that the test asked for"; }
EXPORT int cublasLtCreate(void** handle) {
  give(handle, next_handle++);
  return record("cublasLtCreate");
}
EXPORT int cublasLtDestroy(void*) {
  wait_for_device();
  return record("cublasLtDestroy");
}
EXPORT int cublasLtMatmulDescCreate(Desc** desc, int compute, int scale) {
  *desc = new Desc;
  return record("cublasLtMatmulDescCreate", compute, scale);
}
EXPORT int cublasLtMatmulDescDestroy(Desc* desc) {
  delete desc;
  return record("cublasLtMatmulDescDestroy");
}
EXPORT int cublasLtMatmulDescSetAttribute(Desc* desc, int attribute, const void* value,
                                          size_t bytes) {
  int64_t number = 0;
  std::memcpy(&number, value, bytes);
  desc->attributes[attribute] = number;
  return record("cublasLtMatmulDescSetAttribute", attribute,
                bytes <= 4 ? std::to_string(number) : "pointer");
}
EXPORT int cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t cols,
                                      int64_t ld) {
  *layout = new Layout{type, static_cast<int64_t>(rows), static_cast<int64_t>(cols), ld};
  return record("cublasLtMatrixLayoutCreate", type, rows, cols, ld);
}
EXPORT int cublasLtMatrixLayoutDestroy(Layout* layout) {
  delete layout;
  return record("cublasLtMatrixLayoutDestroy");
}
EXPORT int cublasLtMatmulPreferenceCreate(void** preference) {
  give(preference, next_handle++);
  return record("cublasLtMatmulPreferenceCreate");
}
EXPORT int cublasLtMatmulPreferenceDestroy(void*) {
  return record("cublasLtMatmulPreferenceDestroy");
}
EXPORT int cublasLtMatmulPreferenceSetAttribute(void*, int attribute, const void*, size_t) {
  return record("cublasLtMatmulPreferenceSetAttribute", attribute);
}
EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, Desc* desc, void*, void*, void*, void*, void*,
                                          int at_most, uint64_t* results, int* found) {
  constexpr int kResultWords = 12;  // 96 bytes, the algorithm first
  constexpr int kInvalidValue = 7;
  // "The scaling mode for A scale (OUTER_VEC_32F) requires a custom pointer for A scale"
  for (const auto& [mode, pointer] : {std::pair(31, 17), std::pair(32, 18)}) {
    if (desc->get(mode) != 0 && desc->get(pointer) == 0) return kInvalidValue;
  }
  *found = std::min(at_most, static_cast<int>(algorithms.size()));
  std::fill_n(results, kResultWords * *found, 0);
  for (int i = 0; i < *found; ++i) results[kResultWords * i] = i;
  return record("cublasLtMatmulAlgoGetHeuristic", at_most);
}
EXPORT int cublasLtMatmul(void*, Desc* desc, const void* alpha, const void* a, Layout* la,
                          const void* b, Layout* lb, const void* beta_pointer, const void*, Layout*,
                          void* d, Layout* ld, const uint64_t* algorithm, void*, size_t,
                          void* stream) {
  const float beta = *static_cast<const float*>(beta_pointer);
  const int code = record("cublasLtMatmul", *static_cast<const float*>(alpha), beta, '|', ld->cols,
                          ld->rows, la->rows, *algorithm);
  if (code != 0) return code;
  if (separate_residuals && beta != 0 && desc->get(7) == 4 && la->type == 28) return kNotSupported;
  const size_t element_bytes = ld->type == 14 ? 2 : 4;
  if (!is_inside(d, ld->ld * ld->cols * element_bytes)) return kExecutionFailed;
  run(stream, [=, attributes = *desc, la = *la, lb = *lb, ld = *ld, algorithm = *algorithm] {
    clock_ms += product_ms(algorithm, ld.rows);
    matmul(attributes, a, la, b, lb, beta, d, ld);
  });
  return 0;
}
