"""Prints which packages an interpreter has and what torch says of the GPU, as one JSON object.

It runs in any environment, so it imports nothing of ours: `python packages.py NAME ...`, the
distributions to look for. With `--import`, Transformer Engine is imported, too.
"""

import ctypes
import importlib
import importlib.metadata
import json
import os
import platform
import re
import sys


def distributions(names):
    """By name: version, Requires-Python and requirements of those that are installed.

    What the first of them asks for is looked for, too.
    """
    result = {}
    names = list(names)
    for name in names:  # which grows by what the first one asks for
        if name in result:
            continue
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        result[name] = {
            "version": found.version,
            "python": found.metadata.get("Requires-Python"),
            "requires": found.requires or [],
        }
        if name == names[0]:
            required = (re.match(r"[\w.-]+", text).group() for text in found.requires or [])
            names += [re.sub(r"[-_.]+", "-", other).lower() for other in required]
    return result


def attempt(call):
    """The value of a call, or None where this torch, or this machine, has none."""
    try:
        return call()
    except Exception:
        return None


def cublas(major):
    """The version of cuBLAS that torch has loaded, as text."""
    library = ctypes.CDLL(f"libcublas.so.{major}")
    numbers = []
    for part in range(3):  # MAJOR_VERSION, MINOR_VERSION, PATCH_LEVEL
        number = ctypes.c_int()
        if library.cublasGetProperty(part, ctypes.byref(number)) != 0:
            return None
        numbers.append(str(number.value))
    return ".".join(numbers)


def driver_cuda():
    """The newest CUDA that the driver supports, as [major, minor]; None without a driver."""
    number = ctypes.c_int()
    if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return [number.value // 1000, number.value % 1000 // 10]


def gpus(torch):
    """What torch sees of the GPUs: a list, and why it sees none (None if it sees some)."""
    if torch.version.cuda is None:
        return [], "torch is a build for CPUs"
    try:
        # Unlike torch's question whether there is a GPU, this one raises the reason.
        count = torch._C._cuda_getDeviceCount()
    except Exception as error:
        return [], " ".join(str(error).split())
    result = []
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        peers = [
            other
            for other in range(count)
            if other != index and torch.cuda.can_device_access_peer(index, other)
        ]
        result.append(
            {
                "name": properties.name,
                "capability": [properties.major, properties.minor],
                "free": free,
                "total": total,
                "peers": peers,
            }
        )
    return result, None


def torch_facts():
    """What torch says of itself and of the GPUs; {"error": ...} where it cannot be imported."""
    try:
        torch = importlib.import_module("torch")
    except Exception as error:
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    cuda = torch.version.cuda
    seen, unseen = gpus(torch)
    nccl = attempt(lambda: torch.cuda.nccl.version()) if cuda else None
    return {
        "version": torch.__version__,
        "cuda": cuda,
        "hip": torch.version.hip,
        "cudnn": attempt(lambda: torch.backends.cudnn.version()),
        "cublas": attempt(lambda: cublas(cuda.split(".")[0])) if cuda else None,
        "nccl": None if nccl is None else ".".join(map(str, nccl)),
        "architectures": attempt(lambda: torch.cuda.get_arch_list()) or [],
        "gpus": seen,
        "no_gpu": unseen,
    }


def transformer_engine():
    """Why Transformer Engine's part for torch cannot be imported; None if it can."""
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return None


def main(arguments):
    # What libraries print on being imported must not mix with the answer.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    names = [name for name in arguments if not name.startswith("--")]
    facts = {
        "python": platform.python_version(),
        "distributions": distributions(names),
        "driver_cuda": attempt(driver_cuda),
    }
    facts["torch"] = torch_facts() if "torch" in facts["distributions"] else {"error": None}
    facts["transformer_engine"] = None
    if "--import" in arguments and facts["torch"].get("gpus"):
        facts["transformer_engine"] = transformer_engine()
    json.dump(facts, answer)
    answer.close()


if __name__ == "__main__":
    main(sys.argv[1:])
