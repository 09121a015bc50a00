"""DFAR in PyTorch on padded batches, as a competent user would write it from the paper."""
