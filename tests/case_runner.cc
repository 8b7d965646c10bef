#include "tests/case_runner.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <string_view>

#include "tests/cpp/testing.h"

namespace fa::cases {
namespace {

using core::DataType;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// Both halves are in use, so that a backend that drops one of them is found out.
constexpr uint64_t kDropoutSeed = 0x1234567890ABCDEF;
constexpr uint64_t kDropoutOffset = 0x0000000300000005;

// Below it fp16 rounds by absolute, no longer by relative, steps.
double smallest_normal(DataType dtype) {
  return dtype == DataType::kFloat16 ? std::exp2(-14) : std::numeric_limits<float>::min();
}

// |actual - expected| / scale; where the scale is 0 the two must be equal.
double normalised_error(double actual, double expected, double scale, double floor) {
  if (!std::isfinite(actual)) return kInfinity;
  if (scale == 0.0) return actual == expected ? 0.0 : kInfinity;
  return std::abs(actual - expected) / std::max(scale, floor);
}

// How large a case's scores become, in those of a usual case.
double score_size(const Case& c) {
  constexpr double kUsualScore = 16.0;  // about the largest |sum_d q_d k_d| D^-1/2, signs aside
  const double scale_gain =
      c.softmax_scale ? *c.softmax_scale * std::sqrt(static_cast<double>(c.head_dim)) : 1.0;
  const int64_t last_batch = c.alibi == Alibi::kPerBatchAndHead ? c.sequences() - 1 : 0;
  const double alibi =
      c.alibi == Alibi::kNone
          ? 0.0
          : alibi_slope(c, last_batch, 0) * static_cast<double>(std::max(c.max_q(), c.max_k()));
  return c.q_gain * scale_gain + alibi / kUsualScore;
}

double lse_error(double actual, double expected) {
  if (std::isnan(actual)) return kInfinity;
  if (std::isinf(expected) || std::isinf(actual)) return actual == expected ? 0.0 : kInfinity;
  return std::abs(actual - expected) / std::max(1.0, std::abs(expected));
}

fa_tensor fp64_result(std::vector<double>& values, const HostTensor& like) {
  values.assign(static_cast<size_t>(like.num_elements()), 0.0);
  fa_tensor tensor{};
  tensor.data = values.data();
  tensor.device_type = FA_CPU;
  tensor.ndim = static_cast<int32_t>(like.shape().size());
  tensor.dtype_code = FA_FLOAT;
  tensor.dtype_bits = 64;
  tensor.dtype_lanes = 1;
  tensor.shape = like.shape().data();
  return tensor;
}

// Writes " field=value" where a field is not what a default Case has.
class Describer {
 public:
  template <class T>
  void field(const char* name, const T& value, const T& usual) {
    if (value != usual) text_ << ' ' << name << '=' << value;
  }
  void lengths(const char* name, const Lengths& lengths) {
    if (!lengths.given()) return;
    text_ << ' ' << name << "={";
    for (int i = 0; i < lengths.count; ++i) {
      text_ << (i == 0 ? "" : ", ") << lengths.at[static_cast<size_t>(i)];
    }
    text_ << '}';
  }
  std::string text() const { return text_.str(); }

 private:
  std::ostringstream text_;
};

template <size_t kCount, class Enum>
const char* word(const char* const (&words)[kCount], Enum value) {
  return words[static_cast<size_t>(value)];
}

void describe_options(const Case& c, Describer& d) {
  constexpr const char* kAlibi[] = {"", "[H]", "[B, H]"};
  constexpr const char* kBias[] = {
      "", "[B, H, Sq, Sk]", "[1, 1, 1, Sk]", "[B, 1, Sq, Sk]", "[H, Sq, Sk]", "expanded"};
  constexpr const char* kBiasType[] = {"", "float32", "bool"};
  constexpr const char* kSink[] = {"", "q's dtype", "float32"};
  constexpr const char* kStorage[] = {"", "heads major", "padded rows", "packed qkv"};
  const std::string none;
  d.field("causal", c.causal, false);
  d.field("window_left", c.window_left, int64_t{-1});
  d.field("window_right", c.window_right, int64_t{-1});
  d.field("softcap", c.softcap, 0.0);
  if (c.softmax_scale) d.field("softmax_scale", *c.softmax_scale, -1.0);
  d.field("alibi", std::string{word(kAlibi, c.alibi)}, none);
  d.field("attn_bias", std::string{word(kBias, c.bias)}, none);
  if (c.bias != Bias::kNone) {
    d.field("bias_type", std::string{word(kBiasType, c.bias_type)}, none);
    d.field("bias_with_infinities", c.bias_with_infinities, false);
  }
  d.field("sink", std::string{word(kSink, c.sink)}, none);
  d.field("dropout_p", c.dropout_p, 0.0);
  d.field("s_dmask", c.s_dmask, false);
  d.field("storage", std::string{word(kStorage, c.storage)}, none);
  d.field("q_gain", c.q_gain, 1.0);
}

}  // namespace

double out_bound(const Case& c, DataType dtype) {
  if (dtype != DataType::kFloat32) return 2.0 * testing::unit_roundoff(dtype);
  return kFloat32OutBound * std::max(1.0, score_size(c));
}

std::string Outcome::fault(const Case& c, DataType dtype) const {
  std::ostringstream text;
  if (status != FA_OK) text << "failed: " << message << "; ";
  const auto check = [&](const char* what, double error, double bound) {
    if (error <= bound) return;  // no NaN is
    text << what << " is off by " << error << ", bound " << bound << "; ";
  };
  check("out", out_error, out_bound(c, dtype));
  check("lse", lse_error, kLseBound);
  check("s_dmask", s_dmask_error, out_bound(c, dtype));
  if (!outputs_contained) text << "memory around an output was written; ";
  if (!inputs_untouched) text << "an input was written; ";
  std::string result = text.str();
  if (!result.empty()) result.resize(result.size() - 2);
  return result;
}

PreparedCase::PreparedCase(const Case& c, DataType dtype)
    : case_(c), dtype_(dtype), tensors_(c, dtype) {
  set_args();
}

void PreparedCase::set_args() {
  fa_attention_args_init(&args_);
  CaseTensors& t = tensors_;
  args_.q = t.q.c_tensor();
  args_.k = t.k.c_tensor();
  args_.v = t.v.c_tensor();
  args_.out = t.out.c_tensor();
  args_.lse = t.lse.c_tensor();
  args_.s_dmask = t.s_dmask.c_tensor();
  args_.cu_seqlens_q = t.cu_seqlens_q.c_tensor();
  args_.cu_seqlens_k = t.cu_seqlens_k.c_tensor();
  args_.seqused_k = t.seqused_k.c_tensor();
  args_.block_table = t.block_table.c_tensor();
  args_.alibi_slopes = t.alibi_slopes.c_tensor();
  args_.attn_bias = t.attn_bias.c_tensor();
  args_.learnable_sink = t.learnable_sink.c_tensor();
  args_.max_seqlen_q = case_.varlen() ? case_.max_q() : 0;
  args_.max_seqlen_k = case_.varlen() ? case_.max_k() : 0;
  args_.softmax_scale = case_.softmax_scale ? &*case_.softmax_scale : nullptr;
  args_.causal = case_.causal ? 1 : 0;
  args_.window_size_left = case_.window_left;
  args_.window_size_right = case_.window_right;
  args_.softcap = case_.softcap;
  args_.dropout_p = case_.dropout_p;
  args_.dropout_seed = kDropoutSeed + case_.seed;
  args_.dropout_offset = kDropoutOffset;
}

void PreparedCase::prepare_oracle() {
  if (has_oracle_) return;
  has_oracle_ = true;
  for (HostTensor* input : tensors_.inputs()) {
    input_hashes_.push_back(input->present() ? input->hash() : 0);
  }
  const fa_tensor out = fp64_result(out_, tensors_.out);
  const fa_tensor lse = fp64_result(lse_, tensors_.lse);
  const fa_tensor bound = fp64_result(bound_, tensors_.out);
  oracle_.status = fa_forward_oracle(&args_, &out, &lse, &bound);
  if (oracle_.status != FA_OK) {
    oracle_.message = std::string{"the oracle: "} + fa_last_error_message();
    oracle_.status = FA_INTERNAL;  // never a mere refusal
  }
}

Outcome PreparedCase::run(const char* backend) {
  prepare_oracle();
  if (oracle_.status != FA_OK) return oracle_;
  const std::vector<double> s_dmask = reference_s_dmask();
  for (HostTensor* output : tensors_.outputs()) {
    if (output->present()) output->poison();
  }
  args_.backend = backend;
  Outcome outcome;
  outcome.status = fa_forward(&args_);
  if (outcome.status != FA_OK) {
    outcome.message = fa_last_error_message();
  } else {
    outcome.implementation = chosen_implementation(args_);
    compare(outcome);
    outcome.s_dmask_error = s_dmask_error(s_dmask);
  }
  args_.backend = nullptr;
  check_memory(outcome);
  return outcome;
}

void PreparedCase::compare(Outcome& outcome) {
  const HostTensor& out = tensors_.out;
  const double floor = smallest_normal(dtype_);
  for (int64_t index = 0; index < out.num_elements(); ++index) {
    const auto at = static_cast<size_t>(index);
    outcome.out_error = std::max(outcome.out_error, normalised_error(out.get(out.offset_of(index)),
                                                                     out_[at], bound_[at], floor));
  }
  const HostTensor& lse = tensors_.lse;
  for (int64_t index = 0; index < lse.num_elements(); ++index) {
    outcome.lse_error =
        std::max(outcome.lse_error, lse_error(lse.get(index), lse_[static_cast<size_t>(index)]));
  }
}

void PreparedCase::check_memory(Outcome& outcome) {
  for (HostTensor* output : tensors_.outputs()) {
    if (output->present() && !output->only_elements_written()) outcome.outputs_contained = false;
  }
  const std::vector<HostTensor*> inputs = tensors_.inputs();
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (inputs[i]->present() && inputs[i]->hash() != input_hashes_[i]) {
      outcome.inputs_untouched = false;
    }
  }
}

// The part of s_dmask that belongs to queries and keys; empty where the case asks for none.
std::vector<double> PreparedCase::reference_s_dmask() {
  HostTensor& s_dmask = tensors_.s_dmask;
  if (!s_dmask.present()) return {};
  args_.backend = "reference";
  std::vector<double> values;
  if (fa_forward(&args_) == FA_OK) {
    for (int64_t index = 0; index < s_dmask.num_elements(); ++index) {
      values.push_back(s_dmask.get(index));
    }
  }
  return values;
}

// Absolute, since its values lie in [-1, 1]; the signs must agree however small a value is.
double PreparedCase::s_dmask_error(const std::vector<double>& expected) {
  const HostTensor& s_dmask = tensors_.s_dmask;
  if (!s_dmask.present()) return 0.0;
  if (expected.empty()) return kInfinity;
  const int64_t rows = s_dmask.shape()[2], columns = s_dmask.shape()[3];
  double worst = 0.0;
  for (int64_t index = 0; index < s_dmask.num_elements(); ++index) {
    const int64_t j = index % columns, i = index / columns % rows;
    if (i >= case_.max_q() || j >= case_.max_k()) continue;
    const double actual = s_dmask.get(index), wanted = expected[static_cast<size_t>(index)];
    const bool same =
        std::isfinite(actual) && (wanted == 0.0 || std::signbit(actual) == std::signbit(wanted));
    worst = std::max(worst, same ? std::abs(actual - wanted) : kInfinity);
  }
  return worst;
}

std::string label(const Case& c) {
  std::string text = c.name;
  if (text == "random") text += "_" + std::to_string(c.seed);
  return text;
}

std::string describe(const Case& c) {
  const Case usual;
  Describer d;
  if (c.varlen()) {
    d.lengths("lengths_q", c.lengths_q);
    d.lengths("lengths_k", c.lengths_k);
    d.lengths("seqused_k", c.seqused_k);
    d.field("max_seqlen_slack", c.max_seqlen_slack, int64_t{0});
    d.field("page_size", c.page_size, int64_t{0});
  } else {
    d.field("batch", c.batch, int64_t{-1});
    d.field("seqlen_q", c.seqlen_q, int64_t{-1});
    d.field("seqlen_k", c.seqlen_k, int64_t{-1});
  }
  d.field("num_heads", c.num_heads, int64_t{-1});
  d.field("num_heads_kv", c.heads_kv(), c.num_heads);
  d.field("head_dim", c.head_dim, int64_t{-1});
  d.field("head_dim_v", c.dim_v(), c.head_dim);
  describe_options(c, d);
  return label(c) + ":" + d.text();
}

std::string chosen_implementation(const fa_attention_args& args) {
  size_t needed = 0;
  if (fa_explain(&args, nullptr, 0, &needed) != FA_OK) return {};
  std::string text(needed, '\0');
  if (fa_explain(&args, text.data(), text.size(), &needed) != FA_OK) return {};
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string name, outcome;
    if (words >> name >> outcome && outcome == "chosen") return name;
  }
  return {};
}

std::vector<std::string> available_implementations() {
  std::vector<std::string> names;
  for (int32_t i = 0; const char* name = fa_implementation_name(FA_CPU, i); ++i) {
    if (fa_implementation_available(FA_CPU, i, nullptr) != 0) names.emplace_back(name);
  }
  return names;
}

}  // namespace fa::cases
