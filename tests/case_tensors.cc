#include "tests/case_tensors.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <string_view>

#include "tests/cpp/testing.h"

namespace fa::cases {
namespace {

using core::DataType;
using detail::Random;

// Odd, so that no row is aligned to a vector.
constexpr int64_t kGuardElements = 67;
// A heap block that ends with the tensor lets AddressSanitizer see reads behind it.
#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kGuardBehind = 0;
#else
constexpr int64_t kGuardBehind = kGuardElements;
#endif
// Behind the last sequence of varlen q, k and v.
constexpr int64_t kUnusedRows = 3;
constexpr int64_t kUnusedPages = 3;
// In block_table where no key is in use.
constexpr int32_t kNoPage = -7;

int64_t product(const std::vector<int64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>{});
}

int64_t elements_spanned(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides) {
  if (product(shape) == 0) return 0;
  int64_t last = 0;
  for (size_t d = 0; d < shape.size(); ++d) last += (shape[d] - 1) * strides[d];
  return last + 1;
}

// About normal, with the variance of one: the sum of four uniforms.
double draw_normal(Random& random) {
  const uint64_t bits = random.next();
  double sum = 0;
  for (int part = 0; part < 4; ++part) {
    sum += static_cast<double>((bits >> (16 * part)) & 0xFFFF) / 65536.0;
  }
  return (sum - 2.0) * std::sqrt(3.0);
}

// The strides of q, k, v or out, [.., S, H, D].
std::vector<int64_t> strides_for(const std::vector<int64_t>& shape, Storage storage) {
  constexpr int64_t kRowGap = 3, kTokenGap = 5, kBatchGap = 7;
  std::vector<int64_t> strides = testing::row_major_strides(shape);
  const size_t rank = shape.size();
  const int64_t tokens = shape[rank - 3], heads = shape[rank - 2], dim = shape[rank - 1];
  int64_t batch = strides[0];
  if (storage == Storage::kHeadsMajor) {
    strides[rank - 3] = dim;
    strides[rank - 2] = tokens * dim;
  } else if (storage == Storage::kPaddedRows) {
    strides[rank - 2] = dim + kRowGap;
    strides[rank - 3] = heads * strides[rank - 2] + kTokenGap;
    batch = tokens * strides[rank - 3] + kBatchGap;
  } else if (storage == Storage::kPackedQkv) {
    strides[rank - 3] = 3 * heads * dim;
    batch *= 3;
  }
  if (rank == 4) strides[0] = batch;
  return strides;
}

HostTensor int32_tensor(const std::vector<int64_t>& shape, const std::vector<int32_t>& values) {
  HostTensor tensor = HostTensor::compact(DataType::kInt32, shape);
  std::copy(values.begin(), values.end(), tensor.data<int32_t>());
  return tensor;
}

HostTensor cumulative(const Lengths& lengths) {
  std::vector<int32_t> sums{0};
  for (int64_t length : lengths) sums.push_back(sums.back() + static_cast<int32_t>(length));
  return int32_tensor({lengths.count + 1}, sums);
}

int64_t sum(const Lengths& lengths) {
  return std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
}

int64_t keys_of(const Case& c, int64_t b) {
  if (!c.varlen()) return c.seqlen_k;
  return (c.seqused_k.given() ? c.seqused_k : c.lengths_k).at[static_cast<size_t>(b)];
}

int64_t queries_of(const Case& c, int64_t b) {
  return c.varlen() ? c.lengths_q.at[static_cast<size_t>(b)] : c.seqlen_q;
}

// Draws H rows of D elements at the tokens that are in use.
class Filler {
 public:
  Filler(const Case& c, const CaseTensors& tensors, uint64_t seed)
      : case_(c), tensors_(tensors), random_(seed) {}

  void queries(HostTensor& q_or_dout, double gain) {
    for (int64_t b = 0, row = 0; b < case_.sequences(); ++b) {
      for (int64_t i = 0; i < queries_of(case_, b); ++i, ++row) {
        const int64_t first = q_or_dout.stride(0);
        const int64_t token = case_.varlen() ? row * first : b * first + i * q_or_dout.stride(1);
        fill_token(q_or_dout, token, gain);
      }
    }
  }

  void keys(HostTensor& k_or_v) {
    for (int64_t b = 0, begin = 0; b < case_.sequences(); ++b) {
      for (int64_t j = 0; j < keys_of(case_, b); ++j) {
        fill_token(k_or_v, key_token(k_or_v, b, begin, j), 1.0);
      }
      if (case_.varlen()) begin += case_.lengths_k.at[static_cast<size_t>(b)];
    }
  }

 private:
  int64_t key_token(const HostTensor& tensor, int64_t b, int64_t begin, int64_t j) const {
    if (case_.page_size > 0) {
      const HostTensor& table = tensors_.block_table;
      const auto page = static_cast<int64_t>(table.get(b * table.stride(0) + j / case_.page_size));
      return page * tensor.stride(0) + j % case_.page_size * tensor.stride(1);
    }
    return case_.varlen() ? (begin + j) * tensor.stride(0)
                          : b * tensor.stride(0) + j * tensor.stride(1);
  }

  void fill_token(HostTensor& tensor, int64_t token, double gain) {
    const size_t rank = tensor.shape().size();
    for (int64_t h = 0; h < tensor.shape()[rank - 2]; ++h) {
      const int64_t row = token + h * tensor.stride(rank - 2);
      for (int64_t d = 0; d < tensor.shape()[rank - 1]; ++d) {
        tensor.set(row + d, gain * draw_normal(random_));
      }
    }
  }

  const Case& case_;
  const CaseTensors& tensors_;
  Random random_;
};

// Pages in shuffled order; only the pages of keys in use are in the table.
HostTensor make_block_table(const Case& c, Random& random, int64_t& num_pages) {
  std::vector<int64_t> pages_of;
  for (int64_t b = 0; b < c.sequences(); ++b) {
    pages_of.push_back((keys_of(c, b) + c.page_size - 1) / c.page_size);
  }
  const int64_t used = std::accumulate(pages_of.begin(), pages_of.end(), int64_t{0});
  num_pages = used + kUnusedPages;
  std::vector<int32_t> pages(static_cast<size_t>(num_pages));
  std::iota(pages.begin(), pages.end(), 0);
  for (size_t i = pages.size(); i > 1; --i) std::swap(pages[i - 1], pages[random.next() % i]);
  const int64_t max_blocks = *std::max_element(pages_of.begin(), pages_of.end()) + 1;
  std::vector<int32_t> table(static_cast<size_t>(c.sequences() * max_blocks), kNoPage);
  size_t next = 0;
  for (int64_t b = 0; b < c.sequences(); ++b) {
    for (int64_t p = 0; p < pages_of[static_cast<size_t>(b)]; ++p) {
      table[static_cast<size_t>(b * max_blocks + p)] = pages[next++];
    }
  }
  return int32_tensor({c.sequences(), max_blocks}, table);
}

// Three tensors of one shape side by side in memory, as if they were heads of one.
void make_packed(const std::vector<int64_t>& shape, DataType dtype, HostTensor& q, HostTensor& k,
                 HostTensor& v) {
  const size_t rank = shape.size();
  std::vector<int64_t> whole = shape;
  whole[rank - 2] *= 3;
  const HostTensor packed = HostTensor::compact(dtype, whole);
  const std::vector<int64_t> strides = strides_for(shape, Storage::kPackedQkv);
  const int64_t slice = shape[rank - 2] * shape[rank - 1];
  q = HostTensor(packed, shape, strides, 0);
  k = HostTensor(packed, shape, strides, slice);
  v = HostTensor(packed, shape, strides, 2 * slice);
}

void make_qkv_out(CaseTensors& t, const Case& c, DataType dtype) {
  const Storage storage = c.storage;
  int64_t num_pages = 0;
  Random pages(c.seed);  // of their own, so that the draws of q, k and v are alike for every layout
  if (c.page_size > 0) t.block_table = make_block_table(c, pages, num_pages);
  const auto shape = [&](int64_t tokens, int64_t heads, int64_t dim, bool keys) {
    if (keys && c.page_size > 0) {
      return std::vector<int64_t>{num_pages, c.page_size, heads, dim};
    }
    if (c.varlen()) return std::vector<int64_t>{tokens, heads, dim};
    return std::vector<int64_t>{c.batch, tokens, heads, dim};
  };
  const auto q_shape = shape(c.varlen() ? sum(c.lengths_q) + kUnusedRows : c.seqlen_q, c.num_heads,
                             c.head_dim, false);
  if (storage == Storage::kPackedQkv) {
    make_packed(q_shape, dtype, t.q, t.k, t.v);
    t.out = HostTensor::compact(dtype, q_shape);
    return;
  }
  const int64_t tokens_k = c.varlen() ? sum(c.lengths_k) + kUnusedRows : c.seqlen_k;
  const auto make = [&](const std::vector<int64_t>& s) {
    return HostTensor(dtype, s, strides_for(s, storage));
  };
  t.q = make(q_shape);
  t.k = make(shape(tokens_k, c.heads_kv(), c.head_dim, true));
  t.v = make(shape(tokens_k, c.heads_kv(), c.dim_v(), true));
  std::vector<int64_t> out_shape = q_shape;
  out_shape.back() = c.dim_v();
  t.out = make(out_shape);
}

void make_varlen(CaseTensors& t, const Case& c) {
  if (!c.varlen()) return;
  t.cu_seqlens_q = cumulative(c.lengths_q);
  t.cu_seqlens_k = cumulative(c.lengths_k);
  if (!c.seqused_k.given()) return;
  const std::vector<int32_t> used(c.seqused_k.begin(), c.seqused_k.end());
  t.seqused_k = int32_tensor({c.seqused_k.count}, used);
}

HostTensor make_alibi(const Case& c) {
  if (c.alibi == Alibi::kNone) return {};
  const bool per_batch = c.alibi == Alibi::kPerBatchAndHead;
  const int64_t rows = per_batch ? c.sequences() : 1;
  HostTensor slopes =
      HostTensor::compact(DataType::kFloat32, per_batch ? std::vector<int64_t>{rows, c.num_heads}
                                                        : std::vector<int64_t>{c.num_heads});
  for (int64_t b = 0; b < rows; ++b) {
    for (int64_t h = 0; h < c.num_heads; ++h) {
      slopes.set(b * c.num_heads + h, alibi_slope(c, b, h));
    }
  }
  return slopes;
}

HostTensor allocate_bias(const Case& c, DataType dtype) {
  const int64_t b = c.sequences(), h = c.num_heads, q = c.max_q(), k = c.max_k();
  switch (c.bias) {
    case Bias::kPerKey:
      return HostTensor::compact(dtype, {1, 1, 1, k});
    case Bias::kPerBatch:
      return HostTensor::compact(dtype, {b, 1, q, k});
    case Bias::kPerHead:
      return HostTensor::compact(dtype, {h, q, k});
    case Bias::kExpanded:
      return HostTensor(dtype, {b, h, q, k}, {0, 0, k, 1});
    default:
      return HostTensor::compact(dtype, {b, h, q, k});
  }
}

// Entries behind a sequence's end stay poisoned where no other sequence shares them.
HostTensor make_bias(const Case& c, DataType own, Random& random) {
  if (c.bias == Bias::kNone) return {};
  const bool boolean = c.bias_type == BiasType::kBoolean;
  HostTensor bias = allocate_bias(c, boolean                             ? DataType::kBool
                                     : c.bias_type == BiasType::kFloat32 ? DataType::kFloat32
                                                                         : own);
  const bool per_sequence = c.bias == Bias::kFull || c.bias == Bias::kPerBatch;
  const std::vector<int64_t>& shape = bias.shape();
  const int64_t rows = shape[shape.size() - 2], columns = shape.back();
  for (int64_t index = 0; index < bias.num_elements(); ++index) {
    const int64_t j = index % columns, i = index / columns % rows;
    const int64_t b = per_sequence ? index / (bias.num_elements() / shape[0]) : -1;
    const bool used = b < 0 || (i < queries_of(c, b) && j < keys_of(c, b));
    double value = draw_normal(random);
    if (boolean) {
      value = value < 0.5 || !used ? 1.0 : 0.0;  // keeps about 70%
    } else if (!used) {
      continue;
    } else if (c.bias_with_infinities && random.one_in(5)) {
      value = -std::numeric_limits<double>::infinity();
    }
    bias.set(bias.offset_of(index), value);
  }
  return bias;
}

HostTensor make_sink(const Case& c, DataType own, Random& random) {
  if (c.sink == Sink::kNone) return {};
  HostTensor sink =
      HostTensor::compact(c.sink == Sink::kOwn ? own : DataType::kFloat32, {c.num_heads});
  for (int64_t h = 0; h < c.num_heads; ++h) sink.set(h, 2.0 * draw_normal(random));
  return sink;
}

void make_gradients(CaseTensors& t, const Case& c, DataType dtype) {
  t.dout = HostTensor::like(t.out);
  if (c.storage == Storage::kPackedQkv) {
    make_packed(t.q.shape(), dtype, t.dq, t.dk, t.dv);
  } else {
    t.dq = HostTensor::like(t.q);
    t.dk = HostTensor::like(t.k);
    t.dv = HostTensor::like(t.v);
  }
  if (t.attn_bias.present() && c.bias_type != BiasType::kBoolean) {
    t.d_attn_bias = HostTensor::compact(t.attn_bias.dtype(), t.attn_bias.shape());
  }
  if (t.learnable_sink.present()) t.d_learnable_sink = HostTensor::like(t.learnable_sink);
}

uint64_t seed_of(const Case& c) {
  uint64_t seed = c.seed + 1;
  for (char letter : std::string_view{c.name}) {
    seed = (seed ^ static_cast<uint64_t>(letter)) * 0x100000001B3;
  }
  return seed;
}

}  // namespace

HostTensor::HostTensor(DataType dtype, std::vector<int64_t> shape, std::vector<int64_t> strides)
    : dtype_(dtype), shape_(std::move(shape)), strides_(std::move(strides)) {
  const int64_t elements = kGuardElements + elements_spanned(shape_, strides_) + kGuardBehind;
  memory_ = std::make_shared<std::vector<std::byte>>(
      static_cast<size_t>(elements * core::byte_size(dtype)), kPoison);
  first_byte_ = kGuardElements * core::byte_size(dtype);
}

HostTensor::HostTensor(const HostTensor& other, std::vector<int64_t> shape,
                       std::vector<int64_t> strides, int64_t offset)
    : dtype_(other.dtype_),
      shape_(std::move(shape)),
      strides_(std::move(strides)),
      memory_(other.memory_),
      first_byte_(other.first_byte_ + offset * core::byte_size(other.dtype_)) {}

HostTensor HostTensor::compact(DataType dtype, std::vector<int64_t> shape) {
  std::vector<int64_t> strides = testing::row_major_strides(shape);
  return HostTensor(dtype, std::move(shape), std::move(strides));
}

HostTensor HostTensor::like(const HostTensor& other) {
  return HostTensor(other.dtype_, other.shape_, other.strides_);
}

int64_t HostTensor::num_elements() const { return product(shape_); }

int64_t HostTensor::offset_of(int64_t index) const {
  int64_t offset = 0;
  for (size_t d = shape_.size(); d-- > 0;) {
    offset += index % shape_[d] * strides_[d];
    index /= shape_[d];
  }
  return offset;
}

core::TensorView HostTensor::view() const {
  core::TensorView view;  // without shape and strides: offsets are in elements already
  view.data = first();
  view.dtype = dtype_;
  return view;
}

void HostTensor::set(int64_t offset, double value) { testing::store(view(), offset, value); }

double HostTensor::get(int64_t offset) const { return testing::load(view(), offset); }

void HostTensor::poison() { std::fill(memory_->begin(), memory_->end(), kPoison); }

void HostTensor::poison_elements() {
  const int64_t bytes = core::byte_size(dtype_);
  for_each_row([&](int64_t, int64_t offset) {
    std::memset(first() + offset * bytes, static_cast<int>(kPoison),
                static_cast<size_t>(row_size() * bytes));
  });
}

bool HostTensor::poisoned() const {
  return std::all_of(memory_->begin(), memory_->end(),
                     [](std::byte byte) { return byte == kPoison; });
}

uint64_t HostTensor::hash() const {
  uint64_t hash = 0xCBF29CE484222325;  // FNV-1a, by words for speed
  for (size_t at = 0; at < memory_->size(); at += sizeof(uint64_t)) {
    uint64_t word = 0;
    std::memcpy(&word, memory_->data() + at, std::min(sizeof(word), memory_->size() - at));
    hash = (hash ^ word) * 0x100000001B3;
    hash ^= hash >> 32;  // or the high bits would never reach the low ones
  }
  return hash;
}

const fa_tensor* HostTensor::c_tensor() {
  if (!present()) return nullptr;
  struct Code {
    uint8_t code, bits;
  };
  const auto code = [&]() -> Code {
    switch (dtype_) {
      case DataType::kFloat16:
        return {FA_FLOAT, 16};
      case DataType::kBFloat16:
        return {FA_BFLOAT, 16};
      case DataType::kFloat64:
        return {FA_FLOAT, 64};
      case DataType::kInt32:
        return {FA_INT, 32};
      case DataType::kBool:
        return {FA_BOOL, 8};
      default:
        return {FA_FLOAT, 32};
    }
  }();
  c_ = {};
  c_.data = first();
  c_.device_type = FA_CPU;
  c_.ndim = static_cast<int32_t>(shape_.size());
  c_.dtype_code = code.code;
  c_.dtype_bits = code.bits;
  c_.dtype_lanes = 1;
  c_.shape = shape_.data();
  c_.strides = strides_.data();
  return &c_;
}

bool only_elements_written(const std::vector<HostTensor*>& tensors) {
  for (HostTensor* tensor : tensors) {
    if (tensor->present()) tensor->poison_elements();
  }
  return std::all_of(tensors.begin(), tensors.end(), [](const HostTensor* tensor) {
    return !tensor->present() || tensor->poisoned();
  });
}

double alibi_slope(const Case& c, int64_t batch, int64_t head) {
  const double usual =
      std::exp2(-8.0 * static_cast<double>(head + 1) / static_cast<double>(c.num_heads));
  return usual * (1.0 + 0.25 * static_cast<double>(batch));
}

CaseTensors::CaseTensors(const Case& c, DataType dtype) {
  Random random(seed_of(c));
  make_qkv_out(*this, c, dtype);
  make_varlen(*this, c);
  Filler filler(c, *this, random.next());
  filler.queries(q, c.q_gain);
  filler.keys(k);
  filler.keys(v);
  alibi_slopes = make_alibi(c);
  attn_bias = make_bias(c, dtype, random);
  learnable_sink = make_sink(c, dtype, random);
  lse = HostTensor::compact(DataType::kFloat32,
                            c.varlen() ? std::vector<int64_t>{c.num_heads, q.shape()[0]}
                                       : std::vector<int64_t>{c.batch, c.num_heads, c.seqlen_q});
  make_gradients(*this, c, dtype);
  Filler(c, *this, random.next()).queries(dout, 1.0);
  if (!c.s_dmask) return;
  const auto round_up = [](int64_t length) { return (length + 127) / 128 * 128; };
  s_dmask = HostTensor::compact(
      dtype, {c.sequences(), c.num_heads, round_up(c.max_q()), round_up(c.max_k())});
}

std::vector<const HostTensor*> CaseTensors::inputs() const {
  return {&q,
          &k,
          &v,
          &cu_seqlens_q,
          &cu_seqlens_k,
          &seqused_k,
          &block_table,
          &alibi_slopes,
          &attn_bias,
          &learnable_sink,
          &dout};
}

std::vector<HostTensor*> CaseTensors::outputs() { return {&out, &lse, &s_dmask}; }

std::vector<HostTensor*> CaseTensors::gradients() {
  return {&dq, &dk, &dv, &d_attn_bias, &d_learnable_sink};
}

}  // namespace fa::cases
