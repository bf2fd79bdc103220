"""What runs in worker processes, and in the process that forks them."""
