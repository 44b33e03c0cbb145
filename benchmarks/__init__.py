"""Benchmarks: this package against the floor, Go's locks, and everything one could use instead (``make bench``)."""
