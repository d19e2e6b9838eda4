"""What touches the world: libp2p, chain, processes, REST, CLI and the wiring."""
