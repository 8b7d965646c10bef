#include "tests/case_runner.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

#include "tests/cpp/testing.h"

namespace fa::cases {
namespace {

using core::DataType;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// Both halves are in use, so that a backend that drops one of them is found out.
constexpr uint64_t kDropoutSeed = 0x1234567890ABCDEF;
constexpr uint64_t kDropoutOffset = 0x0000000300000005;

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

// A bound that was calibrated on scores of the usual size.
double bound(const Case& c, DataType dtype, double usual) {
  if (dtype != DataType::kFloat32) return kHalfBound * testing::unit_roundoff(dtype);
  return usual * std::max(1.0, score_size(c));
}

// The fp64 tensor in which the oracle puts `values`, one for each element of `like`.
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

void poison(const std::vector<HostTensor*>& tensors) {
  for (HostTensor* tensor : tensors) {
    if (tensor->present()) tensor->poison();
  }
}

Outcome failed(fa_status status) {
  Outcome outcome;
  outcome.status = status;
  outcome.message = fa_last_error_message();
  return outcome;
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

double out_bound(const Case& c, DataType dtype) { return bound(c, dtype, kFloat32OutBound); }

double gradient_bound(const Case& c, DataType dtype) {
  return bound(c, dtype, kFloat32GradientBound);
}

double Outcome::worst() const {
  double worst = 0.0;
  for (const Error& error : errors) worst = std::max(worst, error.normalised / error.bound);
  return worst;
}

std::string Outcome::fault() const {
  std::ostringstream text;
  if (status != FA_OK) text << "failed: " << message << "; ";
  for (const Error& error : errors) {
    if (error.normalised <= error.bound) continue;  // no NaN is
    text << error.what << " is off by " << error.normalised << ", bound " << error.bound << "; ";
  }
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
  fa_attention_gradients_init(&gradients_);
  gradients_.dout = t.dout.c_tensor();
  gradients_.dq = t.dq.c_tensor();
  gradients_.dk = t.dk.c_tensor();
  gradients_.dv = t.dv.c_tensor();
  gradients_.d_attn_bias = t.d_attn_bias.c_tensor();
  gradients_.d_learnable_sink = t.d_learnable_sink.c_tensor();
}

void PreparedCase::remember_inputs() {
  if (!input_hashes_.empty()) return;
  for (const HostTensor* input : tensors_.inputs()) {
    input_hashes_.push_back(input->present() ? input->hash() : 0);
  }
}

bool PreparedCase::inputs_untouched() const {
  const std::vector<const HostTensor*> inputs = tensors_.inputs();
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (inputs[i]->present() && inputs[i]->hash() != input_hashes_[i]) return false;
  }
  return true;
}

const PreparedCase::Oracle& PreparedCase::forward_oracle() {
  if (forward_.computed) return forward_;
  forward_.computed = true;
  CaseTensors& t = tensors_;
  forward_.results = {{"out", &t.out, out_bound(case_, dtype_), {}, {}},
                      {"lse", &t.lse, kLseBound, {}, {}}};
  Expected &out = forward_.results[0], &lse = forward_.results[1];
  const fa_tensor out_values = fp64_result(out.values, t.out);
  const fa_tensor lse_values = fp64_result(lse.values, t.lse);
  const fa_tensor out_measures = fp64_result(out.measures, t.out);
  if (fa_forward_oracle(&args_, &out_values, &lse_values, &out_measures) != FA_OK) {
    forward_.failure = fa_last_error_message();
  }
  for (double value : lse.values) lse.measures.push_back(std::max(1.0, std::abs(value)));
  return forward_;
}

const PreparedCase::Oracle& PreparedCase::backward_oracle() {
  if (backward_.computed) return backward_;
  backward_.computed = true;
  constexpr struct {
    const char* what;
    const fa_tensor* fa_attention_gradients::*field;
  } kGradients[] = {{"dq", &fa_attention_gradients::dq},
                    {"dk", &fa_attention_gradients::dk},
                    {"dv", &fa_attention_gradients::dv},
                    {"d_attn_bias", &fa_attention_gradients::d_attn_bias},
                    {"d_learnable_sink", &fa_attention_gradients::d_learnable_sink}};
  constexpr size_t kCount = std::size(kGradients);
  const std::vector<HostTensor*> tensors = tensors_.gradients();
  fa_attention_gradients values = gradients_, measures = gradients_;
  fa_tensor c_values[kCount], c_measures[kCount];
  backward_.results.reserve(kCount);
  for (size_t i = 0; i < kCount; ++i) {
    const auto& [what, field] = kGradients[i];
    if (!tensors[i]->present()) continue;
    Expected& expected = backward_.results.emplace_back(
        Expected{what, tensors[i], gradient_bound(case_, dtype_), {}, {}});
    c_values[i] = fp64_result(expected.values, *tensors[i]);
    c_measures[i] = fp64_result(expected.measures, *tensors[i]);
    values.*field = &c_values[i];
    measures.*field = &c_measures[i];
  }
  if (fa_backward_oracle(&args_, &values, &measures) != FA_OK) {
    backward_.failure = fa_last_error_message();
  }
  return backward_;
}

Outcome PreparedCase::run(const char* backend) {
  remember_inputs();
  const std::vector<double> s_dmask = reference_s_dmask();
  poison(tensors_.outputs());
  fa_attention_args call = args_;
  call.backend = backend;
  if (const fa_status status = fa_forward(&call); status != FA_OK) return failed(status);
  Outcome outcome;
  outcome.implementation = chosen_implementation(call);
  compare(forward_oracle(), outcome);
  if (tensors_.s_dmask.present()) {
    outcome.errors.push_back({"s_dmask", s_dmask_error(s_dmask), out_bound(case_, dtype_)});
  }
  outcome.outputs_contained = only_elements_written(tensors_.outputs());
  outcome.inputs_untouched = inputs_untouched();
  return outcome;
}

Outcome PreparedCase::run_backward(const char* backend) {
  remember_inputs();
  poison(tensors_.outputs());
  poison(tensors_.gradients());
  fa_attention_args call = args_;
  call.backend = backend;
  call.s_dmask = nullptr;
  if (const fa_status status = fa_forward(&call); status != FA_OK) return failed(status);
  const uint64_t out = tensors_.out.hash(), lse = tensors_.lse.hash();
  if (const fa_status status = fa_backward(&call, &gradients_); status != FA_OK) {
    return failed(status);
  }
  Outcome outcome;
  outcome.implementation = chosen_implementation(call, &gradients_);
  compare(backward_oracle(), outcome);
  outcome.outputs_contained = only_elements_written(tensors_.gradients());
  outcome.inputs_untouched =
      inputs_untouched() && tensors_.out.hash() == out && tensors_.lse.hash() == lse;
  return outcome;
}

void PreparedCase::compare(const Oracle& oracle, Outcome& outcome) const {
  if (!oracle.failure.empty()) {
    outcome.status = FA_INTERNAL;  // never a mere refusal
    outcome.message = "the oracle: " + oracle.failure;
    return;
  }
  for (const Expected& expected : oracle.results) {
    const HostTensor& tensor = *expected.tensor;
    double worst = 0.0;
    tensor.for_each_row([&](int64_t index, int64_t offset) {
      for (int64_t d = 0; d < tensor.row_size(); ++d) {
        const auto at = static_cast<size_t>(index + d);
        worst =
            std::max(worst, testing::normalised_error(tensor.get(offset + d), expected.values[at],
                                                      expected.measures[at], dtype_));
      }
    });
    outcome.errors.push_back({expected.what, worst, expected.bound});
  }
}

// The part of s_dmask that belongs to queries and keys; empty where the case asks for none.
std::vector<double> PreparedCase::reference_s_dmask() {
  HostTensor& s_dmask = tensors_.s_dmask;
  if (!s_dmask.present()) return {};
  fa_attention_args call = args_;
  call.backend = "reference";
  std::vector<double> values;
  if (fa_forward(&call) == FA_OK) {
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

std::string chosen_implementation(const fa_attention_args& args,
                                  const fa_attention_gradients* gradients) {
  const auto explain = [&](char* text, size_t capacity, size_t* needed) {
    return gradients == nullptr ? fa_explain(&args, text, capacity, needed)
                                : fa_explain_backward(&args, gradients, text, capacity, needed);
  };
  size_t needed = 0;
  if (explain(nullptr, 0, &needed) != FA_OK) return {};
  std::string text(needed, '\0');
  if (explain(text.data(), text.size(), &needed) != FA_OK) return {};
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
