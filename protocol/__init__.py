"""What is said: typed messages, the property and constraint language, codec and signing. Pure."""
