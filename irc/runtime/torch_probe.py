"""What torch says of this machine: `python -P torch_probe.py`.

It runs in a process of its own, because importing torch takes seconds and a server may not have it. It imports nothing
of `irc`. The last line of stdout is a JSON object with `build`, `devices` and `threads`.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any


def probe() -> dict[str, Any]:
    """Return the CUDA version torch is built with (null without CUDA), its CUDA devices, and its threads."""
    import torch

    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            capability = f"{properties.major}.{properties.minor}"
            devices.append([properties.name, capability, total, free])
    return {"build": torch.version.cuda, "devices": devices, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        found = probe()
    sys.stdout.write(json.dumps(found) + "\n")
