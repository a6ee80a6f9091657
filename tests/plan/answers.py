"""What a compiler might say of a step, made by hand."""

PEAK = 459e12
"""FLOP/s of a v5p chip (GOOGLE, v5p), which is one device."""


def answer(seconds=1.0, used=10e9, fits=True, collectives=(), devices=8):
    """Of a step that computes so long on every device of a v5p, and takes so many bytes."""
    memory = {
        "arguments": int(used / 2),
        "outputs": 0,
        "temporaries": int(used / 2),
        "code": 0,
        "used": int(used),
        "donated": 0,
    }
    flops = int(seconds * PEAK)
    return {
        "devices": devices, "device_kind": "TPU v5", "tokens": 1, "executed_flops": flops, "open_loops": 0, "argument_bytes": int(used / 2),
        "lower_seconds": 1.0, "fits": fits, "compile_seconds": 2.0, "memory": memory if fits else {"used": int(used), "room": int(102e9)},
        "flops": {"products": flops, "kernels": 0, "total": flops}, "kernels": {}, "kernels_without_estimate": [],
        "collectives": list(collectives), "seconds": 3.0, "peak_gb": 1.0, "versions": {},
    }  # fmt: skip


def row(kind, axes, devices, wire):
    """A collective that runs once and sends so many bytes."""
    return {
        "kind": kind,
        "axes": list(axes),
        "devices": devices,
        "times": 1,
        "apart": 0,
        "bytes": int(wire),
        "wire": float(wire),
    }
