"""What the benchmarks share: the machine they run on, the daemons they start, the tables they print."""
