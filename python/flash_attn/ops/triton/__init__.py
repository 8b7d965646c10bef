"""The operators that the original wrote in Triton, under the same names; Triton is not needed."""
