"""Tiny random models of Transformers' families, and docs/models.md, which says what each can.

`python tests/models/families.py` writes the page; test_families.py proves every row of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
CONTEXT = 64
LAYERS = 4

# The names that configurations have for the same thing; each is given those that it knows.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_inner", "dff", "d_ff"), 32),
    **dict.fromkeys(("ffn_hidden_size", "moe_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "q_lora_rank", "kv_lora_rank", "v_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), CONTEXT),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 2),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token"), 1),
    **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "sliding_window": 16},
}
_LINEAR_ATTENTION: dict[str, Any] = {
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
_MAMBA: dict[str, Any] = {
    **{"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8},
}


@dataclass(frozen=True)
class Family:
    """One row of the page, and what its tiny configuration has beside the usual sizes."""

    known: str
    """Models of the family that people know."""
    sizes: dict[str, Any] = field(default_factory=dict)
    cached: bool = True
    """Whether answers are written from cached keys and values; a recurrence is read anew each time."""
    adapted: bool = True
    """Whether PEFT puts low-rank adapters on its maps."""
    steered: bool = True
    """Whether its layers have an MLP that RMU and Adaptive RMU can train."""


SUPPORTED: dict[str, Family] = {
    "apertus": Family("Apertus"),
    "arcee": Family("AFM 4.5B"),
    "bamba": Family("Bamba", _MAMBA | {"attn_layer_indices": [1, 3]}, cached=False),
    "biogpt": Family("BioGPT"),
    "bloom": Family("BLOOM, BLOOMZ"),
    "codegen": Family("CodeGen", {"num_attention_heads": 4, "rotary_dim": 4}),
    "cohere": Family("Command R, Aya"),
    "cohere2": Family("Command R7B, Command A"),
    "cwm": Family("Code World Model"),
    "diffllama": Family("DiffLlama"),
    "ernie4_5": Family("ERNIE 4.5 0.3B"),
    "exaone4": Family("EXAONE 4.0", {"sliding_window_pattern": 2}),
    "falcon": Family("Falcon"),
    "falcon_h1": Family("Falcon-H1", _MAMBA | {"mamba_d_ssm": 32}, cached=False, adapted=False),
    "falcon_mamba": Family("Falcon Mamba", cached=False, adapted=False, steered=False),
    "gemma": Family("Gemma"),
    "gemma2": Family("Gemma 2"),
    "gemma3_text": Family("Gemma 3 1B and 270M"),
    "gemma3n_text": Family(
        "Gemma 3n, its text model",
        {
            **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 404},
            **{"laurel_rank": 4, "num_kv_shared_layers": 0, "altup_num_inputs": 2},
            **{"activation_sparsity_pattern": [0.0] * LAYERS, "intermediate_size": [32] * LAYERS},
        },
        steered=False,
    ),
    "glm": Family("GLM-4 9B"),
    "glm4": Family("GLM-4-0414"),
    "gpt2": Family("GPT-2, DistilGPT-2"),
    "gpt_bigcode": Family("StarCoder, SantaCoder"),
    "gpt_neo": Family(
        "GPT-Neo, TinyStories",
        {"attention_types": [[["global", "local"], LAYERS // 2]], "window_size": 16},
    ),
    "gpt_neox": Family("Pythia, GPT-NeoX 20B, Dolly"),
    "gpt_neox_japanese": Family("GPT-NeoX Japanese"),
    "gptj": Family("GPT-J", {"rotary_dim": 4}),
    "granite": Family("Granite 3"),
    "granitemoehybrid": Family(
        "Granite 4.0 H 350M and 1B (without experts)",
        _MAMBA | {"num_local_experts": 0, "layer_types": ["mamba", "attention"] * 2},
        cached=False,
    ),
    "helium": Family("Helium"),
    "hunyuan_v1_dense": Family("Hunyuan 0.5B to 7B"),
    "internlm3": Family("InternLM3"),
    "jais2": Family("Jais 2"),
    "lfm2": Family(
        "LFM2",
        {"layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 32},
        cached=False,
    ),
    "llama": Family("Llama 1 to 3, TinyLlama, Vicuna, SmolLM, Yi"),
    "mamba": Family("Mamba", cached=False, adapted=False, steered=False),
    "mamba2": Family(
        "Mamba 2, Codestral Mamba",
        {"num_heads": 4, "n_groups": 1, "state_size": 8},
        cached=False,
        adapted=False,
        steered=False,
    ),
    "minicpm3": Family("MiniCPM3"),
    "ministral": Family("Ministral 8B"),
    "ministral3": Family("Ministral 3, its text model"),
    "mistral": Family("Mistral 7B, Nemo, Zephyr"),
    "mpt": Family("MPT"),
    "nanochat": Family("nanochat"),
    "nemotron": Family("Nemotron-4, Minitron"),
    "olmo": Family("OLMo"),
    "olmo2": Family("OLMo 2"),
    "olmo3": Family("OLMo 3"),
    "openai-gpt": Family("GPT", cached=False),
    "opt": Family("OPT, Galactica", {"word_embed_proj_dim": 16}),
    "persimmon": Family("Persimmon"),
    "phi": Family("Phi-1, Phi-1.5, Phi-2"),
    "phi3": Family("Phi-3, Phi-4, Phi-4-mini"),
    "qwen2": Family("Qwen 1.5, 2 and 2.5"),
    "qwen3": Family("Qwen3"),
    "qwen3_5_text": Family("Qwen3.5, its text model", _LINEAR_ATTENTION, cached=False),
    "recurrent_gemma": Family("RecurrentGemma", cached=False),
    "rwkv": Family("RWKV-4", cached=False),
    "seed_oss": Family("Seed-OSS"),
    "smollm3": Family("SmolLM3"),
    "stablelm": Family("StableLM 2"),
    "starcoder2": Family("StarCoder2"),
    "vaultgemma": Family("VaultGemma"),
    "xglm": Family("XGLM"),
    "youtu": Family("Youtu-LLM"),
}

EXPERTS = "is a mixture of experts"
_SENSES = "is multimodal"
_BOTH_WAYS = "is an encoder"
_PAIR = "is an encoder-decoder"
REFUSED: dict[str, tuple[str, str]] = {
    **{
        family: (known, EXPERTS)
        for family, known in {
            "afmoe": "Trinity",
            "deepseek_v2": "DeepSeek-V2",
            "deepseek_v3": "DeepSeek-V3, R1",
            "ernie4_5_moe": "ERNIE 4.5 21B",
            "flex_olmo": "FlexOlmo",
            "glm4_moe": "GLM-4.5",
            "gpt_oss": "gpt-oss",
            "granitemoe": "Granite 3 1B-A400M",
            "hunyuan_v1_moe": "Hunyuan A13B",
            "jamba": "Jamba",
            "jetmoe": "JetMoE",
            "llama4_text": "Llama 4, its text model",
            "minimax": "MiniMax-Text-01",
            "mixtral": "Mixtral",
            "nemotron_h": "Nemotron 3 Nano",
            "olmoe": "OLMoE",
            "phimoe": "Phi-3.5-MoE",
            "qwen2_moe": "Qwen1.5-MoE, Qwen2-57B-A14B",
            "qwen3_5_moe_text": "Qwen3.5 MoE, its text model",
            "qwen3_moe": "Qwen3-30B-A3B, 235B-A22B",
            "qwen3_next": "Qwen3-Next",
        }.items()
    },
    **{
        family: (known, _SENSES)
        for family, known in {
            "aya_vision": "Aya Vision",
            "gemma3": "Gemma 3 4B to 27B",
            "gemma4": "Gemma 4",
            "idefics3": "Idefics3",
            "llava": "LLaVA",
            "mistral3": "Mistral Small 3.1",
            "paligemma": "PaliGemma",
            "phi4_multimodal": "Phi-4-multimodal",
            "qwen2_5_vl": "Qwen2.5-VL",
            "qwen2_audio": "Qwen2-Audio",
            "qwen2_vl": "Qwen2-VL",
            "qwen3_vl": "Qwen3-VL",
            "smolvlm": "SmolVLM",
        }.items()
    },
    **{
        family: (known, _BOTH_WAYS)
        for family, known in {
            "bert": "BERT",
            "electra": "ELECTRA",
            "roberta": "RoBERTa",
            "xlm-roberta": "XLM-R",
        }.items()
    },
    **{
        family: (known, _PAIR)
        for family, known in {"bart": "BART", "t5": "T5, Flan-T5", "whisper": "Whisper"}.items()
    },
}


def configuration(family: str, vocabulary: int) -> Any:
    """A tiny configuration in float32."""
    import torch
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    usual = CONFIG_MAPPING[family]()
    known = usual.to_dict().keys() | usual.attribute_map.keys()
    twice = {inner for outer, inner in usual.attribute_map.items() if outer in known}
    sizes = {name: size for name, size in _SIZES.items() if name in known - twice}
    sizes |= {"vocab_size": vocabulary} | (SUPPORTED[family].sizes if family in SUPPORTED else {})
    config = AutoConfig.for_model(family, **sizes)
    config.dtype = torch.float32
    return config


def page() -> str:
    """docs/models.md with the tables as they should be; its prose is its own."""
    supported = [
        f"| `{family}` | {row.known} | yes | {'yes' if row.adapted else 'refused'}"
        f" | {'yes' if row.steered else 'refused'} | {'cached' if row.cached else 'anew'} |"
        for family, row in sorted(SUPPORTED.items())
    ]
    others = [
        f"| `{family}` | {known} | {why.removeprefix('is ')} |"
        for family, (known, why) in sorted(REFUSED.items(), key=lambda row: (row[1][1], row[0]))
    ]
    text = PAGE.read_text(encoding="utf-8")
    for heading, rows in (("Unlearned", supported), ("Refused by name", others)):
        parts = re.fullmatch(
            rf"(.*\n## {heading}: )\d+(.*?\n\| `model_type` [^\n]*\n\|[-|]+\|\n).*?(\n\n.*)",
            text,
            re.S,
        )
        assert parts is not None, f"{PAGE}: no table under {heading}"
        text = parts[1] + str(len(rows)) + parts[2] + "\n".join(rows) + parts[3]
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
