"""A prefix beside images: the text side goes on behind it, wherever the images stand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from prefixattn import Prefix, attach

from .families import Family, build

IMAGE, PREFIX, LENGTH, NEW = 95, 5, 12, 6
SPECIAL = {
    "image_token_id": IMAGE,
    "video_token_id": 93,
    "vision_start_token_id": 94,
    "vision_end_token_id": 92,
}


def of_llava(model: Any) -> tuple[dict[str, Tensor], int]:
    """Pixels, and how many tokens they become."""
    vision = model.config.vision_config
    side = vision.image_size
    return {"pixel_values": torch.randn(1, 3, side, side).double()}, (
        side // vision.patch_size
    ) ** 2


def of_grids(model: Any) -> tuple[dict[str, Tensor], int]:
    """The same for models whose images have rows and columns of their own in the positions."""
    vision = model.config.vision_config
    side = vision.spatial_merge_size
    patch = 3 * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(2 * side * side, patch).double()
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 2 * side, side]])}, 2


MODELS = {"llava": of_llava} | dict.fromkeys(
    ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"), of_grids
)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_an_image_stands_behind_the_prefix_as_behind_its_text(name: str) -> None:
    transformers.logging.set_verbosity_error()
    model = build(Family(name, "multimodal"), **SPECIAL)
    torch.manual_seed(0)
    pixels, tokens = MODELS[name](model)
    text, ids = torch.randint(2, 60, (1, PREFIX)), torch.randint(2, 60, (1, LENGTH))
    ids[0, 2 : 2 + tokens] = IMAGE

    def inputs(row: Tensor) -> dict[str, Tensor]:
        kinds = {} if name == "llava" else {"mm_token_type_ids": (row == IMAGE).int()}
        return {"input_ids": row} | pixels | kinds

    def said(row: Tensor) -> tuple[Tensor, Tensor]:
        out = model.generate(
            **inputs(row), max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        return model(**inputs(row)).logits[:, -LENGTH:], out[:, -NEW:]

    logits, made = said(torch.cat([text, ids], dim=1))
    plain, _ = said(ids)
    attach(model, Prefix.from_text(model, text))
    found, same = said(ids)
    assert (plain - logits).abs().max() > 1e-2 * logits.abs().max()
    assert (found - logits).abs().max() < 1e-10 * logits.abs().max()
    assert torch.equal(same, made)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in MODELS if name != "llava"])
def test_places_of_rows_and_columns_are_kept(name: str) -> None:
    """Three numbers a token, or four with the token's own first; the caller's jump in places."""
    transformers.logging.set_verbosity_error()
    model = build(Family(name, "multimodal"), **SPECIAL)
    torch.manual_seed(0)
    text, ids = torch.randint(2, 60, (1, PREFIX)), torch.randint(2, 60, (2, LENGTH))
    token = torch.arange(LENGTH)
    own = token + 16 * (token >= 4)
    three = torch.stack([own, own + token % 3, own + token % 2])[:, None]  # [3, 1, M]
    joined = torch.cat([text.expand(2, -1), ids], dim=1)
    before = torch.arange(PREFIX).expand(3, 1, -1)
    places = torch.cat([before, three + PREFIX], dim=2).expand(-1, 2, -1)
    whole = {"attention_mask": torch.ones_like(joined), "position_ids": places}
    logits = model(input_ids=joined, **whole).logits[:, PREFIX:]
    attach(model, Prefix.from_text(model, text))
    rows = three.expand(-1, 2, -1)
    for given in (three, rows, torch.cat([rows[:1], rows])):
        for way in ({}, {"use_cache": False}, {"attention_mask": torch.ones_like(ids)}):
            found = model(input_ids=ids, position_ids=given, **way).logits
            assert (found - logits).abs().max() < 1e-6 * logits.abs().max()
