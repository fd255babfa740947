"""A prefix where a model's ``forward`` is called, and not the model: hooks do not run then."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from prefixattn import Prefix, PrefixBank


class Embedder(nn.Module):
    """What sentence-transformers does with a backbone: ``forward``, and a mean over the tokens."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        backbone: Any = self.backbone
        out = backbone.forward(input_ids=input_ids, attention_mask=attention_mask)
        weights = attention_mask[..., None].to(out[0].dtype)
        return (out[0] * weights).sum(1) / weights.sum(1)


@pytest.fixture(params=["llama", "bert", "gpt2", "nemotron"])
def pair(request: pytest.FixtureRequest, model_of: Callable[..., Any], attach: Any) -> Any:
    """An attached backbone under an embedder, and a batch with padding."""
    backbone = model_of(request.param, transformers.AutoModel).requires_grad_(False)
    prefix = Prefix.random(backbone, 5)
    handle = attach(backbone, prefix)
    ids = torch.randint(2, 90, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return Embedder(backbone), prefix, handle, {"input_ids": ids, "attention_mask": mask}


def called(embedder: Embedder, batch: dict[str, Tensor]) -> Tensor:
    """The same by a call of the backbone."""
    out = embedder.backbone(**batch)[0]
    weights = batch["attention_mask"][..., None].to(out.dtype)
    return (out * weights).sum(1) / weights.sum(1)


def test_forward_is_what_a_call_is(pair: Any) -> None:
    embedder, prefix, handle, batch = pair
    embedder(**batch).square().sum().backward()
    grads = [parameter.grad.clone() for parameter in prefix.parameters()]
    prefix.zero_grad()
    expected = called(embedder, batch)
    expected.square().sum().backward()
    for parameter, grad in zip(prefix.parameters(), grads, strict=True):
        torch.testing.assert_close(grad, parameter.grad)
        assert grad.abs().max() > 1e-6
    torch.testing.assert_close(embedder(**batch), expected)
    handle.detach()
    assert (embedder(**batch) - expected).abs().max() > 1e-3
    assert torch.equal(embedder(**batch), called(embedder, batch))


def test_checkpointing(pair: Any) -> None:
    embedder, prefix, _, batch = pair
    embedder.train()
    embedder(**batch).square().sum().backward()
    grads = [parameter.grad.clone() for parameter in prefix.parameters()]
    embedder.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    prefix.zero_grad()
    embedder(**batch).square().sum().backward()
    for parameter, grad in zip(prefix.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


@torch.no_grad()
def test_copies_and_pickles(pair: Any) -> None:
    embedder, _, handle, batch = pair
    expected = embedder(**batch)
    file = io.BytesIO()
    torch.save(embedder, file)
    file.seek(0)
    others = [copy.deepcopy(embedder), torch.load(file, weights_only=False)]
    handle.detach()
    for other in others:
        assert torch.equal(other(**batch), expected)
        assert not torch.equal(embedder(**batch), expected)
        assert torch.equal(called(other, batch), expected)


@torch.no_grad()
def test_compiled(pair: Any) -> None:
    embedder, _, _, batch = pair
    compiled = torch.compile(embedder, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**batch), embedder(**batch))


@torch.no_grad()
def test_a_model_around_the_backbone(case: Callable[..., Any], attach: Any) -> None:
    """What its caller says of padding reaches the backbone, and is forgotten when it fails."""
    given = case("llama")
    attach(given.model, given.prefix())
    pad = torch.zeros(2, 3, dtype=torch.long)
    ids = torch.cat([pad, given.input_ids], dim=1)
    mask = torch.cat([pad, torch.ones_like(given.input_ids)], dim=1)
    given.assert_close(given.model.forward(ids, attention_mask=mask).logits[:, 3:])
    given.assert_close(given.model.forward(given.input_ids).logits)
    with pytest.raises(ValueError, match="attention_mask must cover"):
        given.model.forward(ids, attention_mask=mask[:, :4])
    given.assert_close(given.model.model.forward(given.input_ids)[0] @ head(given.model))


def head(model: Any) -> Tensor:
    return model.lm_head.weight.T


@torch.no_grad()
def test_a_bank(model_of: Callable[..., Any], attach: Any) -> None:
    backbone = model_of("bert", transformers.AutoModel)
    bank = PrefixBank([Prefix.random(backbone, 3), Prefix.random(backbone, 5)])
    attach(backbone, bank)
    ids = torch.randint(2, 90, (3, 9))
    with bank.use([1, None, 0]):
        expected = backbone(ids)[0]
        assert torch.equal(backbone.forward(ids)[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_lora_around_a_backbone(model_of: Callable[..., Any], attach: Any, name: str) -> None:
    """A tuner stands between the PeftModel and the backbone that has the prefix."""
    targets = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}[name]
    config = peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=2, target_modules=targets)
    tuned = peft.get_peft_model(model_of(name, transformers.AutoModel), config)
    prefix = Prefix.random(tuned, 5)
    ids = torch.randint(2, 90, (2, 9))
    plain = tuned(input_ids=ids)[0]
    handle = attach(tuned, prefix)
    found = tuned(input_ids=ids)[0]
    torch.testing.assert_close(found, tuned.get_base_model()(input_ids=ids)[0])
    assert (found - plain).abs().max() > 1e-3
    handle.detach()
    torch.testing.assert_close(tuned(input_ids=ids)[0], plain)


@torch.no_grad()
def test_what_lies_on_the_object_goes_on(case: Callable[..., Any], attach: Any) -> None:
    """A forward that something put there is called as before; its own calls bring no prefix."""
    given = case("llama")
    stack = given.model.model
    plain = stack.forward
    stack.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    handle = attach(given.model, Prefix.from_text(given.model, given.text))
    given.assert_close(given.model(given.input_ids).logits)
    with pytest.raises(RuntimeError, match=r"a \.forward that something else had put on the"):
        stack.forward(given.input_ids)
    handle.detach()
    torch.testing.assert_close(given.model(given.input_ids).logits, given.plain)
    del stack.forward
    handle = attach(given.model, Prefix.from_text(given.model, given.text))
    stack.forward = lambda *args, **kwargs: type(stack).forward(stack, *args, **kwargs)
    given.assert_close(given.model(given.input_ids).logits)
    given.assert_close(stack.forward(given.input_ids)[0] @ head(given.model))
    handle.detach()
    torch.testing.assert_close(given.model(given.input_ids).logits, given.plain)


@torch.no_grad()
def test_the_object_is_what_it_was_to_others(case: Callable[..., Any], attach: Any) -> None:
    given = case("llama")
    kinds = [type(given.model), type(given.model.model)]
    handle = attach(given.model, given.prefix())
    for module, kind in zip((given.model, given.model.model), kinds, strict=True):
        assert isinstance(module, kind)
        assert str(type(module)) == str(kind)
    states = given.model(given.input_ids, output_hidden_states=True).hidden_states
    assert len(states) == 3
    handle.detach()
    assert [type(given.model), type(given.model.model)] == kinds


@torch.no_grad()
def test_a_class_that_was_put_over_ours_stays(case: Callable[..., Any], attach: Any) -> None:
    """FSDP2 gives a module a subclass of its class; when ours is taken out, that one is kept."""
    given = case("llama")
    kind = type(given.model.model)
    handle = attach(given.model, given.prefix())
    stack = given.model.model
    stack.__class__ = type(f"FSDP{kind.__name__}", (FSDPModule, type(stack)), {})
    handle.detach()
    assert isinstance(stack, FSDPModule)
    assert type(stack).__name__ == f"FSDP{kind.__name__}"
    assert type(stack).__mro__[1:3] == (FSDPModule, kind)
    stack.__class__ = kind
    torch.testing.assert_close(given.model(given.input_ids).logits, given.plain)


def test_sentence_transformers(model_of: Callable[..., Any], attach: Any, tmp_path: Path) -> None:
    """Encoding, padding and training, through the package itself."""
    package = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    models = pytest.importorskip("sentence_transformers.models")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *(f"w{i}" for i in range(60))])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]"
    )
    model_of("bert", transformers.AutoModel).float().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    layers = models.Transformer(str(tmp_path))
    embedder = package.SentenceTransformer(modules=[layers, models.Pooling(32)], device="cpu")
    backbone = getattr(layers, "auto_model", None) or layers.model
    plain = embedder.encode(["w1 w2", "w3 w4 w5 w6"])
    prefix = Prefix.random(backbone.requires_grad_(False), 5)
    handle = attach(backbone, prefix)
    batch = tokenizer(["w1 w2", "w3 w4 w5 w6"], return_tensors="pt", padding=True)
    found = torch.tensor(embedder.encode(["w1 w2", "w3 w4 w5 w6"]))
    expected = called(Embedder(backbone), {k: batch[k] for k in ("input_ids", "attention_mask")})
    torch.testing.assert_close(found, expected.detach())
    assert (found - torch.tensor(plain)).abs().max() > 1e-3
    features = embedder.tokenize(["w1 w2", "w3 w4 w5 w6"])
    embedder(features)["sentence_embedding"].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in prefix.parameters())
    handle.detach()
    assert (torch.tensor(embedder.encode(["w1 w2", "w3 w4 w5 w6"])) == torch.tensor(plain)).all()
