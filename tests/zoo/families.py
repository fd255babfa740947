"""Every text family of the installed transformers, each built tiny from its own configuration."""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple
from zlib import crc32

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from .overrides import OVERRIDES, SINGLE_PRECISION

VOCAB = 97
KINDS = ("causal", "multimodal", "encoder", "encoder-decoder")


def _named(names: str, size: int) -> dict[str, int]:
    return dict.fromkeys(names.split(), size)


# What configurations call their sizes, and how small they get here.
SMALL: dict[str, int] = {
    **_named("vocab_size text_vocab_size vocab_size_per_layer_input entity_vocab_size", VOCAB),
    **_named("hidden_size n_embd d_model dim embed_dim embedding_size word_embed_proj_dim", 32),
    **_named("attention_hidden_size projection_dim out_hidden_size embedding_dim emb_dim", 32),
    **_named("cross_attention_hidden_size encoder_hidden_size lm_hidden_size mamba_d_ssm", 32),
    **_named("intermediate_size ffn_dim n_inner d_ff ffn_hidden_size encoder_ffn_dim", 48),
    **_named("decoder_ffn_dim hidden_dim intermediate_size_mlp", 48),
    **_named("num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers", 2),
    **_named("num_decoder_layers num_encoder_layers depth", 2),
    **_named("num_attention_heads n_head n_heads num_heads encoder_attention_heads", 4),
    **_named("decoder_attention_heads num_key_value_heads num_kv_heads n_kv_heads", 4),
    **_named("head_dim v_head_dim d_kv qk_rope_head_dim qk_nope_head_dim", 8),
    **_named("num_local_experts num_experts n_routed_experts moe_num_experts n_experts", 4),
    **_named("num_experts_per_tok moe_k moe_topk top_k_experts num_selected_experts", 2),
    **_named("moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size", 16),
    **_named("moe_shared_expert_intermediate_size q_lora_rank kv_lora_rank", 16),
    **_named("n_group topk_group first_k_dense_replace moe_layer_start_index", 1),
    **_named("max_position_embeddings n_positions n_ctx max_sequence_length max_seq_len", 64),
    **_named("sliding_window attention_chunk_size", 9),
    **_named("local_attention", 12),
    **_named("rotary_dim laurel_rank", 4),
    **_named("hidden_size_per_layer_input index_head_dim", 8),
    **_named("index_topk", 4),
    **_named("index_n_heads", 2),
    **_named("linear_key_head_dim linear_value_head_dim linear_head_dim", 8),
    **_named("linear_num_value_heads linear_num_heads", 4),
    **_named("linear_num_key_heads", 2),
    **_named("image_size", 32),
    **_named("patch_size", 16),
}
GROUPED = {"num_key_value_heads": 2, "num_kv_heads": 2, "n_kv_heads": 2}
TOKENS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "decoder_start_token_id": 1,
    "eos_token_id": 96,
    "sep_token_id": 96,
    "cls_token_id": 1,
}
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")


class Family(NamedTuple):
    """A row of the table: ``name`` is transformers' model type."""

    name: str
    kind: str


def families() -> Iterator[Family]:
    """All families that take text, by kind and name.

    A family may have several kinds of model: a causal one, and beside it an encoder-decoder (BART)
    or an encoder (BERT: those that are trained on masked words).
    """
    causal, masked = _names("CAUSAL_LM"), _names("MASKED_LM")
    others = _names("MULTIMODAL_LM") | _names("SEQ_TO_SEQ_CAUSAL_LM")
    pairs = {name for name in others if CONFIG_MAPPING[name].is_encoder_decoder}
    of_kind = {
        "causal": causal,
        "multimodal": others - causal - pairs,
        "encoder": (_names("TOKEN_CLASSIFICATION") - causal - others) | (masked - pairs),
        "encoder-decoder": pairs,
    }
    for kind in KINDS:
        for name in sorted(of_kind[kind]):
            yield Family(name, kind)


def _names(mapping: str) -> set[str]:
    return set(getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES"))


def _auto(family: Family) -> Any:
    """The class that makes the model of a family."""
    if family.kind == "causal":
        return transformers.AutoModelForCausalLM
    if family.kind == "encoder":
        tokens = family.name in _names("TOKEN_CLASSIFICATION")
        masked = transformers.AutoModelForMaskedLM
        return transformers.AutoModelForTokenClassification if tokens else masked
    multimodal = family.name in _names("MULTIMODAL_LM")
    pair = transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForMultimodalLM if multimodal else pair


def shrink(kind: type, changes: dict[str, Any] | None = None) -> Any:
    """A configuration of class ``kind`` with small sizes and one layer of each sort it has."""
    changes = dict(changes or {})
    base = kind()
    own = vars(base)
    sizes = SMALL | (GROUPED if "kv_lora_rank" not in own else {})
    renamed = kind.attribute_map
    small = {key: n for key, n in sizes.items() if type(own.get(renamed.get(key, key))) is int}
    small |= {key: token for key, token in TOKENS.items() if key in own}
    small |= {key: 0.0 for key, value in own.items() if "drop" in key and type(value) is float}
    small |= _columns(own)
    for name in kind.sub_configs:
        part = own.get(name)
        if part is not None and not isinstance(changes.get(name), transformers.PreTrainedConfig):
            small[name] = shrink(type(part), changes.pop(name, None))
    return kind(**(small | changes))


def _columns(own: dict[str, Any]) -> dict[str, Any]:
    """The settings that name each layer, cut down to one layer of each sort, and two at least."""
    depth = next((own[key] for key in DEPTHS if type(own.get(key)) is int), 0)
    lists = {
        key: value
        for key, value in own.items()
        if isinstance(value, list | tuple) and len(value) == depth > 2
    }
    if not lists:
        return {}
    columns = [repr(column) for column in zip(*lists.values(), strict=True)]
    picks = sorted({columns.index(column) for column in columns})[:4]
    picks = picks if len(picks) > 1 else [0, 1]
    cut: dict[str, Any] = {key: [value[i] for i in picks] for key, value in lists.items()}
    return cut | {key: len(picks) for key in DEPTHS if key in own}


def build(family: Family, auto: Any = None, **changes: Any) -> Any:
    """The model in float64 and evaluation mode, with weights that let every token matter."""
    changes = copy.deepcopy(OVERRIDES.get(family.name, {})) | changes  # configurations alter them
    config = shrink(CONFIG_MAPPING[family.name], changes)
    if family.kind == "causal" and hasattr(config, "is_decoder"):
        config.is_decoder = True
    seed = crc32(family.name.encode())
    torch.manual_seed(seed)
    auto = auto or _auto(family)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if size > 3e7:
        raise ValueError(f"{family.name} is not tiny yet: {size} parameters")
    model = auto.from_config(config, experts_implementation="eager").eval()
    if family.name not in SINGLE_PRECISION:
        model = model.double()
    if getattr(model, "generation_config", None) is not None:
        forced = ("eos_token_id", "forced_eos_token_id", "forced_bos_token_id")
        model.generation_config.update(**dict.fromkeys(forced))  # a text ends when we say so
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                scale = parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model
