// A profiler that NVTX loads (NVTX_INJECTION64_PATH): keeps the ranges of the domain "liveact" as
// lines, "> text" where one begins and "<" where it ends.

#include <nvtx3/nvToolsExt.h>

#include <string>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

std::string ranges;
std::string other_domains;
int registered = 0;

nvtxDomainHandle_t create(const char* name) {
  if (std::string(name) != "liveact") other_domains += std::string(name) + "\n";
  return reinterpret_cast<nvtxDomainHandle_t>(new std::string(name));
}

nvtxStringHandle_t register_string(nvtxDomainHandle_t, const char* text) {
  ++registered;
  return reinterpret_cast<nvtxStringHandle_t>(new std::string(text));
}

int push(nvtxDomainHandle_t, const nvtxEventAttributes_t* event) {
  const bool known = event->messageType == NVTX_MESSAGE_TYPE_REGISTERED;
  ranges += "> " +
            (known ? *reinterpret_cast<const std::string*>(event->message.registered)
                   : std::string(event->message.ascii)) +
            "\n";
  return 0;
}

int pop(nvtxDomainHandle_t) {
  ranges += "<\n";
  return 0;
}

}  // namespace

EXPORT const char* fake_nvtx_ranges() { return ranges.c_str(); }
EXPORT const char* fake_nvtx_other_domains() { return other_domains.c_str(); }
EXPORT int fake_nvtx_registered() { return registered; }

EXPORT int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t get_table) {
  const auto* callbacks =
      static_cast<const NvtxExportTableCallbacks*>(get_table(NVTX_ETID_CALLBACKS));
  NvtxFunctionTable table = nullptr;
  unsigned size = 0;
  if (!callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size)) return 0;
  const auto set = [&](int id, auto* function) {
    *table[id] = reinterpret_cast<NvtxFunctionPointer>(function);
  };
  set(NVTX_CBID_CORE2_DomainCreateA, create);
  set(NVTX_CBID_CORE2_DomainRegisterStringA, register_string);
  set(NVTX_CBID_CORE2_DomainRangePushEx, push);
  set(NVTX_CBID_CORE2_DomainRangePop, pop);
  return 1;
}
