"""What is decided: one pure machine a subsystem, run by the kernel."""
