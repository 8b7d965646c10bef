// Errors as values. The library never throws and never aborts.
#pragma once

#include <optional>
#include <sstream>
#include <string>
#include <utility>

namespace fa::core {

enum class StatusCode : int {
  kOk = 0,
  kInvalidArgument = 1,  // the caller can mend it: a shape, a value, a name
  kUnsupported = 2,      // a right request that nothing here can serve
  kOutOfMemory = 3,
  kDeviceError = 4,
  kInternal = 5,
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

// A value, or the Status that says why there is none.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}          // NOLINT: implicit by design
  Result(Status status) : status_(std::move(status)) {}  // NOLINT: implicit by design

  bool ok() const { return value_.has_value(); }
  const Status& status() const { return status_; }
  const T& value() const { return *value_; }
  T& value() { return *value_; }

 private:
  std::optional<T> value_;
  Status status_;
};

// Joins its arguments as text: concat("q: head_dim is ", 7).
template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

template <class... Parts>
Status invalid_argument(const Parts&... parts) {
  return {StatusCode::kInvalidArgument, concat(parts...)};
}

template <class... Parts>
Status unsupported(const Parts&... parts) {
  return {StatusCode::kUnsupported, concat(parts...)};
}

// Returns early from a function whose result can be made from a Status.
#define FA_TRY(expression)                                              \
  do {                                                                  \
    if (::fa::core::Status fa_status = (expression); !fa_status.ok()) { \
      return fa_status;                                                 \
    }                                                                   \
  } while (false)

}  // namespace fa::core
