"""What a kernel may be handed: tensors whose memory says what they hold.

A kernel reads numbers at an address, by strides. That is not all there is to a tensor: its sign may
be pending, it may stand for zeros that were never written, its storage may have been freed under it
(FSDP frees a parameter's outside of its forward), and hooks on saved tensors may give them back in
another memory layout. PyTorch's own operators know all that. So every tensor of a call, in the
forward and in the backward, comes through `readable` before a kernel sees it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def readable(name: str, tensor: Tensor, in_rows: bool) -> Tensor:
    """The same numbers in memory that a kernel can read: the tensor itself, if it has them there.

    Args:
        name: what errors call it.
        tensor: any strides; of a dense layout.
        in_rows: whether its last dimension has to be contiguous.

    Raises:
        TypeError: the tensor is sparse or nested.
        ValueError: its storage is smaller than what would be read.
        NotImplementedError: it is batched by a vmap.
    """
    check_layout(name, tensor)
    if is_batched(tensor):
        raise NotImplementedError(f"{name}: expected a tensor that is not batched by vmap")
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if tensor._is_zerotensor():
        tensor = tensor.clone()
    if not is_stored(tensor):
        raise ValueError(
            f"{name}: expected a storage that holds the tensor's numbers, got one of "
            f"{tensor.untyped_storage().nbytes()} bytes for shape {list(tensor.shape)}, strides "
            f"{list(tensor.stride())}, offset {tensor.storage_offset()} and {tensor.dtype}: it was "
            "freed or resized, as FSDP does with a parameter outside of its module's forward"
        )
    return rows(tensor) if in_rows else tensor


def rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it, with a contiguous last dimension."""
    scattered = tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1
    return tensor.contiguous() if scattered else tensor


def overlaps(tensor: Tensor) -> bool:
    """Whether some of the tensor's numbers share their memory, as in a sliding window.

    What was expanded, with a stride of 0, is not meant: it reads as well as any other.
    """
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != 0:
            if stride < reach:
                return True
            reach += (size - 1) * stride
    return False


def is_stored(tensor: Tensor) -> bool:
    """Whether the tensor's storage holds all that its shape and strides speak of."""
    if tensor.numel() == 0:
        return True
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in steps)
    return tensor.untyped_storage().nbytes() >= (last + 1) * tensor.itemsize


def is_batched(tensor: Tensor) -> bool:
    """Whether a vmap, torch.func's or that of `is_grads_batched=True`, stands for a batch here."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def check_layout(name: str, tensor: Tensor) -> None:
    """Raise a TypeError unless the tensor is dense."""
    kind = None
    if tensor.is_nested:
        kind = "a nested tensor: pad it, or pack it and pass cu_seqlens_q and cu_seqlens_k"
    elif tensor.layout != torch.strided:
        kind = f"layout {tensor.layout}"
    elif type(tensor).__name__ == "MaskedTensor":
        kind = "a MaskedTensor: pass its data, and its mask as attn_mask"
    if kind is not None:
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")
