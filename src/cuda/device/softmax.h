// The online softmax over a warp's rows (Milakov and Gimelshein, arXiv:1805.02867), and dropout.
#pragma once

#include "cuda/device/mma.h"
#include "cuda/device/score.h"

namespace fa::cuda {

// Of the rows that a lane holds: 2 per 16-row tile. `sum` is over the lane's own keys until
// finish(); scores are in units of 1 / scale_log2 inside 2^x. What has been summed so far is to be
// multiplied by `rescale` after each update().
template <int kTilesM>
struct OnlineSoftmax {
  float max[kTilesM][2];
  float sum[kTilesM][2];
  float rescale[kTilesM][2];

  __device__ void clear() {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      max[m][0] = max[m][1] = -kInfinity;
      sum[m][0] = sum[m][1] = 0.0f;
    }
  }

  // Turns scores into probabilities relative to the new maximum.
  template <int kTilesN>
  __device__ void update(Accumulator<kTilesM, kTilesN>& s, float scale_log2) {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Two chains: one is as long as the instruction's latency times kTilesN.
        float highest = max[m][half], other = highest;
#pragma unroll
        for (int n = 0; n < kTilesN; ++n) {
          float& chain = n % 2 == 0 ? highest : other;
          chain = fmaxf(chain, fmaxf(s.at[m][n][2 * half], s.at[m][n][2 * half + 1]));
        }
        highest = fmaxf(highest, other);
        highest = fmaxf(highest, shuffle_xor(highest, 1));
        highest = fmaxf(highest, shuffle_xor(highest, 2));
        // A row that has seen no key yet stays at 2^-infinity.
        const float offset = highest == -kInfinity ? 0.0f : highest * scale_log2;
        // Exactly 1 where no key was seen, which the difference, rounded once, would miss; and
        // spelled out, since whether a compiler contracts it depends on the kernel.
        const float change = fmaf(max[m][half], scale_log2, -offset);
        rescale[m][half] = max[m][half] == highest ? 1.0f : exp2_approx(change);
        max[m][half] = highest;
        float total = 0.0f;
#pragma unroll
        for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            s.at[m][n][e] = exp2_approx(s.at[m][n][e] * scale_log2 - offset);
            total += s.at[m][n][e];
          }
        }
        sum[m][half] = sum[m][half] * rescale[m][half] + total;
      }
    }
  }

  template <int kTilesO>
  __device__ void apply_rescale(Accumulator<kTilesM, kTilesO>& o) const {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int n = 0; n < kTilesO; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) o.at[m][n][e] *= rescale[m][e / 2];
      }
    }
  }

  // Joins the lanes' sums and the sink. Afterwards `sum` is what o is to be multiplied by, and
  // `max` the row's log-sum-exp, natural. `sink(m, half)` is asked for where there are sinks.
  template <class Sink>
  __device__ void finish(float scale_log2, bool has_sink, Sink&& sink) {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float total = sum[m][half];
        total += shuffle_xor(total, 1);
        total += shuffle_xor(total, 2);
        float highest = max[m][half] == -kInfinity ? -kInfinity : max[m][half] * scale_log2;
        float factor = 1.0f;
        if (has_sink) {
          const float sink_log2 = sink(m, half) * kLog2e;
          const float joint = join_sink(highest, sink_log2);
          factor = exp2_approx(highest - joint);
          total = total * factor + exp2_approx(sink_log2 - joint);
          highest = joint;
        }
        const bool empty = !has_sink && highest == -kInfinity;
        // Both are 0 where there is no term but a sink of -infinity, whose log-sum-exp that is.
        sum[m][half] = empty ? 0.0f : factor / fmaxf(total, 1e-30f);
        max[m][half] = empty ? kInfinity : (highest + log2_approx(total)) * kLn2;
      }
    }
  }
};

// Zeroes the dropped probabilities. The four lanes that hold a row's 8 neighbouring keys need one
// word each of one draw: each lane draws for one of four column tiles, and they exchange words. Of
// column tiles that are no multiple of four, some draw for none.
template <int kTilesM, int kTilesN>
__device__ inline void apply_dropout(Accumulator<kTilesM, kTilesN>& p, const DropoutArgs& args,
                                     Index batch_head, int first_row, int first_key, int lane) {
  // A half is kept when it is below the threshold, which is 65536 where all are: in the upper half
  // of a word, one less fits.
  const Word last_kept = (args.threshold << 16) - 1;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + m * 16 + lane / 4 + half * 8;
#pragma unroll
      for (int n = 0; n < kTilesN; n += 4) {
        semantics::Draw draw = semantics::dropout_draw(
            args.key, batch_head, row, first_key + (n + lane % 4) * semantics::kKeysPerDraw);
        transpose_quad(draw.word, lane);
#pragma unroll
        for (int tile = 0; tile < 4 && n + tile < kTilesN; ++tile) {
          float(&values)[4] = p.at[m][n + tile];
          const Word word = draw.word[tile];
          if (word << 16 > last_kept) values[2 * half] = 0.0f;
          if (word > last_kept) values[2 * half + 1] = 0.0f;
        }
      }
    }
  }
}

}  // namespace fa::cuda
