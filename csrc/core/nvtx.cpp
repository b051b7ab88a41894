#include "core/nvtx.h"

#include <nvtx3/nvToolsExt.h>

namespace liveact {

namespace {

nvtxDomainHandle_t domain() {
  static const nvtxDomainHandle_t handle = nvtxDomainCreateA("liveact");
  return handle;  // null when no profiler listens, which NVTX finds out once per process
}

void push(nvtxMessageType_t type, nvtxMessageValue_t message) {
  nvtxEventAttributes_t attributes = {};
  attributes.version = NVTX_VERSION;
  attributes.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
  attributes.messageType = type;
  attributes.message = message;
  nvtxDomainRangePushEx(domain(), &attributes);
}

}  // namespace

RangeName::RangeName(const std::string& text) {
  if (domain() != nullptr) handle_ = nvtxDomainRegisterStringA(domain(), text.c_str());
}

Range::Range(const RangeName& name) {
  if (domain() == nullptr) return;
  push(NVTX_MESSAGE_TYPE_REGISTERED, {.registered = static_cast<nvtxStringHandle_t>(name.handle_)});
}

Range::Range(const char* name, int64_t number) {
  if (domain() == nullptr) return;
  const std::string text = std::string(name) + " " + std::to_string(number);
  push(NVTX_MESSAGE_TYPE_ASCII, {.ascii = text.c_str()});
}

Range::~Range() {
  if (domain() != nullptr) nvtxDomainRangePop(domain());
}

}  // namespace liveact
