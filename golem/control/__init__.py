"""The node's side of the command line: the same nouns as `golem/cli`."""
