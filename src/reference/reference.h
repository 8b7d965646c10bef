// Attention in fp64, straight from the formula: the oracle that every backend is held to, and a
// backend of its own.
#pragma once

#include "core/attention_args.h"
#include "core/implementation.h"
#include "core/problem.h"

namespace fa::reference {

// Results of the forward in fp64, row-major in the shapes of out and lse. `bound` is
// sum_j P_ij |v_jd| (after dropout), by which the error of out is normalised. Null: not wanted.
struct ForwardResult {
  double* out = nullptr;
  double* lse = nullptr;
  double* bound = nullptr;
};

// `args` has passed validate_forward(), which gave `problem`. args.out and args.lse are not used.
void forward(const core::AttentionArgs& args, const core::AttentionProblem& problem,
             const ForwardResult& result);

// Gradients in fp64, row-major in the shapes of q, k, v (paged: of the pages), attn_bias as it was
// given (summed over the dimensions it was broadcast along) and learnable_sink. Null: not wanted.
//
// With the mask M_ij = 1 / (1 - p) where dropout keeps and 0 where it drops, and c_ij the
// derivative of softcap's tanh:
//   dP_ij   = M_ij sum_d dout_id v_jd          delta_i = sum_d dout_id out_id
//   dS_ij   = P_ij (dP_ij - delta_i)           dv_jd   = sum_i P_ij M_ij dout_id
//   dq_id   = scale sum_j dS_ij c_ij k_jd      dk_jd   = scale sum_i dS_ij c_ij q_id
//   d attn_bias_ij = dS_ij                     d sink_h = -sum_i exp(sink_h - lse_i) delta_i
//
// Each `_bound` is the same formula with absolute values in place of signed ones: |dout|, |v|, |k|
// and |q| for their originals, P_ij (dP_ij + delta_i) for dS_ij, 1 + tanh^2 for c_ij, the forward's
// bound for out, but no less than the least normal number of out's dtype.
struct BackwardResult {
  double* dq = nullptr;
  double* dk = nullptr;
  double* dv = nullptr;
  double* d_attn_bias = nullptr;  // of an additive one; a boolean one has no gradient
  double* d_learnable_sink = nullptr;
  double* dq_bound = nullptr;
  double* dk_bound = nullptr;
  double* dv_bound = nullptr;
  double* d_attn_bias_bound = nullptr;
  double* d_learnable_sink_bound = nullptr;
};

// `args` and `problem` as for forward(); `dout` has out's shape; fp32, fp16 or bf16.
void backward(const core::AttentionArgs& args, const core::AttentionProblem& problem,
              const core::TensorView& dout, const BackwardResult& result);

// "reference": computes in fp64 and rounds once at the end.
core::Implementation implementation();

}  // namespace fa::reference
