"""Files into, out of and past an activity, and task packages."""
