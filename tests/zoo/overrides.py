"""What the general rules of `families` cannot know of a configuration."""

from typing import Any

MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
IN_TEXT: dict[str, Any] = {"text_config": {"rope_parameters": MROPE}}

SINGLE_PRECISION = {"xglm", "inkling2_text", "inkling2", "inkling_text"}  # they round on the way
ROPE = {"rope_type": "default", "rope_theta": 1e4}
COMPASS = {
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
}
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4}

OVERRIDES: dict[str, dict[str, Any]] = {
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "xmod": {"default_language": "en_XX"},
    "gemma3n_text": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_kv_shared_layers": 1,
        "activation_sparsity_pattern": [0.0] * 3,
        "intermediate_size": [48] * 3,
    },
    "zaya": {"num_experts_per_tok": 1},
    "esm": {"vocab_size": 97, "pad_token_id": 0},
    "esmc": {"num_key_value_heads": 4},
    **dict.fromkeys("glm46v glm4v glm_ocr glmga".split(), IN_TEXT),
    **dict.fromkeys("paddleocr_vl qwen2_5_vl qwen2_vl".split(), IN_TEXT),
    "glm4v_moe": {"text_config": {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}}},
    "cosmos3_edge": IN_TEXT,
    "cohere_compass": {"text_config": COMPASS},
    "cohere_compass_text": COMPASS,
    "mistral4": {"head_dim": 16},
    "step3p7": {"text_config": {"sliding_window": 9}},
    "qwen2_5_omni_thinker": IN_TEXT | {"vision_start_token_id": 95},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 95},
    "chameleon": {"vocabulary_map": {"<image>": 95}},
    "hunyuan_vl": {"text_config": {"head_dim": 8}},
    "bamba": MAMBA | {"mamba_d_head": 16, "attn_layer_indices": [1]},
    "falcon_h1": MAMBA | {"mamba_d_head": 8},
    "granitemoehybrid": MAMBA | {"mamba_d_head": 16, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 9},
    "bailing_hybrid": {"n_group": 1},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "neomme": {"head_dim": 32},
    "encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "mobilebert": {"trigram_input": False},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "n_groups": 1, "state_size": 8},
}
