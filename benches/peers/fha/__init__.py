"""FHA as a PyTorch user could compute it today: the alternatives that dfar's kernels are measured against."""
