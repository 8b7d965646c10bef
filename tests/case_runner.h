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
// Of max |lse - oracle| / max(1, |oracle|), for every dtype: lse is fp32.
inline constexpr double kLseBound = 1e-5;

// The bound for out. 2u for 16-bit dtypes, u being their unit round-off. In fp32 an error of a
// score grows with the score, and is the relative error of its probability: the bound grows alike.
double out_bound(const Case& c, core::DataType dtype);

inline constexpr core::DataType kDTypes[] = {core::DataType::kFloat32, core::DataType::kFloat16,
                                             core::DataType::kBFloat16};

// ---- One implementation on one case ----

struct Outcome {
  fa_status status = FA_OK;
  std::string message;         // of a call that failed
  std::string implementation;  // that ran, as fa_explain() tells it
  double out_error = 0.0;  // normalised; infinite where a NaN, an infinity or an exact 0 differs
  double lse_error = 0.0;
  double s_dmask_error = 0.0;     // against the reference implementation
  bool outputs_contained = true;  // nothing around the outputs was written
  bool inputs_untouched = true;

  bool refused() const { return status == FA_UNSUPPORTED; }
  // "" where all is right, else what is not.
  std::string fault(const Case& c, core::DataType dtype) const;
};

// The tensors of a case, and, from the first run() on, its oracle; run on as many implementations
// as one likes.
class PreparedCase {
 public:
  PreparedCase(const Case& c, core::DataType dtype);
  PreparedCase(const PreparedCase&) = delete;
  PreparedCase& operator=(const PreparedCase&) = delete;

  // `backend` as in fa_attention_args: "cpu:avx2", "reference", null.
  Outcome run(const char* backend);

  const Case& test_case() const { return case_; }
  core::DataType dtype() const { return dtype_; }
  fa_attention_args& args() { return args_; }
  CaseTensors& tensors() { return tensors_; }

 private:
  void set_args();
  void prepare_oracle();
  void compare(Outcome& outcome);
  void check_memory(Outcome& outcome);
  double s_dmask_error(const std::vector<double>& expected);
  std::vector<double> reference_s_dmask();

  Case case_;
  core::DataType dtype_;
  CaseTensors tensors_;
  fa_attention_args args_{};
  bool has_oracle_ = false;
  Outcome oracle_;                         // whether the oracle itself took the call
  std::vector<double> out_, lse_, bound_;  // the oracle's, row-major
  std::vector<uint64_t> input_hashes_;     // of what the oracle read
};

// ---- Names ----

// The name, and for a random case its seed: "random_17".
std::string label(const Case& c);
// Everything in which a case differs from the default, for the message of a test that fails.
std::string describe(const Case& c);

// The implementation that fa_explain() names as chosen; "" if none is.
std::string chosen_implementation(const fa_attention_args& args);
// The names of those that this machine can run, best first.
std::vector<std::string> available_implementations();

}  // namespace fa::cases
