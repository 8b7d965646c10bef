// Runs a Case through the C interface and holds the result against the fp64 oracle.
#pragma once

#include <string>
#include <vector>

#include "core/tensor_view.h"
#include "flash_attn/flash_attn.h"
#include "tests/case_tensors.h"
#include "tests/cases.h"

namespace fa::cases {

// ---- Bounds ----

// Of max |out - oracle| / sum_j P_ij |v_jd|, for fp32 and scores of the size that normal inputs and
// the default scale give.
inline constexpr double kFloat32OutBound = 4e-6;
// The same of each gradient, over the oracle's bound of it. Calibrated on AVX-512, AVX2, SSE4 and
// baseline: the worst of this table and 400 random cases was 2.0e-6, of backward_test.cc 3.3e-6.
inline constexpr double kFloat32GradientBound = 4e-6;
// Of both for 16-bit dtypes, in units of their round-off. The worst were 1.0 for out, 1.2 for
// gradients.
inline constexpr double kHalfBound = 2.0;
// Of max |lse - oracle| / max(1, |oracle|), for every dtype: lse is fp32.
inline constexpr double kLseBound = 1e-5;

// The bounds for a case. In fp32 an error of a score grows with the score, and is the relative
// error of its probability: the bound grows alike.
double out_bound(const Case& c, core::DataType dtype);
double gradient_bound(const Case& c, core::DataType dtype);

inline constexpr core::DataType kDTypes[] = {core::DataType::kFloat32, core::DataType::kFloat16,
                                             core::DataType::kBFloat16};

// ---- One implementation on one case ----

struct Outcome {
  // How far one of the results is off.
  struct Error {
    const char* what;   // "out", "dq", ...
    double normalised;  // infinite where a NaN, an infinity or an exact 0 differs
    double bound;
  };

  fa_status status = FA_OK;
  std::string message;         // of a call that failed
  std::string implementation;  // that ran, as fa_explain() tells it
  std::vector<Error> errors;
  bool outputs_contained = true;  // nothing around the outputs was written
  bool inputs_untouched = true;

  bool refused() const { return status == FA_UNSUPPORTED; }
  // The greatest error over its bound.
  double worst() const;
  // "" where all is right, else what is not.
  std::string fault() const;
};

// The tensors of a case, and, once they are needed, its oracles; run on as many implementations as
// one likes. `backend` as in fa_attention_args: "cpu:avx2", "reference", null.
class PreparedCase {
 public:
  PreparedCase(const Case& c, core::DataType dtype);
  PreparedCase(const PreparedCase&) = delete;
  PreparedCase& operator=(const PreparedCase&) = delete;

  Outcome run(const char* backend);
  // The forward for out and lse, and with them the backward, without s_dmask.
  Outcome run_backward(const char* backend);

  const Case& test_case() const { return case_; }
  core::DataType dtype() const { return dtype_; }
  fa_attention_args& args() { return args_; }
  fa_attention_gradients& gradients() { return gradients_; }
  CaseTensors& tensors() { return tensors_; }

 private:
  // What a tensor should hold: the oracle's values and their errors' measures, row-major.
  struct Expected {
    const char* what;
    HostTensor* tensor;
    double bound;  // of the error over its measure
    std::vector<double> values, measures;
  };
  // A pass of the oracle. `failure` says why there is none; "" where there is.
  struct Oracle {
    bool computed = false;
    std::string failure;
    std::vector<Expected> results;
  };

  void set_args();
  void remember_inputs();
  const Oracle& forward_oracle();
  const Oracle& backward_oracle();
  void compare(const Oracle& oracle, Outcome& outcome) const;
  bool inputs_untouched() const;
  double s_dmask_error(const std::vector<double>& expected);
  std::vector<double> reference_s_dmask();

  Case case_;
  core::DataType dtype_;
  CaseTensors tensors_;
  fa_attention_args args_{};
  fa_attention_gradients gradients_{};
  Oracle forward_, backward_;
  std::vector<uint64_t> input_hashes_;  // before the first call
};

// ---- Names ----

// The name, and for a random case its seed: "random_17".
std::string label(const Case& c);
// Everything in which a case differs from the default, for the message of a test that fails.
std::string describe(const Case& c);

// The implementation that fa_explain(), or with gradients fa_explain_backward(), names as chosen;
// "" if none is.
std::string chosen_implementation(const fa_attention_args& args,
                                  const fa_attention_gradients* gradients = nullptr);
// The names of those that this machine can run, best first.
std::vector<std::string> available_implementations();

}  // namespace fa::cases
