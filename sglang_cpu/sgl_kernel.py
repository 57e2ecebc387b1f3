"""The one compiled SGLang kernel that dense models need on a CPU, in plain torch; the others raise
when called.

Installed as the package `sgl_kernel` of the CPU server environment: PyPI has no CPU build of the
real one, and SGLang imports several of its names when SGLANG_USE_CPU_ENGINE=1. Mixture-of-experts
models, speculative decoding and deterministic sampling would call what is not here, and say so.
"""

__version__ = "0.0.0"


def assign_req_to_token_pool_cpu(requests, table, starts, ends, locations, pool_length):
    """table[requests[i], starts[i]:ends[i]] = the next ends[i] - starts[i] of `locations`, in
    place.
    """
    lengths = (ends - starts).tolist()
    spans = zip(requests.tolist(), starts.tolist(), lengths, locations.split(lengths), strict=True)
    for request, start, length, span in spans:
        table[request, start : start + length] = span.to(table.dtype)


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(
            f"sgl_kernel.{name} has no CPU version; this environment serves dense models only"
        )

    return missing
