"""SASRec and GRU4REC in PyTorch on padded batches, with the batches that dfar trains on."""
