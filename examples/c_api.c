/* Causal attention of (2, 256, 8, 64) in fp32 from C99. */
#include <stdio.h>
#include <stdlib.h>

#include "flash_attn/flash_attn.h"

enum { kBatch = 2, kSeqlen = 256, kHeads = 8, kDim = 64 };
enum { kElements = kBatch * kSeqlen * kHeads * kDim };

static const int64_t kShape[4] = {kBatch, kSeqlen, kHeads, kDim};

static fa_tensor make_tensor(float* data) {
  fa_tensor tensor = {0}; /* strides stay NULL: row-major without gaps */
  tensor.data = data;
  tensor.device_type = FA_CPU;
  tensor.ndim = 4;
  tensor.dtype_code = FA_FLOAT;
  tensor.dtype_bits = 32;
  tensor.dtype_lanes = 1;
  tensor.shape = kShape;
  return tensor;
}

int main(void) {
  float* memory = malloc(4 * kElements * sizeof(float)); /* q, k, v, out */
  if (memory == NULL) return 1;
  for (int i = 0; i < 3 * kElements; ++i) memory[i] = 2.0f * rand() / (float)RAND_MAX - 1.0f;

  fa_tensor q = make_tensor(memory), k = make_tensor(memory + kElements);
  fa_tensor v = make_tensor(memory + 2 * kElements), out = make_tensor(memory + 3 * kElements);
  fa_attention_args args;
  fa_attention_args_init(&args);
  args.q = &q;
  args.k = &k;
  args.v = &v;
  args.out = &out;
  args.causal = 1;

  char explanation[2048];
  const int ok = fa_explain(&args, explanation, sizeof(explanation), NULL) == FA_OK &&
                 fa_forward(&args) == FA_OK;
  if (ok) {
    const float* result = memory + 3 * kElements;
    printf("FlashAttention-Plus %s\n%s\n", fa_version(), explanation);
    printf("out[0, 0, 0, :4] = %.4f %.4f %.4f %.4f\n", result[0], result[1], result[2], result[3]);
  } else {
    fprintf(stderr, "%s\n", fa_last_error_message());
  }
  free(memory);
  return ok ? 0 : 1;
}
