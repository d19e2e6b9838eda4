"""What every room may use: how children start, clocks, hosts and ports of this machine, what may be printed."""
