"""The workshop: decides in plain Python (upper half), computes in torch (lower half)."""
