#include <flash_attn/flash_attn.h>
#include <stdio.h>
#include <string.h>

int main(void) {
  fa_attention_args args;
  fa_attention_args_init(&args);
  if (fa_forward(&args) != FA_INVALID_ARGUMENT) return 1;
  if (strstr(fa_last_error_message(), "q") == NULL) return 1;
  printf("FlashAttention-Plus %s from C, %d threads\n", fa_version(), (int)fa_num_threads(NULL));
  return 0;
}
