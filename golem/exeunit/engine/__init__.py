"""What the runtime `vm` is made of: talking to a Docker Engine, and everything that keeps a container within bounds.

`client` and `admin` speak to the Engine; `images`, `squashfs` and `archives` bring a task package into it;
`seccomp_profile`, `storage` and `meter` bound and measure what runs; `leftovers` clears up after supervisors that died.
Neighbour: `golem.exeunit.runtimes.vm`, which puts them together.
"""
