// What FLASH_ATTENTION_CHECK asks for: the lengths, rows and page numbers of a call whose tensors
// lie on a device, copied to the host, where they can be checked. Waits for the device.
#pragma once

#include <cstdint>
#include <vector>

#include "core/attention_args.h"
#include "core/status.h"

namespace fa::cuda {

class HostValues {
 public:
  // Makes `args` what the checks may read: its int32 tensors lie on the host, while this lives.
  // `args` has been validated but for its values. Refused while the stream is being captured.
  core::Status read(core::AttentionArgs& args, void* stream);

 private:
  std::vector<std::vector<int32_t>> values_;
};

}  // namespace fa::cuda
