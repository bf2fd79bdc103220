"""The wire: `compute.proto`, written by hand, and the stubs that `make stubs` generates from it."""
