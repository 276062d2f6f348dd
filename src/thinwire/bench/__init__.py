"""The benchmarks: ours and the peer in turns in one run, flat rows."""
