"""What the runtime `vm` is made of: talking to a Docker Engine, and everything that keeps a container within bounds.

`client` and `admin` speak to the Engine; `images` and `unpack` bring a task package into it; `init_program` is what keeps
a container up; `seccomp_profile`, `storage` and `meter` bound and measure what runs; `leftovers` clears up after
supervisors that died. Only exe-unit processes and command-line tools import this: the Engine's socket is as good as root,
and so it never meets the wallet's keys in one process.
Neighbour: `golem.exeunit.runtimes.vm.runtime`, which puts them together.
"""
