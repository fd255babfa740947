"""PEFT's tests that hold of its own mechanism alone: parts of names, and why ours differ."""

BELOW = "the text is moved by a hook of the model itself, below what this test replaces"
EARLY = "layers are looked at when the prefix is attached, not at each forward"

EXPECTED: dict[str, str] = {
    "test_prefix_tuning_offsets_position_ids_in_forward": BELOW,
    "test_cartridge_offsets_position_ids_in_forward": BELOW,
    "test_cartridge_prefill_4d_mask_uses_cache_position": "no mask is widened for a prefix",
    "test_prefix_tuning_gemma4_warns_if_some_layers_skipped": EARLY,
    "test_prefix_tuning_gemma4_raises_if_all_layers_skipped": EARLY,
    "tiny-random-Deberta": "DeBERTa bypasses the attention interface: refused by name",
    "test_key_mapping_save_": "a bare torch module has no attention: refused by name",
}
