"""The GPUs of this machine, found without holding any of their memory."""
import os
import subprocess
from typing import NamedTuple

MEBIBYTE = 1 << 20
PATIENCE = 10  # seconds; a driver that is still asleep takes a few
QUERY = ("--query-gpu=index,uuid,memory.total,memory.free,name", "--format=csv,noheader,nounits")


class Gpu(NamedTuple):
    """One GPU; memory in bytes."""
    index: int  # as nvidia-smi counts, whatever CUDA_VISIBLE_DEVICES leaves
    name: str
    total: int
    free: int


def visible_gpus():
    """The GPUs that a process started now would see, in its order; [] where there are none.

    Asks `nvidia-smi`, because torch.cuda would take memory of every GPU that it looks at. Honours
    CUDA_VISIBLE_DEVICES as CUDA does: the first unknown name ends the list. Parts of a GPU (MIG)
    are not found.
    """
    found = _all_gpus()
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return [gpu for gpu, _ in found]
    visible = []
    for word in wanted.split(","):
        gpu = _named(word.strip(), found)
        if gpu is None or gpu in visible:
            break
        visible.append(gpu)
    return visible


def _all_gpus():
    """[(Gpu, its UUID)] of the machine."""
    try:
        shown = subprocess.run(
            ["nvidia-smi", *QUERY], capture_output=True, text=True, timeout=PATIENCE
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    if shown.returncode:
        return []
    found = []
    for line in shown.stdout.splitlines():
        cells = [cell.strip() for cell in line.split(",", 4)]  # a name may hold a comma
        if len(cells) == 5 and cells[0].isdigit():
            index, uuid, total, free, name = cells
            found.append((Gpu(int(index), name, _bytes(total), _bytes(free)), uuid))
    return found


def _named(word, found):
    """The GPU that a word of CUDA_VISIBLE_DEVICES names: its number, or the start of its UUID."""
    for gpu, uuid in found:
        if word == str(gpu.index) or (word.startswith("GPU-") and uuid.startswith(word)):
            return gpu
    return None


def _bytes(mebibytes):
    """Bytes of a number of MiB; where there is none, GPU and CPU share the machine's memory."""
    if mebibytes.isdigit():
        return int(mebibytes) * MEBIBYTE
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
