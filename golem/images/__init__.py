"""Images of this node's user: stored by tag and hash, served to providers."""
