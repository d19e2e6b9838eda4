"""Images of strangers, read with suspicion in a locked-down child and written anew."""
