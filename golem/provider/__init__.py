"""The provider agent: a process that sells this machine's computing power through its node's REST API."""
