"""Tries every setting that decides the function: trained, loaded by its checkpoint's args, exported.

    python -m tests.sweep_settings                  all of them, about 10 minutes on two cores
    python -m tests.sweep_settings use_mup rotary   those whose name begins so

For each setting a tiny model is trained for five steps on the CPU and validated. It is loaded with
``--use-checkpoint-args`` and none of its flags, and must validate to the last printed digit as in training. The export
must compute the trained model's logits, or be refused in one line. Prints a table, with exit code 1 if a row is wrong.
"""

from __future__ import annotations

import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from megatron_moa.command_line.megatron_flags import FUNCTION
from megatron_moa.command_line.words import flag_groups
from megatron_moa.runs.tiny_model import MOE, TINY
from tests.support import launch
from tests.support.training import ROOT

STOCK = "--swiglu --ffn-hidden-size 48 --moa-mixing none"
GELU = "--ffn-hidden-size 48 --moa-mixing none"
EXPERTS = f"{STOCK} {' '.join(MOE)}"
MUP = f"{STOCK} --use-mup --mup-base-hidden-size 16"
YARN = f"{STOCK} --position-embedding-type yarn --yarn-original-max-position-embeddings 16"
LATENT = (
    f"{STOCK} -group-query-attention -num-query-groups --multi-latent-attention --kv-lora-rank 16 --qk-head-dim 8 "
    "--qk-pos-emb-head-dim 8 --v-head-dim 8 --kv-channels 16"
)
CAPACITY = f"{EXPERTS} --moe-expert-capacity-factor 1.0"

# The flags that set each setting to another value than TINY's. A word with a minus before it takes a flag of TINY away.
TRIED = {
    "num_layers": f"{STOCK} --num-layers 3",
    "hidden_size": f"{STOCK} --hidden-size 48",
    "ffn_hidden_size": f"{STOCK} --ffn-hidden-size 64",
    "num_attention_heads": f"{STOCK} --num-attention-heads 8",
    "kv_channels": f"{STOCK} --kv-channels 16",
    "group_query_attention": f"{STOCK} -group-query-attention -num-query-groups",
    "num_query_groups": f"{STOCK} --num-query-groups 4",
    "normalization": f"{STOCK} --normalization LayerNorm",
    "layernorm_epsilon": f"{STOCK} --norm-epsilon 1e-2",
    "layernorm_zero_centered_gamma": f"{STOCK} --apply-layernorm-1p",
    "position_embedding_type": f"{STOCK} --position-embedding-type none",
    "max_position_embeddings": f"{STOCK} --position-embedding-type learned_absolute --max-position-embeddings 64",
    "use_rotary_position_embeddings": f"{STOCK} -position-embedding-type --use-rotary-position-embeddings",
    "add_bias_linear": f"{STOCK} -disable-bias-linear",
    "add_qkv_bias": f"{STOCK} --add-qkv-bias",
    "untie_embeddings_and_output_weights": f"{STOCK} -untie-embeddings-and-output-weights",
    "swiglu": GELU,
    "squared_relu": f"{GELU} --squared-relu",
    "quick_geglu": f"{GELU} --quick-geglu",
    "bias_gelu_fusion": f"{GELU} -disable-bias-linear --no-bias-gelu-fusion",
    "glu_linear_offset": f"{STOCK} --glu-linear-offset 1",
    "activation_func_clamp_value": f"{STOCK} --activation-func-clamp-value 0.01",
    "qk_layernorm": f"{STOCK} --qk-layernorm",
    "qk_l2_norm": f"{STOCK} --qk-l2-norm",
    "attention_output_gate": f"{STOCK} --attention-output-gate",
    "softmax_type": f"{STOCK} --softmax-type off-by-one",
    "window_size": f"{STOCK} --window-size 4,0",
    "window_attn_skip_freq": f"{STOCK} --window-size 4,0 --window-attn-skip-freq 2",
    "mtp_num_layers": f"{STOCK} --mtp-num-layers 1",
    "mtp_use_repeated_layer": f"{STOCK} --mtp-num-layers 2 --mtp-use-repeated-layer",
    "fp32_residual_connection": f"{STOCK} --bf16 --fp32-residual-connection",
    "rotary_base": f"{STOCK} --rotary-base 50",
    "rotary_percent": f"{STOCK} --rotary-percent 0.5",
    "rotary_interleaved": f"{STOCK} --rotary-interleaved",
    "rotary_seq_len_interpolation_factor": f"{STOCK} --rotary-seq-len-interpolation-factor 4",
    "use_rope_scaling": f"{STOCK} --use-rope-scaling",
    "rope_scaling_factor": f"{STOCK} --use-rope-scaling --rope-scaling-factor 2",
    "no_rope_freq": f"{STOCK} --no-rope-freq 2",
    "rope_type": f"{LATENT} --rope-type rope",
    "rotary_scaling_factor": f"{YARN} --rotary-scaling-factor 4",
    "mscale": f"{YARN} --rotary-scaling-factor 4 --mscale 2 --mscale-all-dim 0.5",
    "mscale_all_dim": f"{YARN} --rotary-scaling-factor 4 --mscale-all-dim 2",
    "yarn_original_max_position_embeddings": f"{YARN} --rotary-scaling-factor 4",
    "yarn_beta_fast": f"{YARN} --rotary-scaling-factor 4 --yarn-beta-fast 4",
    "yarn_beta_slow": f"{YARN} --rotary-scaling-factor 4 --yarn-beta-slow 0.25",
    "yarn_correction_range_round_to_int": f"{YARN} --rotary-scaling-factor 4 --no-yarn-correction-range-round-to-int",
    "multi_latent_attention": LATENT,
    "q_lora_rank": f"{LATENT} --q-lora-rank 16",
    "kv_lora_rank": f"{LATENT} --kv-lora-rank 8",
    "qk_head_dim": f"{LATENT} --qk-head-dim 16",
    "qk_pos_emb_head_dim": f"{LATENT} --qk-pos-emb-head-dim 4",
    "v_head_dim": f"{LATENT} --v-head-dim 16",
    "use_mup": MUP,
    "mup_width_mult": f"{STOCK} --use-mup --mup-width-mult 2",
    "mup_base_hidden_size": f"{STOCK} --use-mup --mup-base-hidden-size 8",
    "mup_embedding_mult": f"{MUP} --mup-embedding-mult 4",
    "mup_output_mult": f"{MUP} --mup-output-mult 4",
    "mup_base_head_dim": f"{MUP} --mup-base-head-dim 4",
    "mup_attn_scale_power": f"{MUP} --mup-attn-scale-power 0.25",
    "num_experts": EXPERTS,
    "moe_layer_freq": f"{EXPERTS} --moe-layer-freq 2",
    "moe_ffn_hidden_size": f"{EXPERTS} --moe-ffn-hidden-size 32",
    "moe_latent_size": f"{EXPERTS} --moe-latent-size 16",
    "moe_shared_expert_intermediate_size": f"{EXPERTS} --moe-shared-expert-intermediate-size 32",
    "moe_shared_expert_gate": f"{EXPERTS} --moe-shared-expert-intermediate-size 32 --moe-shared-expert-gate",
    "moe_router_topk": f"{EXPERTS} --moe-router-topk 1 --moe-router-pre-softmax",
    "moe_router_num_groups": f"{EXPERTS} --moe-router-num-groups 2 --moe-router-group-topk 1",
    "moe_router_group_topk": f"{EXPERTS} --moe-router-num-groups 4 --moe-router-group-topk 2",
    "moe_router_pre_softmax": f"{EXPERTS} --moe-router-pre-softmax",
    "moe_router_topk_scaling_factor": f"{EXPERTS} --moe-router-pre-softmax --moe-router-topk-scaling-factor 2.5",
    "moe_router_score_function": f"{EXPERTS} --moe-router-score-function sigmoid",
    "moe_router_dtype": f"{EXPERTS} --moe-router-dtype fp32",
    "moe_router_enable_expert_bias": f"{EXPERTS} --moe-router-score-function sigmoid --moe-router-enable-expert-bias",
    "moe_router_load_balancing_type": f"{EXPERTS} --moe-router-load-balancing-type sinkhorn --moe-router-topk 1 "
    "--moe-aux-loss-coeff 0",
    "moe_router_force_biased": f"{EXPERTS} --moe-router-force-biased 1.0",
    "moe_input_jitter_eps": f"{EXPERTS} --moe-input-jitter-eps 0.5",
    "moe_apply_probs_on_input": f"{EXPERTS} --moe-apply-probs-on-input --moe-router-topk 1 --moe-router-pre-softmax",
    "moe_expert_capacity_factor": CAPACITY,
    "moe_token_drop_policy": f"{CAPACITY} --moe-token-drop-policy position",
    "moe_pad_expert_input_to_capacity": f"{CAPACITY} --moe-pad-expert-input-to-capacity",
}
# Tried, and refused when training starts: they need Transformer Engine.
REFUSED = {"layernorm_zero_centered_gamma", "softmax_type", "window_size", "window_attn_skip_freq", "moe_latent_size"}
_OTHER_MODELS = "of a hybrid model; pretrain_gpt_moa.py builds GPT models"
_ATTENTION = "of an attention that Transformer Engine or a package of kernels computes"
NOT_TRIED = {
    "add_position_embedding": "its flag is refused by Megatron, which names --position-embedding-type",
    "relative_attention_num_buckets": "of T5's positions, which no GPT model takes",
    "relative_attention_max_distance": "of T5's positions, which no GPT model takes",
    "mrope_section": "needs positions in three axes, which text does not have",
    "experimental_attention_variant": _ATTENTION,
    **{name: _ATTENTION for name in FUNCTION if name.startswith(("dsa_", "linear_"))},
    "hybrid_layer_pattern": _OTHER_MODELS,
    "hybrid_override_pattern": _OTHER_MODELS,
    "is_hybrid_model": _OTHER_MODELS,
    "mtp_hybrid_override_pattern": _OTHER_MODELS,
    **{name: _OTHER_MODELS for name in FUNCTION if name.startswith("mamba_")},
    "heterogeneous_layers_config_encoded_json": "of layers of several kinds, which have a spec of their own",
    "moe_shared_expert_glu_interleave_size": "of Transformer Engine's grouped experts",
    "moe_mlp_glu_interleave_size": "of Transformer Engine's grouped experts",
    "moe_router_force_load_balancing": "routes at random, so that two evaluations differ",
    "moe_expert_rank_capacity_factor": "of experts' memory kept on a GPU",
}

TRAINING = "--train-iters 5 --eval-iters 2 --eval-interval 1000".split()
# Enough to load with: no flag of the model's.
LOADING = (
    "--micro-batch-size 2 --global-batch-size 4 --lr 2e-3 --mock-data --tokenizer-type NullTokenizer --vocab-size 63 "
    "--make-vocab-size-divisible-by 16 --split 90,5,5 --num-workers 0 --seed 7 --use-checkpoint-args --skip-train"
).split()


@dataclass
class Row:
    """What became of one setting: losses as they were printed, and the export's answer."""

    name: str
    training: str
    loaded: str = ""
    export: str = ""

    @property
    def is_wrong(self) -> bool:
        if self.name in REFUSED:
            return not self.training.startswith("refused: ")
        return self.training != self.loaded or not self.export.startswith(("same logits", "refused"))


def flags_of(text: str) -> list[str]:
    """TINY's flags changed as an entry of :data:`TRIED` says."""
    flags = text.split()
    removed = {f"-{word}" for word in flags if re.match("-[a-z]", word)}
    assert removed <= set(TINY), text
    words = [word for group in flag_groups(TINY) if group[0] not in removed for word in group]
    return [*words, *(word for word in flags if f"-{word}" not in removed)]


def _run(script: str, arguments: list[str]) -> tuple[int, str]:
    return launch.launch(launch.script, (str(ROOT / script), arguments), 1, ROOT)


def _loss_or_reason(returncode: int, log: str) -> str:
    if returncode == 0:
        return re.findall(r"on validation set \| lm loss value: (\S+)", log)[0]
    return _reason(returncode, log)


def _reason(returncode: int, log: str) -> str:
    errors = re.findall(r"error: (.*)", log)
    if returncode == 2 and errors and "Traceback" not in log:
        return f"refused: {errors[-1]}"
    return f"exit code {returncode}: {log.strip().splitlines()[-1] if log.strip() else ''}"


def try_setting(name: str, folder: Path) -> Row:
    """Trains, loads and exports a tiny model that has the setting.

    Args:
        folder: empty, to write to.
    """
    saved = str(folder / "checkpoint")
    words = flags_of(TRIED[name])
    saving = ["--save", saved, "--save-interval", "5"]
    row = Row(name, _loss_or_reason(*_run("pretrain_gpt_moa.py", [*words, *TRAINING, *saving])))
    if not re.fullmatch(r"\d\.\d+E[+-]\d+", row.training):
        return row
    half = ["--bf16"] if "--bf16" in words else []
    row.loaded = _loss_or_reason(*_run("pretrain_gpt_moa.py", [*LOADING, *TRAINING, *half, "--load", saved]))
    returncode, log = _run("tools/convert_to_hf.py", ["--load", saved, "--out", str(folder / "hf"), "--no-tokenizer"])
    row.export = "same logits" if returncode == 0 and "verified" in log else _reason(returncode, log)
    return row


def main(prefixes: list[str]) -> int:
    """Prints the table row by row."""
    names = [name for name in TRIED if not prefixes or name.startswith(tuple(prefixes))]
    print("| setting | validation loss in training | by --use-checkpoint-args | export | |")
    print("| --- | --- | --- | --- | --- |")
    wrong = 0
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            row = try_setting(name, Path(folder))
        wrong += row.is_wrong
        verdict = "WRONG" if row.is_wrong else ""
        print(f"| {name} | {row.training} | {row.loaded} | {row.export} | {verdict} |", flush=True)
    print(
        f"{wrong} of {len(names)} wrong; not tried: {', '.join(f'{name} ({why})' for name, why in NOT_TRIED.items())}"
    )
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
