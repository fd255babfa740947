"""Habits of notebooks: cells run twice, interrupts, casts, copies, and threads."""

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from patience import PATIENCE
from torch import Tensor

import prefixattn
from prefixattn import Prefix

GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}


class Notebook:
    """A model, the ids of an input, and what it says to them with and without the prefix."""

    def __init__(self, model: Any, text: Tensor) -> None:
        self.model = model.double()
        self.text = text
        self.ids = torch.randint(2, 300, (2, 9))
        joined = torch.cat([text.expand(2, -1), self.ids], dim=1)
        with torch.no_grad():
            self.plain = self.model(self.ids).logits
            self.behind = self.model(joined).logits[:, text.shape[1] :]
        assert (self.plain - self.behind).abs().max() > 0.1

    def prefix(self) -> Prefix:
        return Prefix.from_text(self.model, self.text)

    @torch.no_grad()
    def says(self, expected: Tensor, model: Any = None) -> bool:
        logits = (model or self.model)(self.ids).logits
        return bool((logits - expected).abs().max() < 1e-9)


@pytest.fixture
def notebook(make_model: Any, text: Tensor) -> Notebook:
    return Notebook(make_model(), text)


def test_the_attach_cell_twice(notebook: Notebook) -> None:
    prefix, other = notebook.prefix(), Prefix.zeros(notebook.model, 3)
    prefixattn.attach(notebook.model, prefix)
    for again in (prefix, other):
        with pytest.raises(ValueError, match="attached already: prefixattn.detach"):
            prefixattn.attach(notebook.model, again)
    assert notebook.says(notebook.behind)


def test_a_prefix_is_made_of_a_model_that_has_one(notebook: Notebook) -> None:
    """It is that of the model without one, and the attached model stays as it was."""
    prefix = notebook.prefix()
    prefixattn.attach(notebook.model, prefix)
    again = notebook.prefix()
    for one, other in zip(
        [*again.keys, *again.values], [*prefix.keys, *prefix.values], strict=True
    ):
        assert torch.equal(one, other)
    assert Prefix.zeros(notebook.model, 3).num_tokens == 3
    assert notebook.says(notebook.behind)


def test_detaching_without_the_handle(notebook: Notebook) -> None:
    prefixattn.attach(notebook.model, notebook.prefix())
    twin = copy.deepcopy(notebook.model)
    prefixattn.detach(twin)
    assert notebook.says(notebook.plain, twin)
    assert notebook.says(notebook.behind)


def test_detached_twice_and_another_attached(notebook: Notebook) -> None:
    prefix, other = notebook.prefix(), Prefix.zeros(notebook.model, 3)
    first = prefixattn.attach(notebook.model, prefix)
    first.detach()
    first.detach()
    assert notebook.says(notebook.plain)
    second = prefixattn.attach(notebook.model, other)
    assert not notebook.says(notebook.behind)
    assert not notebook.says(notebook.plain)
    second.detach()
    prefixattn.attach(notebook.model, prefix)
    first.detach()  # an old handle has nothing to say any more
    assert notebook.says(notebook.behind)


def test_a_copied_handle_is_the_copys(notebook: Notebook) -> None:
    handle = prefixattn.attach(notebook.model, notebook.prefix())
    twin = copy.deepcopy(handle)
    twin.detach()
    assert notebook.says(notebook.behind)
    assert notebook.says(notebook.plain, twin.model)


def test_one_prefix_on_two_models(notebook: Notebook) -> None:
    """A draft and its checkpoint, a model and its fine-tuned twin: both read the same numbers."""
    prefix, twin = notebook.prefix(), copy.deepcopy(notebook.model)
    first = prefixattn.attach(notebook.model, prefix)
    prefixattn.attach(twin, prefix)
    assert notebook.says(notebook.behind)
    first.detach()
    assert notebook.says(notebook.plain)
    assert notebook.says(notebook.behind, twin)
    twin(notebook.ids, labels=notebook.ids).loss.backward()
    assert prefix.keys[0].grad is not None


@pytest.mark.parametrize("where", ["between tokens", "in a layer"])
def test_interrupted_generation(notebook: Notebook, where: str) -> None:
    handle = prefixattn.attach(notebook.model, notebook.prefix())
    assert notebook.says(notebook.behind)
    expected = notebook.model.generate(notebook.ids, **GREEDY)
    calls = []

    def interrupt(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt

    def stop(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        interrupt()
        return torch.zeros(len(ids), dtype=torch.bool)

    if where == "in a layer":
        hook = notebook.model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            notebook.model.generate(notebook.ids, **GREEDY)
        hook.remove()
    else:
        with pytest.raises(KeyboardInterrupt):
            notebook.model.generate(notebook.ids, stopping_criteria=[stop], **GREEDY)
    assert torch.equal(notebook.model.generate(notebook.ids, **GREEDY), expected)
    handle.detach()
    assert notebook.says(notebook.plain)


CASTS: dict[str, Callable[[Any], Any]] = {
    "to(bfloat16)": lambda model: model.to(torch.bfloat16),
    "half()": lambda model: model.half(),
    "float()": lambda model: model.float(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_cast_while_attached(notebook: Notebook, cast: Callable[[Any], Any]) -> None:
    prefix = notebook.prefix()
    model = cast(notebook.model)
    prefixattn.attach(model, prefix)
    before = model(notebook.ids).logits
    cast(model)  # now the prefix, too
    assert {p.dtype for p in prefix.parameters()} == {model.dtype}
    after = model(notebook.ids)
    scale = notebook.behind.abs().max()
    assert (after.logits - before).abs().max() <= 0.03 * scale
    assert (after.logits - notebook.behind).abs().max() <= 0.03 * scale
    model(notebook.ids, labels=notebook.ids).loss.backward()
    assert prefix.keys[0].grad is not None


def test_shapes_on_the_meta_device(notebook: Notebook) -> None:
    prefixattn.attach(notebook.model, notebook.prefix())
    logits = notebook.model.to("meta")(notebook.ids.to("meta")).logits
    assert logits.shape == notebook.plain.shape


def test_autocast(notebook: Notebook) -> None:
    model, prefix = notebook.model.float(), notebook.prefix()
    prefixattn.attach(model, prefix)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(notebook.ids, labels=notebook.ids)
    out.loss.backward()
    assert prefix.keys[0].grad is not None
    assert prefix.keys[0].grad.dtype == torch.float32
    scale = notebook.behind.abs().max()
    assert 0 < (out.logits - notebook.behind).abs().max() <= 0.05 * scale


def test_looked_at_in_inference_mode_then_trained(notebook: Notebook) -> None:
    with torch.inference_mode():
        prefix = notebook.prefix()
        prefixattn.attach(notebook.model, prefix)
        notebook.model.generate(notebook.ids, **GREEDY)
        notebook.model(notebook.ids)
    notebook.model.train()
    notebook.model(notebook.ids, labels=notebook.ids).loss.backward()
    gradient = prefix.keys[0].grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    with torch.no_grad():
        prefix.keys[0].add_(1.0)
    notebook.model.eval()
    assert not notebook.says(notebook.behind)


def by_data(prefix: Prefix) -> None:
    for parameter in prefix.parameters():
        parameter.data.mul_(3)


def by_an_average(prefix: Prefix) -> None:
    torch._foreach_mul_([p.data for p in prefix.parameters()], 3)


def by_a_fused_step(prefix: Prefix) -> None:
    for parameter in prefix.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(prefix.parameters(), lr=1.0, fused=True).step()


@pytest.mark.parametrize("change", [by_data, by_an_average, by_a_fused_step])
def test_numbers_changed_behind_autograds_back(
    notebook: Notebook, change: Callable[[Prefix], None]
) -> None:
    """A bfloat16 model, a float32 prefix, and evaluation before and after a change."""
    model, prefix = notebook.model.float(), notebook.prefix()
    prefixattn.attach(model.to(torch.bfloat16), prefix)
    prefix.float()
    with torch.no_grad():
        before = model(notebook.ids).logits
        change(prefix)
        after = model(notebook.ids).logits
    expected = model(notebook.ids).logits  # with gradients nothing is kept
    assert not torch.equal(expected, before)
    assert torch.equal(after, expected)


def test_saved_whole_and_copied(notebook: Notebook, tmp_path: Path) -> None:
    prefixattn.attach(notebook.model, notebook.prefix())
    torch.save(notebook.model, tmp_path / "model.pt")
    for twin in (
        torch.load(tmp_path / "model.pt", weights_only=False),
        copy.deepcopy(notebook.model),
    ):
        assert notebook.says(notebook.behind, twin)
        torch.nn.init.zeros_(twin.prefixattn.values[0])  # its own
        assert notebook.says(notebook.behind)


def test_weights_go_from_one_attached_model_to_another(notebook: Notebook) -> None:
    twin = copy.deepcopy(notebook.model)
    prefixattn.attach(twin, Prefix.zeros(twin, notebook.text.shape[1]))
    prefixattn.attach(notebook.model, notebook.prefix())
    with torch.no_grad():
        twin(notebook.ids)
    twin.load_state_dict(notebook.model.state_dict())
    assert notebook.says(notebook.behind, twin)


def test_saved_and_loaded_as_transformers_does(notebook: Notebook, tmp_path: Path) -> None:
    prefixattn.attach(notebook.model, notebook.prefix())
    notebook.model.save_pretrained(tmp_path)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert notebook.says(notebook.plain, back.eval())
    assert back.config._attn_implementation != "prefixattn"


def test_printed_and_counted(notebook: Notebook) -> None:
    before = notebook.model.num_parameters()
    prefix = notebook.prefix()
    prefixattn.attach(notebook.model, prefix)
    assert "(prefixattn): Prefix(" in str(notebook.model)
    own = sum(p.numel() for p in prefix.parameters())
    assert notebook.model.num_parameters() == before + own


def test_the_vocabulary_grows_while_attached(notebook: Notebook) -> None:
    prefixattn.attach(notebook.model, notebook.prefix())
    notebook.model.resize_token_embeddings(307)
    with torch.no_grad():
        logits = notebook.model(notebook.ids).logits[..., :300]
    assert (logits - notebook.behind).abs().max() < 1e-9


def test_a_deleted_model_is_gone(notebook: Notebook) -> None:
    model = copy.deepcopy(notebook.model)
    prefix = notebook.prefix()
    handle = prefixattn.attach(model, prefix)
    model(notebook.ids)
    seen = weakref.ref(model)
    del model, handle
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("models", [1, 2], ids=["one model", "two models"])
def test_two_threads(notebook: Notebook, models: int) -> None:
    twins = [notebook.model, copy.deepcopy(notebook.model)][:models]
    prefix = notebook.prefix()
    for twin in twins:
        prefixattn.attach(twin, copy.deepcopy(prefix))
        assert notebook.says(notebook.behind, twin)
    expected = notebook.model.generate(notebook.ids, **GREEDY)
    same: list[bool] = []

    def work(model: Any, count: int) -> None:
        for _ in range(8):
            same.append(
                torch.equal(model.generate(notebook.ids[:count], **GREEDY), expected[:count])
            )

    threads = [threading.Thread(target=work, args=(twins[i % models], i + 1)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert same == [True] * 16


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "attention weights": (
        lambda model, ids: model(ids, output_attentions=True),
        "output_attentions",
    ),
    "attention weights of a generation": (
        lambda model, ids: model.generate(
            ids, output_attentions=True, return_dict_in_generate=True, **GREEDY
        ),
        "output_attentions",
    ),
    "continuous batching": (
        lambda model, ids: model.generate_batch(
            ids.tolist(), generation_config=transformers.GenerationConfig(**GREEDY)
        ),
        "has a prefix attached.*generate_batch",
    ),
}


@pytest.mark.parametrize(("ask", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(notebook: Notebook, ask: Callable[[Any, Tensor], Any], said: str) -> None:
    prefixattn.attach(notebook.model, notebook.prefix())
    with pytest.raises((NotImplementedError, ValueError), match=said):
        ask(notebook.model, notebook.ids)
    assert notebook.says(notebook.behind)


def test_another_attention_while_attached(notebook: Notebook) -> None:
    handle = prefixattn.attach(notebook.model, notebook.prefix())
    notebook.model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="is now 'eager': it would be lost"):
        notebook.model(notebook.ids)
    handle.detach()
    with torch.no_grad():
        logits = notebook.model(notebook.ids).logits
    torch.testing.assert_close(logits, notebook.plain, rtol=0, atol=1e-5)  # eager rounds otherwise
    assert notebook.model.config._attn_implementation == "eager"
