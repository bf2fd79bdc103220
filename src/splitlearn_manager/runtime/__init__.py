"""Where a model runs: the seam (`base`), and threads of this process (`thread`, with `warmup`)."""
