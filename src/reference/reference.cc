#include "reference/reference.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "core/element.h"
#include "core/half.h"
#include "core/semantics.h"
#include "core/sequence.h"

namespace fa::reference {
namespace {

using core::AttentionArgs;
using core::AttentionProblem;
using core::BiasKind;
using core::DataType;
using core::Layout;
using core::TensorView;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Calls body(T{}) with the C++ type of q, k, v and out.
template <class Body>
void dispatch_dtype(DataType dtype, Body&& body) {
  if (dtype == DataType::kFloat16) return body(core::Float16{});
  if (dtype == DataType::kBFloat16) return body(core::BFloat16{});
  return body(float{});
}

double widen(double value) { return value; }
template <class T>
double widen(T value) {
  return core::to_float(value);
}

template <class A, class B>
double dot(const A* a, const B* b, int64_t size) {
  return std::transform_reduce(a, a + size, b, 0.0, std::plus<>{},
                               [](A x, B y) { return widen(x) * widen(y); });
}

template <class A, class B>
double absolute_dot(const A* a, const B* b, int64_t size) {
  return std::transform_reduce(a, a + size, b, 0.0, std::plus<>{},
                               [](A x, B y) { return std::abs(widen(x) * widen(y)); });
}

// Strides by which a tensor of rank <= 4 broadcasts to [batch, head, i, j].
class Broadcast {
 public:
  Broadcast() = default;
  Broadcast(const TensorView& view, const int64_t* strides) {
    for (int d = 0; d < view.ndim; ++d) {
      strides_[strides_.size() - view.ndim + d] = view.shape[d] == 1 ? 0 : strides[d];
    }
  }
  int64_t offset(int64_t batch, int64_t head, int64_t i, int64_t j) const {
    return batch * strides_[0] + head * strides_[1] + i * strides_[2] + j * strides_[3];
  }

 private:
  std::array<int64_t, 4> strides_{};
};

// What all heads of a call share.
struct Call {
  Call(const AttentionArgs& call_args, const AttentionProblem& call_problem)
      : args(call_args),
        problem(call_problem),
        scale(core::softmax_scale(call_args)),
        bias(call_args.attn_bias, call_args.attn_bias.strides.data()),
        dropout_key(semantics::dropout_key(call_args.dropout_seed, call_args.dropout_offset)),
        dropout_threshold(semantics::dropout_threshold(call_args.dropout_p)),
        keep_scale(1.0 / (1.0 - call_args.dropout_p)) {}

  const AttentionArgs& args;
  const AttentionProblem& problem;
  double scale;
  Broadcast bias;
  semantics::DropoutKey dropout_key;
  semantics::Word dropout_threshold;
  double keep_scale;
};

// Row i of the attention matrix of one head, and of its product with v. In memory that others own,
// which holds size() doubles.
struct Row {
  Row(const AttentionProblem& problem, double* memory)
      : score(memory),
        probability(score + problem.seqlen_k),
        softcap_slope(probability + problem.seqlen_k),
        out(softcap_slope + problem.seqlen_k),
        bound(out + problem.head_dim_v) {}

  static int64_t size(const AttentionProblem& problem) {
    return 3 * problem.seqlen_k + 2 * problem.head_dim_v;
  }

  // A key outside `keys`, or whose score is -inf, is not visible; nothing of it is read.
  bool visible(int64_t j) const { return score[j] != -kInfinity; }

  semantics::Range keys{0, 0};
  double* score;          // [seqlen_k]: s_ij
  double* probability;    // [seqlen_k]: P_ij before dropout
  double* softcap_slope;  // [seqlen_k]: the derivative of softcap * tanh(s / softcap)
  double* out;            // [head_dim_v]
  double* bound;          // [head_dim_v]: sum_j P_ij |v_jd|
  double max_score = -kInfinity;
  double lse = kInfinity;
  bool empty = true;  // no visible key
};

// One query head of one sequence.
template <class T>
class Head {
 public:
  Head(const Call& call, int64_t batch, int64_t head)
      : call_(call),
        sequence_(core::sequence(call.args, call.problem, batch)),
        head_(head),
        kv_head_(semantics::kv_head(head, call.problem.num_heads, call.problem.num_heads_kv)) {
    const TensorView& slopes = call.args.alibi_slopes;
    if (call.problem.alibi) {
      alibi_slope_ =
          core::load_element(slopes, (slopes.ndim == 2 ? batch * slopes.strides[0] : 0) + head);
    }
    if (call.problem.sink) sink_ = core::load_element(call.args.learnable_sink, head);
  }

  int64_t seqlen_q() const { return sequence_.seqlen_q; }
  double sink() const { return sink_; }

  const T* query(int64_t i) const {
    const core::Rows rows = core::query_rows(call_.args.q, sequence_);
    return call_.args.q.as<const T>() + rows.offset + i * rows.row_stride +
           head_ * rows.head_stride;
  }
  const T* key(int64_t j) const { return key_or_value(call_.args.k, j); }
  const T* value(int64_t j) const { return key_or_value(call_.args.v, j); }

  // The number of a row among all rows of q, or of k, where the tensor has no gaps.
  int64_t query_number(int64_t i) const {
    const bool varlen = call_.problem.layout == Layout::kVarlen;
    return (varlen ? 0 : sequence_.batch * call_.problem.seqlen_q) + sequence_.q_begin + i;
  }
  int64_t key_number(int64_t j) const {
    const AttentionProblem& problem = call_.problem;
    if (problem.page_size > 0) {
      const core::PagedRow it = paged_row(j);
      return it.page * problem.page_size + it.row;
    }
    const bool dense = problem.layout == Layout::kDense;
    return (dense ? sequence_.batch * problem.seqlen_k : 0) + sequence_.k_begin + j;
  }
  int64_t kv_head() const { return kv_head_; }

  // M_ij: what dropout multiplies P_ij by.
  double dropout_factor(int64_t i, int64_t j) const {
    if (!call_.problem.dropout) return 1.0;
    const int64_t batch_head = sequence_.batch * call_.problem.num_heads + head_;
    const bool keeps =
        semantics::dropout_keeps(call_.dropout_key, call_.dropout_threshold, batch_head, i, j);
    return keeps ? call_.keep_scale : 0.0;
  }

  void attend(int64_t i, Row& row) const {
    scores(i, row);
    softmax(row);
    weigh_values(i, row);
  }

 private:
  core::PagedRow paged_row(int64_t j) const {
    return core::paged_row(call_.args.block_table, call_.problem.page_size, sequence_.batch,
                           sequence_.k_begin + j);
  }

  const T* key_or_value(const TensorView& view, int64_t j) const {
    core::Rows rows;
    if (call_.problem.page_size > 0) {
      const core::PagedRow it = paged_row(j);
      rows = core::rows_from(view, it.page, it.row);
    } else {
      rows = core::key_rows(view, sequence_);
      rows.offset += j * rows.row_stride;
    }
    return view.as<const T>() + rows.offset + kv_head_ * rows.head_stride;
  }

  int64_t bias_offset(int64_t i, int64_t j) const {
    return call_.bias.offset(sequence_.batch, head_, i, j);
  }
  bool bias_keeps(int64_t i, int64_t j) const {
    return call_.args.attn_bias.as<const uint8_t>()[bias_offset(i, j)] != 0;
  }

  // s_ij = softcap(scale <q_i, k_j>) - slope |i + Sk - Sq - j| + bias_ij
  void scores(int64_t i, Row& row) const {
    const AttentionProblem& problem = call_.problem;
    const int64_t seqlen_q = sequence_.seqlen_q;
    const int64_t seqlen_k = sequence_.seqlen_k;
    row.keys = semantics::visible_keys(i, seqlen_q, seqlen_k, problem.band);
    for (int64_t j = row.keys.begin; j < row.keys.end; ++j) {
      row.score[j] = -kInfinity;
      if (problem.bias == BiasKind::kBoolean && !bias_keeps(i, j)) continue;
      double score = call_.scale * dot(query(i), key(j), problem.head_dim);
      row.softcap_slope[j] = 1.0;
      if (problem.softcap) {
        const double tanh = std::tanh(score / call_.args.softcap);
        score = call_.args.softcap * tanh;
        row.softcap_slope[j] = 1.0 - tanh * tanh;
      }
      if (problem.alibi) {
        score -=
            alibi_slope_ * static_cast<double>(semantics::alibi_distance(i, j, seqlen_q, seqlen_k));
      }
      if (problem.bias == BiasKind::kAdditive) {
        score += core::load_element(call_.args.attn_bias, bias_offset(i, j));
      }
      row.score[j] = score;
    }
  }

  // lse_i = log(sum_j exp(s_ij) + exp(sink)), P_ij = exp(s_ij - lse_i), around the greatest score.
  void softmax(Row& row) const {
    row.empty = true;
    row.max_score = -kInfinity;
    for (int64_t j = row.keys.begin; j < row.keys.end; ++j) {
      row.empty = row.empty && !row.visible(j);
      row.max_score = std::max(row.max_score, row.score[j]);
    }
    row.lse = call_.problem.sink ? sink_ : kInfinity;
    if (row.empty) return;

    const double greatest = call_.problem.sink ? std::max(row.max_score, sink_) : row.max_score;
    double sum = call_.problem.sink ? std::exp(sink_ - greatest) : 0.0;
    for (int64_t j = row.keys.begin; j < row.keys.end; ++j) {
      row.probability[j] = row.visible(j) ? std::exp(row.score[j] - greatest) : 0.0;
      sum += row.probability[j];
    }
    for (int64_t j = row.keys.begin; j < row.keys.end; ++j) row.probability[j] /= sum;
    row.lse = greatest + std::log(sum);
  }

  // out_id = sum_j P_ij M_ij v_jd
  void weigh_values(int64_t i, Row& row) const {
    const int64_t head_dim_v = call_.problem.head_dim_v;
    std::fill_n(row.out, head_dim_v, 0.0);
    std::fill_n(row.bound, head_dim_v, 0.0);
    for (int64_t j = row.keys.begin; j < row.keys.end; ++j) {
      if (!row.visible(j)) continue;
      const double weight = row.probability[j] * dropout_factor(i, j);
      const T* v = value(j);
      for (int64_t d = 0; d < head_dim_v; ++d) {
        row.out[d] += weight * widen(v[d]);
        row.bound[d] += weight * std::abs(widen(v[d]));
      }
    }
  }

  const Call& call_;
  const core::Sequence sequence_;
  const int64_t head_;
  const int64_t kv_head_;
  double alibi_slope_ = 0.0;
  double sink_ = -kInfinity;
};

// ---- The oracle's forward. ----

template <class T>
void forward_head(const Call& call, int64_t batch, int64_t head, Row& row,
                  const ForwardResult& result) {
  const AttentionProblem& problem = call.problem;
  const Head<T> it(call, batch, head);
  const bool varlen = problem.layout == Layout::kVarlen;
  for (int64_t i = 0; i < it.seqlen_q(); ++i) {
    it.attend(i, row);
    const int64_t number = it.query_number(i);
    const int64_t out_begin = (number * problem.num_heads + head) * problem.head_dim_v;
    if (result.out != nullptr) std::copy_n(row.out, problem.head_dim_v, result.out + out_begin);
    if (result.bound != nullptr) {
      std::copy_n(row.bound, problem.head_dim_v, result.bound + out_begin);
    }
    if (result.lse == nullptr) continue;
    if (varlen) {
      result.lse[head * problem.total_q + number] = row.lse;
    } else {
      result.lse[(batch * problem.num_heads + head) * problem.seqlen_q + i] = row.lse;
    }
  }
}

// ---- The oracle's backward. ----

// A gradient and its bound, either of which may not be wanted.
struct Gradient {
  double* value;
  double* bound;

  void clear(int64_t size) const {
    if (value != nullptr) std::fill_n(value, size, 0.0);
    if (bound != nullptr) std::fill_n(bound, size, 0.0);
  }
  void add(int64_t index, double term, double term_bound) const {
    if (value != nullptr) value[index] += term;
    if (bound != nullptr) bound[index] += term_bound;
  }
  // Adds `factor * vector`, and for the bound `factor_bound * |vector|`.
  template <class T>
  void add(int64_t begin, double factor, double factor_bound, const T* vector, int64_t size) const {
    for (int64_t d = 0; d < size; ++d) {
      add(begin + d, factor * widen(vector[d]), factor_bound * std::abs(widen(vector[d])));
    }
  }
};

struct Gradients {
  explicit Gradients(const Call& call, const BackwardResult& result)
      : q{result.dq, result.dq_bound},
        k{result.dk, result.dk_bound},
        v{result.dv, result.dv_bound},
        attn_bias{result.d_attn_bias, result.d_attn_bias_bound},
        learnable_sink{result.d_learnable_sink, result.d_learnable_sink_bound} {
    const TensorView& bias = call.args.attn_bias;
    bias_index = Broadcast(bias, core::row_major_strides(bias).data());

    q.clear(call.args.q.num_elements());
    k.clear(call.args.k.num_elements());
    v.clear(call.args.v.num_elements());
    if (bias.present()) attn_bias.clear(bias.num_elements());
    if (call.problem.sink) learnable_sink.clear(call.problem.num_heads);
  }

  Gradient q, k, v, attn_bias, learnable_sink;
  Broadcast bias_index;
};

// sum_d |dout_id| bound_id, of out's bounds. A backward is given out in its dtype, which rounds by
// absolute steps below its least normal number: a smaller bound counts as that.
template <class T>
double delta_bound_of(const Row& row, const double* dout, int64_t head_dim_v) {
  const double least = std::is_same_v<T, core::Float16> ? 0x1p-14 : 0x1p-126;
  double sum = 0.0;
  for (int64_t d = 0; d < head_dim_v; ++d) {
    if (row.bound[d] != 0.0) sum += std::abs(dout[d]) * std::max(row.bound[d], least);
  }
  return sum;
}

// The terms that row i of a head gives to all gradients; `row` and `dout` are that row's.
template <class T>
void backward_row(const Call& call, int64_t batch, int64_t head, const Head<T>& it, int64_t i,
                  const Row& row, const double* dout, const Gradients& gradients) {
  const AttentionProblem& problem = call.problem;
  const int64_t head_dim = problem.head_dim;
  const int64_t head_dim_v = problem.head_dim_v;
  const int64_t q_begin = (it.query_number(i) * problem.num_heads + head) * head_dim;
  const double delta = dot(dout, row.out, head_dim_v);
  const double delta_bound = delta_bound_of<T>(row, dout, head_dim_v);

  for (int64_t j = row.keys.begin; j < row.keys.end; ++j) {
    if (!row.visible(j)) continue;
    const int64_t kv_row = it.key_number(j) * problem.num_heads_kv + it.kv_head();
    const double p = row.probability[j];
    const double m = it.dropout_factor(i, j);
    const double dp = m * dot(dout, it.value(j), head_dim_v);
    const double dp_bound = m * absolute_dot(dout, it.value(j), head_dim_v);
    const double ds = p * (dp - delta);
    const double ds_bound = p * (dp_bound + delta_bound);
    const double dqk = call.scale * row.softcap_slope[j] * ds;  // by <q_i, k_j>
    // The slope is 1 - tanh^2, and with absolute values 1 + tanh^2.
    const double dqk_bound = call.scale * (2.0 - row.softcap_slope[j]) * ds_bound;

    gradients.v.add(kv_row * head_dim_v, p * m, p * m, dout, head_dim_v);
    gradients.q.add(q_begin, dqk, dqk_bound, it.key(j), head_dim);
    gradients.k.add(kv_row * head_dim, dqk, dqk_bound, it.query(i), head_dim);
    if (problem.bias == BiasKind::kAdditive) {
      gradients.attn_bias.add(gradients.bias_index.offset(batch, head, i, j), ds, ds_bound);
    }
  }
  if (problem.sink && !row.empty) {  // without visible keys delta is 0
    const double p = std::exp(it.sink() - row.lse);
    gradients.learnable_sink.add(head, -p * delta, p * delta_bound);
  }
}

template <class T>
void backward_head(const Call& call, int64_t batch, int64_t head, Row& row, const TensorView& dout,
                   const Gradients& gradients) {
  const Head<T> it(call, batch, head);
  const core::Rows rows = core::query_rows(dout, core::sequence(call.args, call.problem, batch));
  std::vector<double> dout_row(static_cast<size_t>(call.problem.head_dim_v));
  for (int64_t i = 0; i < it.seqlen_q(); ++i) {
    for (size_t d = 0; d < dout_row.size(); ++d) {
      dout_row[d] = core::load_element(dout, rows.offset + i * rows.row_stride +
                                                 head * rows.head_stride + static_cast<int64_t>(d));
    }
    it.attend(i, row);
    backward_row(call, batch, head, it, i, row, dout_row.data(), gradients);
  }
}

// ---- The backend. ----

// What one head writes of the call's outputs.
template <class T>
class Writer {
 public:
  Writer(const Call& call, int64_t batch, int64_t head)
      : call_(call), sequence_(core::sequence(call.args, call.problem, batch)), head_(head) {}

  void write(int64_t i, const double* out, double lse) const {
    const core::Rows rows = core::query_rows(call_.args.out, sequence_);
    T* row = call_.args.out.as<T>() + rows.offset + i * rows.row_stride + head_ * rows.head_stride;
    for (int64_t d = 0; d < call_.problem.head_dim_v; ++d) row[d] = core::round_to<T>(out[d]);
    if (!call_.problem.wants_lse) return;
    const TensorView& view = call_.args.lse;
    const int64_t offset = view.ndim == 3
                               ? sequence_.batch * view.strides[0] + head_ * view.strides[1] + i
                               : head_ * view.strides[0] + sequence_.q_begin + i;
    view.as<float>()[offset] = static_cast<float>(lse);
  }

  void clear_s_dmask() const {
    const TensorView& view = call_.args.s_dmask;
    for (int64_t i = 0; i < view.shape[2]; ++i) {
      std::fill_n(s_dmask_row(i), view.shape[3], core::round_to<T>(0.0));
    }
  }

  // exp(s_ij - max_j s_ij), negative where dropped.
  void write_s_dmask(int64_t i, const Head<T>& it, const Row& row) const {
    T* s_dmask = s_dmask_row(i);
    for (int64_t j = row.keys.begin; j < row.keys.end; ++j) {
      if (!row.visible(j)) continue;
      const double value = std::exp(row.score[j] - row.max_score);
      s_dmask[j] = core::round_to<T>(it.dropout_factor(i, j) == 0.0 ? -value : value);
    }
  }

 private:
  T* s_dmask_row(int64_t i) const {
    const TensorView& view = call_.args.s_dmask;
    return view.as<T>() + sequence_.batch * view.strides[0] + head_ * view.strides[1] +
           i * view.strides[2];
  }

  const Call& call_;
  const core::Sequence sequence_;
  const int64_t head_;
};

template <class T>
void write_head(const Call& call, int64_t batch, int64_t head, Row& row) {
  const Head<T> it(call, batch, head);
  const Writer<T> writer(call, batch, head);
  if (call.problem.wants_s_dmask) writer.clear_s_dmask();
  for (int64_t i = 0; i < it.seqlen_q(); ++i) {
    it.attend(i, row);
    writer.write(i, row.out, row.lse);
    if (call.problem.wants_s_dmask) writer.write_s_dmask(i, it, row);
  }
}

// Rows behind the last sequence belong to none: out = 0, lse = +inf.
template <class T>
void write_rows_of_no_sequence(const Call& call) {
  if (call.problem.layout != Layout::kVarlen) return;
  const TensorView& out = call.args.out;
  const TensorView& lse = call.args.lse;
  const int64_t begin = call.args.cu_seqlens_q.as<const int32_t>()[call.problem.batch];
  for (int64_t i = begin; i < out.shape[0]; ++i) {
    for (int64_t head = 0; head < call.problem.num_heads; ++head) {
      T* row = out.as<T>() + i * out.strides[0] + head * out.strides[1];
      std::fill_n(row, call.problem.head_dim_v, core::round_to<T>(0.0));
      if (call.problem.wants_lse) {
        lse.as<float>()[head * lse.strides[0] + i] = std::numeric_limits<float>::infinity();
      }
    }
  }
}

class ReferencePlan final : public core::Plan {
 public:
  explicit ReferencePlan(const AttentionProblem& problem) : problem_(problem) {}

  int64_t workspace_bytes(int num_workers) const override {
    return num_workers * Row::size(problem_) * static_cast<int64_t>(sizeof(double));
  }

  core::Status run(const AttentionArgs& args, void* workspace,
                   const core::Stream& stream) const override {
    const Call call(args, problem_);
    dispatch_dtype(problem_.dtype, [&](auto element) {
      using T = decltype(element);
      write_rows_of_no_sequence<T>(call);
      auto run_task = [&](int64_t task, int worker) {
        Row row(problem_, static_cast<double*>(workspace) + worker * Row::size(problem_));
        write_head<T>(call, task / problem_.num_heads, task % problem_.num_heads, row);
      };
      const int64_t num_tasks = problem_.batch * problem_.num_heads;
      if (stream.parallel != nullptr) {
        core::parallel_for(*stream.parallel, num_tasks, stream.num_workers, run_task);
      } else {
        for (int64_t task = 0; task < num_tasks; ++task) run_task(task, 0);
      }
    });
    return {};
  }

 private:
  const AttentionProblem problem_;
};

core::Result<core::PlanPtr> accept(const AttentionProblem& problem, core::Device device) {
  if (device.type != core::DeviceType::kCpu) {
    return core::unsupported("runs on the CPU only, not on ", core::name(device));
  }
  if (problem.direction != core::Direction::kForward) {
    return core::unsupported("computes the forward only");
  }
  if (problem.appends) return core::unsupported("does not append to a cache");
  return core::PlanPtr(std::make_shared<ReferencePlan>(problem));
}

}  // namespace

void forward(const AttentionArgs& args, const AttentionProblem& problem,
             const ForwardResult& result) {
  const Call call(args, problem);
  const int64_t num_rows = problem.total_q * problem.num_heads;
  // Rows of no sequence keep these.
  if (result.out != nullptr) std::fill_n(result.out, num_rows * problem.head_dim_v, 0.0);
  if (result.bound != nullptr) std::fill_n(result.bound, num_rows * problem.head_dim_v, 0.0);
  if (result.lse != nullptr) std::fill_n(result.lse, num_rows, kInfinity);
  std::vector<double> memory(static_cast<size_t>(Row::size(problem)));
  Row row(problem, memory.data());
  dispatch_dtype(problem.dtype, [&](auto element) {
    for (int64_t task = 0; task < problem.batch * problem.num_heads; ++task) {
      forward_head<decltype(element)>(call, task / problem.num_heads, task % problem.num_heads, row,
                                      result);
    }
  });
}

void backward(const AttentionArgs& args, const AttentionProblem& problem, const TensorView& dout,
              const BackwardResult& result) {
  const Call call(args, problem);
  const Gradients gradients(call, result);
  std::vector<double> memory(static_cast<size_t>(Row::size(problem)));
  Row row(problem, memory.data());
  dispatch_dtype(problem.dtype, [&](auto element) {
    for (int64_t task = 0; task < problem.batch * problem.num_heads; ++task) {
      backward_head<decltype(element)>(call, task / problem.num_heads, task % problem.num_heads,
                                       row, dout, gradients);
    }
  });
}

core::Implementation implementation() { return {"reference", core::DeviceType::kCpu, accept}; }

}  // namespace fa::reference
