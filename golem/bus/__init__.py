"""The Unix socket by which processes of this machine reach their node, and where mail and streams go."""
