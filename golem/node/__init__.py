"""What edges use of a running node, and what is its own: identity, app-keys, folders, gossip, backup."""
