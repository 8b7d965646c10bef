/* FlashAttention-Plus: the C interface, and the only ABI of the library.
 *
 * Every function that can fail returns an fa_status; the message of a thread's last failure is
 * fa_last_error_message(). Nothing is written to the outputs of a call that returns
 * FA_INVALID_ARGUMENT or FA_UNSUPPORTED.
 *
 * Any function may be called from any number of threads at once, on outputs of their own. A thread
 * that has made calls on the CPU keeps up to 64 MiB of memory for the next ones.
 *
 * What a call computes, for query i of Sq and key j of Sk (Dao et al., "FlashAttention", 2022):
 *   s_ij = scale * <q_i, k_j>, then softcap * tanh(s_ij / softcap), then
 *          - slope_h * |i + Sk - Sq - j| and + attn_bias_ij
 *   i sees j where i + Sk - Sq - window_size_left <= j <= i + Sk - Sq + window_size_right; causal
 *          is a window_size_right of 0. A key under a bias of -infinity, or false, is not seen.
 *   lse_i = ln(sum_j exp(s_ij) + exp(sink_h)) over the keys that i sees and the sink, if any
 *   out_i = sum_j P_ij M_ij v_j, where P_ij = exp(s_ij - lse_i) and dropout's M_ij is 0 or
 *           1 / (1 - p)
 * A query that sees no key has out 0 and lse +infinity, or sink_h. Key head h / (H / Hk) serves
 * query head h. Rows of varlen tensors behind the last sequence belong to none: 0 and +infinity.
 */
#ifndef FLASH_ATTN_FLASH_ATTN_H_
#define FLASH_ATTN_FLASH_ATTN_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define FA_API __declspec(dllexport)
#else
#define FA_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum fa_status {
  FA_OK = 0,
  FA_INVALID_ARGUMENT = 1, /* a shape, a value or a name that the caller can mend */
  FA_UNSUPPORTED = 2,      /* a right request that nothing on this machine serves */
  FA_OUT_OF_MEMORY = 3,
  FA_DEVICE_ERROR = 4,
  FA_INTERNAL = 5
} fa_status;

/* DLPack's type codes. */
enum { FA_INT = 0, FA_UINT = 1, FA_FLOAT = 2, FA_BFLOAT = 4, FA_BOOL = 6 };
/* DLPack's device types. */
enum { FA_CPU = 1, FA_CUDA = 2 };

/* A tensor that the caller owns. Field for field DLPack's DLTensor, so a `const DLTensor*` may be
 * passed where a `const fa_tensor*` is asked for. */
typedef struct fa_tensor {
  void* data;
  int32_t device_type; /* FA_CPU, FA_CUDA */
  int32_t device_id;
  int32_t ndim;
  uint8_t dtype_code; /* FA_FLOAT, FA_BFLOAT, ... */
  uint8_t dtype_bits;
  uint16_t dtype_lanes;   /* 1 */
  const int64_t* shape;   /* elements */
  const int64_t* strides; /* elements; NULL: row-major without gaps */
  uint64_t byte_offset;   /* where the first element lies, from data */
} fa_tensor;

/* One attention call. Start from fa_attention_args_init(), then set what is wanted; a NULL tensor
 * is an option that is not used.
 *
 * Shapes (B batch, Sq/Sk sequence lengths, H/Hk heads of q and of k and v, H % Hk == 0, D/Dv
 * head_dim of q and k and of v and out):
 *   dense:  q [B, Sq, H, D]    k [B, Sk, Hk, D]    v [B, Sk, Hk, Dv]    out [B, Sq, H, Dv]
 *   varlen: q [total_q, H, D]  k [total_k, Hk, D]  v [total_k, Hk, Dv]  out [total_q, H, Dv]
 *   paged: k [num_blocks, page_size, Hk, D], v [num_blocks, page_size, Hk, Dv], with block_table;
 *          q is varlen, or dense over a KV cache
 * q, k, v and out share one dtype: fp32, fp16 or bf16; D and Dv are in [1, 512] on the CPU, in
 * [1, 256] on a GPU. Strides are at least 0, that of the last dimension is 1, and data is aligned
 * to its elements. What is written must overlap neither itself nor anything else of the call; that
 * is not checked, but for broadcast dimensions. */
typedef struct fa_attention_args {
  size_t struct_size; /* sizeof(fa_attention_args), set by fa_attention_args_init() */

  const fa_tensor* q;
  const fa_tensor* k;
  const fa_tensor* v;
  const fa_tensor* out;
  const fa_tensor* lse; /* [B, H, Sq], varlen [H, total_q]; fp32; natural logarithm */
  /* [B, H, Sq rounded up to 128, Sk rounded up to 128], q's dtype: exp(s_ij - max_j s_ij), negative
   * (-0 too) where dropout drops it, 0 where i does not see j. Slow, for tests. */
  const fa_tensor* s_dmask;

  const fa_tensor* cu_seqlens_q; /* int32 [B + 1]; with cu_seqlens_k: varlen */
  const fa_tensor* cu_seqlens_k; /* int32 [B + 1] */
  const fa_tensor* seqused_k;    /* int32 [B]: keys in use of each sequence; varlen */
  const fa_tensor* block_table;  /* int32 [B, max_blocks]: pages of each sequence */
  int64_t max_seqlen_q;          /* varlen: at least the longest sequence; else not looked at */
  int64_t max_seqlen_k;

  const fa_tensor* alibi_slopes; /* fp32 [H] or [B, H] */
  /* Broadcastable to [B, H, Sq, Sk], 1 to 4 dimensions; fp32 or q's dtype; bool or uint8: keep
   * where not 0. Varlen: Sq and Sk are max_seqlen_q and max_seqlen_k. Over a KV cache Sk is what a
   * row has room for, and column j belongs to the j-th token behind cache_leftpad. */
  const fa_tensor* attn_bias;
  const fa_tensor* learnable_sink; /* [H], fp32 or q's dtype */

  /* Not NULL: q is dense, and k [batch_cache, seqlen_cache, Hk, D] and v are a KV cache, or pages
   * with block_table; batch b attends to the cache_seqlens[b] tokens of its row and to those
   * appended. int32 [B]. */
  const fa_tensor* cache_seqlens;
  /* int32 [B]: the row of the cache of each batch; NULL: b. With k_new and v_new no row twice, and
   * no page appended to twice. */
  const fa_tensor* cache_batch_idx;
  const fa_tensor* cache_leftpad; /* int32 [B]: tokens to skip at the start of a row; NULL: 0 */
  const fa_tensor* k_new;         /* [B, Snew, Hk, D]: written to k behind the cached tokens */
  const fa_tensor* v_new;         /* [B, Snew, Hk, Dv]: written to v */
  /* [positions, rotary_dim / 2], fp32 or q's dtype: rotary embedding of k_new at positions
   * cache_seqlens + t, and of q there too if causal or windowed, else all at cache_seqlens. */
  const fa_tensor* rotary_cos;
  const fa_tensor* rotary_sin;
  int32_t rotary_interleaved; /* pairs (0, 1), (2, 3)...; 0: (d, d + rotary_dim / 2) */
  int64_t num_splits;         /* of the keys; 0: chosen, 1: none */

  const double* softmax_scale; /* NULL: D^-1/2 */
  int32_t causal;
  int64_t window_size_left; /* -1: unbounded */
  int64_t window_size_right;
  double softcap;   /* 0: none */
  double dropout_p; /* in [0, 1); what is kept has a probability in whole 65536ths, at least one */
  uint64_t dropout_seed;
  uint64_t dropout_offset;

  /* "cpu", "cpu:avx2", "reference" (forward only); NULL: FLASH_ATTENTION_BACKEND or the best; "":
   * the best */
  const char* backend;
  void* stream; /* a CUDA stream; ignored on the CPU */
  /* On a GPU: gives `bytes` of memory on q's device, aligned to 64 bytes, that stays until what the
   * call enqueues on `stream` is done, of a captured graph as long as it may be replayed; NULL
   * where there is none. Asked at most once. A KV cache with rotary embedding needs memory, and so
   * do splits; for 8 bytes, varlen calls and causal ones with many tiles are faster. */
  void* (*allocate_workspace)(void* context, int64_t bytes);
  void* workspace_context;
} fa_attention_args;

FA_API void fa_attention_args_init_sized(fa_attention_args* args, size_t struct_size);

/* No tensors, no options, windows of -1, rotary_interleaved 1; all else is 0 or NULL. Inline, so
 * that struct_size is what the caller was compiled with: a library of another version then refuses
 * the call in place of misreading it. */
static inline void fa_attention_args_init(fa_attention_args* args) {
  fa_attention_args_init_sized(args, sizeof(fa_attention_args));
}

/* Computes out, and lse and s_dmask where they are given. Returns when they are written (CPU) or
 * enqueued (GPU). */
FA_API fa_status fa_forward(const fa_attention_args* args);

/* fa_forward(), if the calling thread has made a call of this kind before: one that differs in
 * nothing but where the tensors lie (alignment to 16 bytes apart), what they hold, the seed and the
 * offset of dropout, and the stream. Such a call costs neither checks nor decisions. Else *ran is 0
 * and nothing has happened. Never known are calls on the CPU with lengths or pages, whose values
 * are checked, and those with a tensor whose strides are NULL or with a head_dim of 1. */
FA_API fa_status fa_forward_known(const fa_attention_args* args, int32_t* ran);

/* The fp64 oracle that every backend is tested against: the same call, computed straight from the
 * formula; over a KV cache without k_new. `out`, `lse` and `bound` are fp64 tensors of the shapes
 * of out, lse and out; each may be NULL, and else is row-major without gaps. bound is sum_j P_ij
 * |v_jd|, which normalises the error of out. args->out, args->lse and args->s_dmask are ignored.
 * CPU only; slow. */
FA_API fa_status fa_forward_oracle(const fa_attention_args* args, const fa_tensor* out,
                                   const fa_tensor* lse, const fa_tensor* bound);

/* Which implementation would run the call, and why each other one would not. Writes a line per
 * candidate, NUL-terminated and cut at `capacity`; *needed, if not NULL, gets the bytes for all of
 * it. The tensors' data pointers are not followed unless the checks of fa_forward() read them, but
 * must not be NULL. */
FA_API fa_status fa_explain(const fa_attention_args* args, char* text, size_t capacity,
                            size_t* needed);

/* The gradients of one attention call: what goes in, dout, and what comes out. Start from
 * fa_attention_gradients_init(). Each has the shape and the dtype of what it is the gradient of, on
 * q's device; any strides with a contiguous last dimension, and those that are written without
 * broadcast dimensions. They must not overlap each other or the call's tensors. */
typedef struct fa_attention_gradients {
  size_t struct_size; /* sizeof(fa_attention_gradients), set by fa_attention_gradients_init() */

  const fa_tensor* dout; /* of out; read */
  const fa_tensor* dq;   /* of q, k and v; written */
  const fa_tensor* dk;
  const fa_tensor* dv;
  const fa_tensor* d_attn_bias;      /* of attn_bias, summed where it was broadcast to
                                        [B, H, Sq, Sk]; written; may be NULL; not of a bool one */
  const fa_tensor* d_learnable_sink; /* of learnable_sink; written; may be NULL */

  int32_t deterministic; /* bitwise equal from run to run; the CPU always is */
} fa_attention_gradients;

FA_API void fa_attention_gradients_init_sized(fa_attention_gradients* gradients,
                                              size_t struct_size);

/* No tensors; see fa_attention_args_init(). */
static inline void fa_attention_gradients_init(fa_attention_gradients* gradients) {
  fa_attention_gradients_init_sized(gradients, sizeof(fa_attention_gradients));
}

/* The gradients of sum(dout * out) by q, k, v, attn_bias and learnable_sink, after Dao,
 * "FlashAttention-2" (2023), section 3.1.2: the probabilities P are computed anew from lse, so the
 * memory it takes grows linearly with the sequence lengths. With S = scale * q k^T and dropout's
 * mask M (1 / (1 - p) where it keeps):
 *   dP = M * (dout v^T)    delta_i = sum_d dout_id out_id    dS = P * (dP - delta)
 *   dq = scale * dS k      dk = scale * dS^T q               dv = (P * M)^T dout
 *   d_attn_bias = dS       d_learnable_sink_h = -sum_i exp(sink_h - lse_i) delta_i
 * and softcap's derivative on the way from dS to dq and dk. alibi_slopes are constants. Queries
 * that see no key, and rows of varlen tensors that belong to no sequence, get 0.
 *
 * `args` is what fa_forward() was called with, dropout_seed and dropout_offset included; out and
 * lse, both required, are as it wrote them, and are only read. s_dmask must be NULL. Paged k and v
 * and a KV cache are FA_UNSUPPORTED. Returns when the gradients are written (CPU) or enqueued
 * (GPU). */
FA_API fa_status fa_backward(const fa_attention_args* args,
                             const fa_attention_gradients* gradients);

/* fa_backward(), if the calling thread has made a call of this kind before, as fa_forward_known()
 * has it. */
FA_API fa_status fa_backward_known(const fa_attention_args* args,
                                   const fa_attention_gradients* gradients, int32_t* ran);

/* The fp64 oracle of fa_backward(), on the CPU, slowly. gradients->dout is in q's dtype; the others
 * are fp64 tensors, row-major without gaps, in the shapes that fa_backward() has them in; each may
 * be NULL. `bounds`, which may be NULL, alike: it gets the same formulas with absolute values in
 * place of signed ones, by which the errors of the gradients are normalised; its dout is ignored.
 * args->out, args->lse and args->s_dmask are ignored: the forward is computed in fp64 too. */
FA_API fa_status fa_backward_oracle(const fa_attention_args* args,
                                    const fa_attention_gradients* gradients,
                                    const fa_attention_gradients* bounds);

/* fa_explain() of a call of fa_backward(). */
FA_API fa_status fa_explain_backward(const fa_attention_args* args,
                                     const fa_attention_gradients* gradients, char* text,
                                     size_t capacity, size_t* needed);

/* The checks of fa_forward(), or with `gradients` of fa_backward(), and nothing else: for those who
 * compute a call by other means. On any device, CPU or not. Where `values_are_real` is 0 the
 * tensors stand for others: lengths, rows and page numbers are not looked at, nor any other data;
 * a pointer to it is any aligned one that is not NULL. */
FA_API fa_status fa_validate(const fa_attention_args* args, const fa_attention_gradients* gradients,
                             int32_t values_are_real);

/* The names of the implementations for a device type, best first; NULL past the end. */
FA_API const char* fa_implementation_name(int32_t device_type, int32_t index);

/* 1 where this machine can run the implementation; 0 else, and then `reason` (if not NULL) gets a
 * static text that says why. */
FA_API int32_t fa_implementation_available(int32_t device_type, int32_t index, const char** reason);

/* Threads that a CPU call uses at most, and where they come from ("own pool", "OpenMP runtime of
 * the process", "the caller's pool"). */
FA_API int32_t fa_num_threads(const char** source);

/* Threads of the caller's. */
typedef struct fa_thread_pool {
  void* context;
  /* How many may take part in a call, the calling thread among them: at least 1. Asked once for
   * each call, on the calling thread. */
  int32_t (*num_threads)(void* context);
  /* Calls body(body_context, task, thread) once for each task in [0, num_tasks), in any order, and
   * returns when all calls have. `thread` is in [0, max_threads), and the same for no two calls at
   * once. Fewer threads may do it, also the calling one alone. May be called from several threads
   * at once, as fa_forward() may. */
  void (*run)(void* context, int64_t num_tasks, int32_t max_threads,
              void (*body)(void* body_context, int64_t task, int32_t thread), void* body_context);
} fa_thread_pool;

/* From now on calls on the CPU run on these threads, so that a program that has a pool keeps one
 * set of them; NULL: on the library's own again. The functions and what context points to must last
 * as long as calls. */
FA_API fa_status fa_use_thread_pool(const fa_thread_pool* pool);

/* Adopts the OpenMP runtime in the shared library at `path`, which must be loaded in the process
 * already, so that the process keeps one set of threads. FA_UNSUPPORTED where it has none. */
FA_API fa_status fa_use_openmp_runtime(const char* path);

/* From now on no call uses more CPU threads than count() says, which is asked on the calling thread
 * at each call: a framework's own setting. NULL: no such limit. Never fails. */
FA_API void fa_use_thread_count(int32_t (*count)(void));

/* How fast this machine can be at most, measured in about half a second: *per_second gets what
 * num_threads threads do together, the best of several runs. num_threads 0: as many as a call uses.
 *   "fp32_fma"     fp32 multiply-adds of the widest vectors, from registers; FLOP/s
 *   "bf16_dot"     bf16 dot products into fp32, vector instructions; FLOP/s
 *   "amx_bf16"     bf16 products of AMX tiles, each with its loads from L1; FLOP/s
 *   "memory_read"  reads of more memory than the caches hold; bytes/s
 * FA_UNSUPPORTED where the machine or the build lacks the kind. */
FA_API fa_status fa_measure_ceiling(const char* kind, int32_t num_threads, double* per_second);

/* Names a folder that NVIDIA's run-time compiler (libnvrtc) may lie in, beside those that the
 * system searches; folders named first are looked at first. To be called before the first CUDA
 * call. */
FA_API fa_status fa_add_nvrtc_folder(const char* folder);

/* The calling thread's last failure; "" if there was none. Valid until its next call. */
FA_API const char* fa_last_error_message(void);

FA_API const char* fa_version(void);

#ifdef __cplusplus
}
#endif

#endif /* FLASH_ATTN_FLASH_ATTN_H_ */
