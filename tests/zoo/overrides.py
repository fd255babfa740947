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
VQ = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "num_embeddings": 64}
DOTS = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
TOKENIZER = {"num_filters": 2, "depths": [1] * 7}

# What cannot be tried with text alone, whatever list of transformers' it is in.
UNTRIED = {
    **dict.fromkeys(("musicgen", "musicgen_melody"), "makes sound; no model of text"),
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "drafts from the hidden states of Gemma 4; no language model by itself",
    ),
    **dict.fromkeys(
        ("qwen2_5_omni", "qwen3_omni_moe"), "speaks; its text side is the thinker, which is a row"
    ),
    **dict.fromkeys(
        ("pix2struct", "pp_formulanet", "vision-encoder-decoder"),
        "its encoder reads pictures; tests/integrations/test_text_sides.py holds such decoders",
    ),
    "evolla": "no auto class makes it",
    "diffusion_gemma": "writes a canvas by diffusion; no model of the next token",
    "kyutai_speech_to_text": "reads the codes of sound beside each token",
    "nemo_speechlm": "its parts for sound were not made small; its text side is nemotron_h, a row",
}

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
    "chameleon": {"vocabulary_map": {"<image>": 95}, "vq_config": VQ},
    "janus": {"vq_config": VQ},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "florence2": {
        "vision_config": {
            "embed_dim": [8] * 4,
            "num_heads": [2] * 4,
            "num_groups": [2] * 4,
            "depths": [1] * 4,
        }
    },
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": MROPE, "head_dim": 8}},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}
    },
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [],
        "downsample_rate": "1/2",
        "vision_config": {"hidden_size": 128},
    },
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 4,
        }
    },
    "dots3_note_text": DOTS,
    "dots3_note": {
        "text_config": DOTS,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config": TOKENIZER,
        "semantic_tokenizer_encoder_config": TOKENIZER,
    },
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "glm5_next": {"text_config": {"index_kpool": 2, "qk_rope_head_dim": 0}},
    "inkling2": {"vision_config": {"text_hidden_size": 32}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [0, 1], "text_hidden_size": 32}},
    "muse_spark": {
        "projector_hidden_size": 32,
        "audio_config": {"hidden_sizes": [8] * 4, "out_hidden_size": 32},
    },
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
