"""FHA with the means of PyTorch: the alternatives that dfar's kernels are compared with."""
