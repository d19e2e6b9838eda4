"""How Python processes of ours are started: nothing that lies in a working directory or a stranger's home runs in them.

`python -m` looks for modules in the working directory first, and everybody's `usercustomize` stands in a folder below
HOME: so children get neither of the two, start in `CWD`, and are given our module path as absolute places.
"""

from __future__ import annotations

import os
import re
import site
import sys
from pathlib import Path

CWD = "/"
_ROOT = Path(__file__).resolve().parents[2]  # where the packages are, installed or not
_SECRETS = re.compile(r"(KEY|PASSWORD|PASSWD|SECRET|TOKEN|CREDENTIAL|AUTOCONF)")


def python_line(module: str, *arguments: str) -> list[str]:
    """Return the command line that runs one of our modules."""
    return [sys.executable, "-P", "-s", "-m", module, *arguments]


def child_environment() -> dict[str, str]:
    """Return the environment of our children: ours without anything secret, with the places of our modules."""
    env = {name: value for name, value in os.environ.items() if not _SECRETS.search(name.upper())}
    places = [str(_ROOT), *filter(os.path.isabs, env.get("PYTHONPATH", "").split(os.pathsep))]
    if site.ENABLE_USER_SITE and (user := site.getusersitepackages()) in sys.path:
        places.append(user)  # where we found what we need; without what stands there to run at every start
    env["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(places))
    return env
