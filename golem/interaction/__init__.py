"""The shell and the services of a running activity: streams between requestor and exe-unit."""
