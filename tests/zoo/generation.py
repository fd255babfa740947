"""Generation: the tokens that the stock model says behind the text, whatever keeps the sequence."""

import copy
import importlib.util
from typing import Any

import torch
import transformers
from torch import Tensor

from .specimen import PAD, P, Specimen, UnavailableError, first, padded

NEW = 6
CACHE_DIFFERS = "without a prefix, too, its cache says other tokens"
SETTINGS = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "num_beams": 1,
    "pad_token_id": 0,
    "suppress_tokens": [0],  # which a second turn would take for padding
}
QUANTIZERS = [name for name in ("optimum", "hqq") if importlib.util.find_spec(name)]
KEEPING = (
    "use_cache",
    "cache_implementation",
    "cache_config",
    "disable_compile",
    "prefill_chunk_size",
)


@torch.no_grad()
def generated(model: Any, inputs: dict[str, Any], **options: Any) -> Tensor:
    """``[rows, NEW]``, the tokens behind the input."""
    torch.manual_seed(0)
    begin = inputs[prompt_in(inputs)].shape[1]
    return model.generate(**inputs, **(SETTINGS | options))[:, begin:]


def prompt_in(inputs: dict[str, Any]) -> str:
    return "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"


def generates(s: Specimen, inputs: dict[str, Any] | None = None, **options: Any) -> str | None:
    """The same tokens, whatever way the sequence is kept."""
    kept = {key: options.pop(key) for key in KEEPING if key in options}
    check_generate(s)
    truth = s.ask_behind(lambda m: generated(m, s.inputs_behind(m), **options))
    if inputs is not None:
        s.check_padding()
    inputs = inputs or s.inputs
    if kept:
        plain = s.ask(lambda m: generated(m, inputs, **options))
        if not torch.equal(s.ask(lambda m: generated(m, inputs, **kept, **options)), plain):
            raise UnavailableError(CACHE_DIFFERS)
    found = generated(s.attached(), inputs, **kept, **options)
    return None if torch.equal(found, truth) else "other tokens"


@torch.no_grad()
def check_generate(s: Specimen) -> None:
    """Raise where the stock model's ``generate`` does not continue as its forward says."""

    def chosen(model: Any) -> Tensor:
        inputs = s.inputs_behind(model)
        name = prompt_in(inputs)
        length = inputs[name].shape[1]
        for _ in range(NEW):
            logits = model(**inputs, use_cache=False).logits[:, -1:]
            logits[..., SETTINGS["suppress_tokens"]] = -torch.inf
            inputs[name] = torch.cat([inputs[name], logits.argmax(-1)], dim=1)
        return inputs[name][:, length:]

    if s.generate_is_odd is None:
        truth = s.ask_behind(chosen)
        found = s.ask_behind(lambda m: generated(m, s.inputs_behind(m)))
        odd = "without a prefix, too, generate does not say what forward says"
        s.generate_is_odd = "" if torch.equal(found, truth) else odd
    if s.generate_is_odd:
        raise UnavailableError(s.generate_is_odd)


def greedy(s: Specimen) -> str | None:
    """Twice by the same model: nothing of one text is left for the next."""
    check_generate(s)
    truth = s.ask_behind(lambda m: generated(m, s.inputs_behind(m)))
    model = s.attached()
    found = [generated(model, s.inputs) for _ in range(2)]
    wrong = [other for other in found if not torch.equal(other, truth)]
    return "other tokens" if wrong else None


def greedy_padded(s: Specimen) -> str | None:
    return generates(s, padded(s.ids, left=PAD))


@torch.no_grad()
def no_cache(s: Specimen) -> str | None:
    forward = s.attached()(input_ids=s.ids, use_cache=False).logits
    return first(s.compare(forward), generates(s, use_cache=False))


def static_cache(s: Specimen) -> str | None:
    static = {"cache_implementation": "static", "disable_compile": True}
    return first(generates(s, **static), generates(s, padded(s.ids, left=PAD), **static))


def sliding_cache(s: Specimen) -> str | None:
    return generates(s, cache_implementation="sliding_window", disable_compile=True)


def offloaded_cache(s: Specimen) -> str | None:
    return first(
        generates(s, cache_implementation="offloaded"),
        generates(s, cache_implementation="offloaded_static", disable_compile=True),
    )


def quantized_cache(s: Specimen) -> str | None:
    """The input loses what the stock model's loses behind a text that is kept whole."""
    check_generate(s)

    def tokens(model: Any, inputs: dict[str, Any], whole: int) -> Tensor:
        backend = "quanto" if "optimum" in QUANTIZERS else "hqq"
        config = model.config.get_text_config(decoder=True)
        few = {"nbits": 4, "q_group_size": 8, "residual_length": 4, "axis_key": 0, "axis_value": 0}
        cache = transformers.QuantizedCache(backend, config, **few)
        for layer in cache.layers:
            _keep_whole(layer, whole)
        return generated(model, inputs, past_key_values=cache)

    truth = s.ask_behind(lambda m: tokens(m, s.inputs_behind(m), P))
    return None if torch.equal(tokens(s.attached(), s.inputs, 0), truth) else "other tokens"


def _keep_whole(layer: Any, count: int) -> None:
    """Have the cache's layer keep its first tokens as they are."""
    coarse, fine = layer._quantize, layer._dequantize

    def quantize(states: Tensor, axis: int) -> Any:
        return states[:, :, :count], coarse(states[:, :, count:].contiguous(), axis)

    def dequantize(kept: Any) -> Tensor:
        return torch.cat([kept[0], fine(kept[1])], dim=2)

    layer._quantize, layer._dequantize = quantize, dequantize


def beams(s: Specimen) -> str | None:
    return first(
        generates(s, num_beams=3),
        generates(s, padded(s.ids, left=PAD), num_beams=3, num_return_sequences=2),
    )


def sampling(s: Specimen) -> str | None:
    return first(
        generates(s, do_sample=True, temperature=2.0),
        generates(s, do_sample=True, num_return_sequences=3),
    )


def assisted(s: Specimen) -> str | None:
    one = {"input_ids": s.ids[:1]}
    check_generate(s)
    truth = s.ask_behind(lambda m: generated(m, {"input_ids": s.joined[:1]}))
    helper = copy.deepcopy(s.stock)
    s.ask(lambda m: generated(m, one, assistant_model=helper))
    found = generated(s.attached(), one, assistant_model=helper)
    return None if torch.equal(found, truth) else "other tokens"


def prompt_lookup(s: Specimen) -> str | None:
    one = {"input_ids": s.ids[:1].repeat(1, 2)}
    joined = s.behind_text(one["input_ids"])
    check_generate(s)
    truth = s.ask_behind(lambda m: generated(m, {"input_ids": joined}))
    s.ask(lambda m: generated(m, one, prompt_lookup_num_tokens=3))
    found = generated(s.attached(), one, prompt_lookup_num_tokens=3)
    return None if torch.equal(found, truth) else "other tokens"


def chunked_prefill(s: Specimen) -> str | None:
    return first(
        generates(s, prefill_chunk_size=4),
        generates(s, padded(s.ids, left=PAD), prefill_chunk_size=4),
    )


@torch.no_grad()
def second_turn(s: Specimen) -> str | None:
    options = SETTINGS | {"max_new_tokens": 4, "return_dict_in_generate": True}

    def turns(model: Any, ids: Tensor, keep: bool = True) -> Tensor:
        one = model.generate(input_ids=ids, **options)
        more = torch.cat([one.sequences, s.ids.flip(1)[:, :4]], 1)
        cache = one.past_key_values if keep else None
        two = model.generate(input_ids=more, past_key_values=cache, **options)
        return two.sequences[:, ids.shape[1] :]

    check_generate(s)
    if not torch.equal(s.ask(lambda m: turns(m, s.ids)), s.ask(lambda m: turns(m, s.ids, False))):
        raise UnavailableError(CACHE_DIFFERS)
    truth = s.ask_behind(lambda m: turns(m, s.joined))
    return None if torch.equal(turns(s.attached(), s.ids), truth) else "other tokens"


@torch.no_grad()
def decode_loop(s: Specimen) -> str | None:
    def pieces(model: Any, ids: Tensor, sizes: list[int]) -> Tensor:
        cache, found = None, []
        for piece in ids.split(sizes, dim=1):
            out = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
        return torch.cat(found, dim=1)

    if s.compare(s.ask(lambda m: pieces(m, s.ids, [4, 5, 1, 1])), s.plain):
        raise UnavailableError("without a prefix, too, its cache says something else")
    truth = s.ask_behind(lambda m: pieces(m, s.joined, [P + 4, 5, 1, 1]))[:, P:]
    if s.compare(truth):
        raise UnavailableError("without a prefix, too, its cache says something else")
    return s.compare(pieces(s.attached(), s.ids, [4, 5, 1, 1]), truth)
