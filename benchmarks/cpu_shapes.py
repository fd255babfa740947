"""The shapes that the C++ kernels are measured on: a covering list, small enough for two cores."""

from benchmarks.providers import Shape

MHA, GQA = {"H": 8, "H_kv": 8}, {"H": 8, "H_kv": 2}
LONG_MHA, LONG_GQA = {"H": 4, "H_kv": 4}, {"H": 4, "H_kv": 1}  # fewer heads: seconds, not minutes
SHAPES = {
    "prefill": (
        Shape(B=1, **MHA, M=128, C=0, P=16, D=64),
        Shape(B=1, **GQA, M=128, C=0, P=2048, D=64),
        Shape(B=4, **MHA, M=128, C=0, P=128, D=128),
        Shape(B=16, **GQA, M=128, C=0, P=512, D=64),
        Shape(B=16, **MHA, M=128, C=0, P=16, D=128),
        Shape(B=16, **LONG_GQA, M=128, C=0, P=2048, D=64),
        Shape(B=8, **MHA, M=256, C=0, P=32, D=64),
        Shape(B=4, **GQA, M=256, C=0, P=1024, D=128),
        Shape(B=1, **GQA, M=512, C=0, P=64, D=128),
        Shape(B=4, **GQA, M=512, C=0, P=16, D=64),
        Shape(B=2, **MHA, M=512, C=0, P=1024, D=64),
        Shape(B=1, **MHA, M=1024, C=0, P=128, D=64),
        Shape(B=2, **LONG_GQA, M=1024, C=0, P=512, D=128),
        Shape(B=1, **GQA, M=2048, C=0, P=16, D=64),
        Shape(B=1, **LONG_MHA, M=2048, C=0, P=256, D=128),
        Shape(B=1, **LONG_GQA, M=2048, C=0, P=2048, D=128),
    ),
    "decode": (
        Shape(B=1, **MHA, M=1, C=128, P=16, D=64),
        Shape(B=1, **GQA, M=1, C=1024, P=128, D=128),
        Shape(B=1, **MHA, M=1, C=4096, P=2048, D=64),
        Shape(B=2, **GQA, M=1, C=4096, P=16, D=64),
        Shape(B=4, **MHA, M=1, C=512, P=128, D=128),
        Shape(B=8, **GQA, M=1, C=128, P=512, D=64),
        Shape(B=8, **MHA, M=1, C=512, P=1024, D=128),
        Shape(B=8, **GQA, M=1, C=2048, P=2048, D=128),
        Shape(B=16, **GQA, M=1, C=128, P=2048, D=128),
        Shape(B=16, **MHA, M=1, C=1024, P=512, D=64),
        Shape(B=16, **GQA, M=1, C=4096, P=1024, D=64),
    ),
    "peak": (Shape(B=1, **MHA, M=2048, C=0, P=16, D=128),),
    "overhead": (Shape(B=1, **MHA, M=1, C=15, P=16, D=64),),
    "memory": tuple(Shape(B=B, **MHA, M=128, C=0, P=2048, D=128) for B in (1, 2, 4, 8, 16)),
}
# What is timed of each shape.
PASSES = {
    "prefill": ("fwd", "fwd+bwd"),
    "decode": ("fwd",),
    "peak": ("fwd", "bwd"),
    "overhead": ("fwd",),
}
FLOAT32_ONLY = ("overhead", "memory")
