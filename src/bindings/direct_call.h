// Calls of a known kind, from Python without tvm-ffi in between.
#pragma once

namespace fa::bindings {

// `python` holds the addresses that a PythonInterface (direct_call.cc) has, in its order, and stays
// where it is. Returns the address of a function of Python with the calling convention
// METH_FASTCALL; null where PyTorch's functions are those of another DLPack, or lend no tensors
// without making objects. Its arguments are those of forward_with_kvcache(), first those that
// forward() has too, or those of backward(); ones at the end may be missing. It returns True where
// the call was of a kind that is known, and has run; else False, and nothing has happened or the
// same call by another way says what is wrong.
void* direct_call(const void* python, bool backward);

}  // namespace fa::bindings
