"""What `optimize` does to a loaded model: compile, freeze, bfloat16, or the best of them."""
