"""Maps transformers' own models (Llama, Qwen, …) to this project's: settings and weights, both ways.

A family says what its config.json means as a :class:`GPTMoAConfig`, and which names and layouts its weights have on
disk. Whether a model is one of a family is not written down twice: it is, if its settings come back unchanged from the
family's configuration.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_moa.errors import UserError
from megatron_moa.hf import mapping
from megatron_moa.hf.configuration_gpt_moa import GPTMoAConfig
from megatron_moa.hf.mapping import Entry

TANH_GELU = "gelu_pytorch_tanh"
# Transformers' names of the activations that Megatron has; those of one line are the same function.
_ACTIVATIONS = {
    **dict.fromkeys(("silu", "swish"), "silu"),
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys((TANH_GELU, "gelu_new", "gelu_fast"), TANH_GELU),
}
# Megatron's LLaMA 3 scaling takes a factor alone (RotaryEmbedding._apply_scaling).
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_ROPE_KEYS = {"default": (), "linear": ("factor",), "llama3": ("factor", *LLAMA3_ROPE)}

_BASE = frozenset(setting.name for setting in dataclasses.fields(PreTrainedConfig))
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Bookkeeping, what a call returns, and dropout, which evaluation does not have: none changes the function.
_NEUTRAL = (_BASE - {"is_encoder_decoder"}) | {
    *("model_type", "output_attentions", "use_cache", "attention_dropout", "auto_map", "task_specific_params"),
    *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),  # of training
    *("is_llama_config", "transformers.js_config", "unsloth_fixed", "unsloth_version"),  # what other tools leave behind
}
_WINDOW = frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"})
_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
_EXPERT_SETTINGS = frozenset(
    setting.name for setting in dataclasses.fields(GPTMoAConfig) if setting.name.startswith(("router_", "shared_"))
).union(_EXPERTS)
_SIZES = frozenset(
    (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "shared_expert_intermediate_size", *_EXPERTS),
    )
)
# Of ours: what does not decide the function. In float32 the router's product is the same in either precision.
_NO_FUNCTION = _BASE.union(
    _TOKENS,
    ("mixing_backend", "mixing_format_version", "router_float32"),
    ("attention_dropout", "initializer_range", "use_cache", "router_aux_loss_coef"),
)


def _nothing(config: PreTrainedConfig) -> dict[str, Any]:
    return {}


def _other_names(key: str, aliases: Mapping[str, str]) -> set[str]:
    """Of a key of config.json, which may stand there as the class knows it or as the class writes it."""
    return {name for pair in aliases.items() if key in pair for name in pair}


def _as_it_is(entry: Entry) -> Entry:
    return entry


@dataclass(frozen=True)
class Family:
    """A class of transformers' language models.

    Attributes:
        architecture: its name, as ``architectures`` in config.json has it.
        config_class: of its configuration.
        keys: keys of its config.json -> settings of ours that mean the same.
        always: settings of ours that all of its models have; others are :class:`GPTMoAConfig`'s defaults.
        read: further settings of ours from its configuration.
        written: further keys of its config.json from ours.
        translated: the keys that ``read`` looks at.
        only: keys of which one value is supported, and that value.
        neutral: keys that do not change the function.
        names: patterns in the names of GPTMoAForCausalLM's weights, and what stands there on its disk.
        relaid: an entry with such names -> the entry as the tensors lie there.
        prefix: what names begin with; files of the bare model lack it.
        computed: a pattern of buffers in old files that are computed from the settings.
    """

    architecture: str
    config_class: type[PreTrainedConfig]
    keys: Mapping[str, str]
    always: Mapping[str, Any] = field(default_factory=dict)
    read: Callable[[Any], dict[str, Any]] = _nothing
    written: Callable[[GPTMoAConfig], dict[str, Any]] = _nothing
    translated: frozenset[str] = frozenset()
    only: Mapping[str, Any] = field(default_factory=lambda: {"is_encoder_decoder": False})
    neutral: frozenset[str] = frozenset(_NEUTRAL)
    names: tuple[tuple[str, str], ...] = ()
    relaid: Callable[[Entry], Entry] = _as_it_is
    prefix: str = ""
    computed: str = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"

    def check_sizes(self, settings: Mapping[str, Any]) -> None:
        """Raises UserError if a size in the settings of a config.json is none."""
        for key, ours in self.keys.items():
            if ours not in _SIZES:
                continue
            for name in {key, *_other_names(key, self.config_class.attribute_map)} & settings.keys():
                value, least = settings[name], int(ours not in _EXPERT_SETTINGS)
                if value is not None and (type(value) is not int or value < least):
                    raise _refused(name, value, f"a whole number of at least {least} is wanted")

    def to_own(self, config: PreTrainedConfig) -> GPTMoAConfig:
        """The settings of the GPTMoAForCausalLM, and so of the Megatron model, that computes the same.

        Args:
            config: of this family's class, as read from a config.json.

        Raises:
            UserError: a key of config.json that neither this project nor Megatron has anything for.
        """
        self._check_keys(config)
        try:
            own = self._translate(config)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"config.json, {error}") from None
        self._check_own(own)
        return own

    def from_own(self, own: GPTMoAConfig) -> PreTrainedConfig:
        """The family's configuration of a model; of the same function where :meth:`why_not` is None."""
        keys = {theirs: getattr(own, ours) for theirs, ours in self.keys.items()} | self.written(own)
        fields = {setting.name for setting in dataclasses.fields(self.config_class)}
        if "head_dim" not in fields and keys.get("head_dim") == own.hidden_size // own.num_attention_heads:
            del keys["head_dim"]  # what it is without being said
        return self.config_class(**copy.deepcopy(keys))

    def why_not(self, own: GPTMoAConfig) -> str | None:
        """What keeps a model from being one of this family; None if it is one."""
        return next(iter(self.differences(own).values()), None)

    def differences(self, own: GPTMoAConfig) -> dict[str, str]:
        """Every setting of a model that this family does not have: its name, and a text."""
        try:
            theirs = function_settings(self._translate(self.from_own(own)))
        except (ValueError, StrictDataclassError) as error:  # sizes that the class does not accept
            return {"": str(error).splitlines()[-1].strip().removeprefix("ValueError: ")}
        ours = function_settings(own)
        both = [name for name in ours if name in theirs]  # where they differ in more, moe_layers or mixing does, too
        return {name: _difference(name, ours[name], theirs[name]) for name in both if ours[name] != theirs[name]}

    def entries(self, own: GPTMoAConfig) -> Iterator[Entry]:
        """All parameters of a model, each with the names it has in this family's files."""
        for entry in mapping.entries(own):
            yield self.relaid(dataclasses.replace(entry, hf=tuple(map(self._renamed, entry.hf))))

    def stored_name(self, name: str) -> str | None:
        """Returns the name that :meth:`entries` has for a tensor in a file, or None for a computed buffer.

        Old names are known, too.
        """
        if self.prefix and not name.startswith((self.prefix, "lm_head.")):
            name = self.prefix + name
        return None if re.fullmatch(self.computed, name) else name

    def _renamed(self, name: str) -> str:
        for pattern, replacement in self.names:
            name = re.sub(pattern, replacement, name)
        return name

    def _translate(self, config: PreTrainedConfig) -> GPTMoAConfig:
        settings = {ours: getattr(config, theirs, None) for theirs, ours in self.keys.items()}
        settings["hidden_act"] = _ACTIVATIONS.get(settings["hidden_act"], settings["hidden_act"])
        rope = settings.get("rope_parameters")
        if rope:
            kept = ("rope_type", "rope_theta", *_ROPE_KEYS.get(rope.get("rope_type"), ()))
            settings["rope_parameters"] = {key: rope.get(key) for key in kept}
        return GPTMoAConfig(**{**settings, **self.always, **self.read(config)})

    def _check_keys(self, config: PreTrainedConfig) -> None:
        """Every key is used, known not to matter, or refused."""
        aliases = config.attribute_map
        used = {*self.keys, *self.translated, *_WINDOW}
        for key, value in config.to_dict().items():
            names = {key, *_other_names(key, aliases)}
            if key == "quantization_config":
                raise _refused(key, "is there", "quantised weights are not read; dequantise the model first")
            if key in self.only and value != self.only[key]:
                raise _refused(key, value, f"only {self.only[key]} is supported")
            if key == "mixed_feed_forward":  # megatron_moa.pytorch.replacement
                raise _refused(key, "is there", "megatron_moa.load_replaced alone reads layers that were replaced")
            known = names & (used | self.neutral | self.only.keys()) or key.startswith("_")
            if not known and value not in (None, False, [], {}):
                what = f"{self.architecture} has no such key; take it out if the model does not depend on it"
                raise _refused(key, value, what)
        window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None) or []
        if not getattr(config, "use_sliding_window", True):
            window = None
        if window and type(window) is not int:
            raise _refused("sliding_window", window, "a whole number or null is wanted")
        for kind in set(kinds) - {"full_attention", "sliding_attention"}:
            raise _refused("layer_types", kind, "only full_attention is supported")
        if "sliding_attention" in kinds and not window:
            raise _refused("layer_types", "sliding_attention", "only full_attention is supported")
        if window and (not kinds or "sliding_attention" in kinds) and window < config.max_position_embeddings:
            what = f"attention over a window is not supported; max_position_embeddings {window} has no need of it"
            raise _refused("sliding_window", window, what)
        rope = getattr(config, "rope_parameters", None)
        if rope and "rope_parameters" in self.keys:
            _check_rope(rope, whole_heads=config.model_type != GPTMoAConfig.model_type)

    def _check_own(self, own: GPTMoAConfig) -> None:
        """Settings that can be written down, but that Megatron cannot compute."""
        key = {ours: theirs for theirs, ours in self.keys.items()}
        name, activation = key["hidden_act"], own.hidden_act
        if own.mixing is None:
            wanted = ("silu",) if own.gated else ("gelu", TANH_GELU)
            if activation not in wanted:
                raise _refused(name, activation, f"supported here: {', '.join(wanted)}")
            if activation == TANH_GELU and (not own.mlp_bias or own.num_experts):
                what = "Megatron has this approximation of GELU in dense layers with biases alone; gelu is supported"
                raise _refused(name, activation, what)
        biases = own.attention_bias, own.attention_output_bias, own.mlp_bias
        if biases not in ((False, False, False), (True, False, False), (True, True, True)):
            there = [text for text, has in zip(("q, k, v", "attention's output", "MLPs"), biases, strict=True) if has]
            name = "attention_bias" if own.attention_bias else "mlp_bias"
            what = f"biases of {' and '.join(there)} alone; Megatron has them in q, k, v or in all linear layers"
            raise _refused(name, True, what)
        single = own.num_experts and own.num_experts_per_tok == 1
        if single and own.router_score == "softmax" and not own.router_pre_softmax:
            raise _refused("num_experts_per_tok", 1, "Megatron does not normalise the probability of a single expert")


def _refused(key: str, value: object, what: str) -> UserError:
    return UserError(f"config.json, {key} {value}: {what}")


def _check_rope(rope: Mapping[str, Any], whole_heads: bool) -> None:
    """Raises UserError for rotary positions that Megatron does not compute."""
    kind = rope.get("rope_type")
    if kind not in _ROPE_KEYS:
        raise _refused("rope_parameters, rope_type", kind, f"supported: {', '.join(_ROPE_KEYS)}")
    legal = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_ROPE_KEYS[kind]}
    for key, value in rope.items():
        name = f"rope_parameters, {key}"
        if key not in legal and value is not None:
            raise _refused(name, value, f"is not supported with rope_type {kind}")
        if key in ("rope_theta", *_ROPE_KEYS[kind]) and not (type(value) in (int, float) and value > 0):
            raise _refused(name, value, "a number above 0 is wanted")
        if key in LLAMA3_ROPE and key in legal and value != LLAMA3_ROPE[key]:
            raise _refused(name, value, f"Megatron's is fixed at {LLAMA3_ROPE[key]:g}")
        is_whole = key == "rope_theta" or (key == "factor" and kind == "linear")
        if is_whole and not float(value).is_integer():
            raise _refused(name, value, "Megatron takes whole numbers")
        if key == "partial_rotary_factor" and whole_heads and value not in (None, 1):
            raise _refused(name, value, "this class of transformers rotates whole heads")


def function_settings(own: GPTMoAConfig) -> dict[str, Any]:
    """The settings that decide what a model computes."""
    settings = {
        setting.name: getattr(own, setting.name)
        for setting in dataclasses.fields(GPTMoAConfig)
        if setting.name not in _NO_FUNCTION
    }
    unused = set()
    if not any(own.moe_layers):
        unused |= _EXPERT_SETTINGS
    elif all(own.moe_layers):
        unused.add("intermediate_size")
    if own.mixing is not None:
        unused.add("hidden_act")
    return {name: value for name, value in settings.items() if name not in unused}


def _difference(name: str, ours: object, theirs: object) -> str:
    if name == "mixing":
        return "its activations are mixed"
    return f"{name} is {ours}, there it is {theirs}"


# Families.

_DECODER = {
    name: name
    for name in (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
        *("num_key_value_heads", "max_position_embeddings", "rope_parameters", "hidden_act", "tie_word_embeddings"),
        *("initializer_range", *_TOKENS),
    )
} | {"rms_norm_eps": "norm_eps"}
_ATTENTION_BIAS = {"attention_bias": "attention_bias"}
_OUTPUT_TOO: dict[str, Any] = {"read": lambda config: {"attention_output_bias": config.attention_bias}}

LLAMA = Family(
    "LlamaForCausalLM",
    LlamaConfig,
    {**_DECODER, **_ATTENTION_BIAS, "mlp_bias": "mlp_bias"},
    **_OUTPUT_TOO,
    neutral=frozenset(_NEUTRAL | {"pretraining_tp"}),  # how a product is cut
)
MISTRAL = Family("MistralForCausalLM", MistralConfig, _DECODER, written=lambda own: {"sliding_window": None})
QWEN2 = Family("Qwen2ForCausalLM", Qwen2Config, _DECODER, {"attention_bias": True})
QWEN3 = Family("Qwen3ForCausalLM", Qwen3Config, {**_DECODER, **_ATTENTION_BIAS}, {"qk_norm": True}, **_OUTPUT_TOO)


# GPT-2: weights of linear layers lie transposed, those of q, k, v as one.


def _read_gpt2(config: GPT2Config) -> dict[str, Any]:
    return {"intermediate_size": config.n_inner if config.n_inner is not None else 4 * config.n_embd}


def _written_gpt2(own: GPTMoAConfig) -> dict[str, Any]:
    spelled = {TANH_GELU: "gelu_new"}  # GPT-2's own word
    return {"n_inner": own.intermediate_size, "activation_function": spelled.get(own.hidden_act, own.hidden_act)}


def _transposed(entry: Entry) -> Entry:
    if ".layers." not in entry.megatron or "layernorm" in entry.megatron:
        return entry

    def split(tensor: Tensor) -> tuple[Tensor, ...]:
        return (torch.cat(entry.split(tensor)).t().contiguous(),)

    def join(tensors: tuple[Tensor, ...]) -> Tensor:
        return entry.join(tensors[0].t().contiguous().chunk(len(entry.hf)))

    return Entry(entry.megatron, entry.hf[:1], split, join)


GPT2 = Family(
    "GPT2LMHeadModel",
    GPT2Config,
    keys={
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "layer_norm_epsilon": "norm_eps",
        "activation_function": "hidden_act",
    }
    | {name: name for name in ("vocab_size", "tie_word_embeddings", "initializer_range", *_TOKENS)},
    always={
        "normalization": "LayerNorm",
        "position_embedding_type": "learned_absolute",
        "gated": False,
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
    },
    read=_read_gpt2,
    written=_written_gpt2,
    translated=frozenset({"n_inner"}),
    only={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "is_encoder_decoder": False,
    },
    # In which order and precision attention is computed; n_ctx repeats n_positions; the rest is of other heads.
    neutral=_NEUTRAL
    | {"attn_pdrop", "embd_pdrop", "resid_pdrop", "reorder_and_upcast_attn", "n_ctx"}
    | {"summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"},
    names=(
        (r"^model\.embed_tokens", "transformer.wte"),
        (r"^model\.embed_positions", "transformer.wpe"),
        (r"^model\.norm", "transformer.ln_f"),
        (r"^model\.layers", "transformer.h"),
        (r"\.input_layernorm", ".ln_1"),
        (r"\.post_attention_layernorm", ".ln_2"),
        (r"\.self_attn\.[qkv]_proj", ".attn.c_attn"),
        (r"\.self_attn\.o_proj", ".attn.c_proj"),
        (r"\.mlp\.up_proj", ".mlp.c_fc"),
        (r"\.mlp\.down_proj", ".mlp.c_proj"),
    ),
    relaid=_transposed,
    prefix="transformer.",
    computed=r"transformer\.h\.\d+\.attn\.(masked_)?bias",
)


# Experts.

MIXTRAL = Family(
    "MixtralForCausalLM",
    MixtralConfig,
    {
        **{key: ours for key, ours in _DECODER.items() if key != "intermediate_size"},
        "intermediate_size": "moe_intermediate_size",
        "num_local_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_tok",
        "router_aux_loss_coef": "router_aux_loss_coef",
    },
    read=lambda config: {"intermediate_size": config.intermediate_size},
    names=(
        (r"\.mlp\.router\.", ".block_sparse_moe.gate."),
        (r"\.mlp\.experts\.(\d+)\.gate_proj", r".block_sparse_moe.experts.\1.w1"),
        (r"\.mlp\.experts\.(\d+)\.up_proj", r".block_sparse_moe.experts.\1.w3"),
        (r"\.mlp\.experts\.(\d+)\.down_proj", r".block_sparse_moe.experts.\1.w2"),
    ),
)


def _read_qwen_moe(config: Qwen2MoeConfig | Qwen3MoeConfig) -> dict[str, Any]:
    step = config.decoder_sparse_step
    if step < 1:
        raise _refused("decoder_sparse_step", step, "at least 1 is wanted")
    moe_layers = [
        config.num_experts > 0 and layer not in config.mlp_only_layers and (layer + 1) % step == 0
        for layer in range(config.num_hidden_layers)
    ]
    return {
        "moe_layers": moe_layers,
        "num_experts": config.num_experts if any(moe_layers) else 0,
        "router_pre_softmax": not config.norm_topk_prob,
        "attention_output_bias": getattr(config, "attention_bias", False),  # Qwen2's has none
    }


def _written_qwen_moe(own: GPTMoAConfig) -> dict[str, Any]:
    return {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, is_moe in enumerate(own.moe_layers) if not is_moe],
        "norm_topk_prob": not own.router_pre_softmax,
    }


_QWEN_MOE: dict[str, Any] = {
    "read": _read_qwen_moe,
    "written": _written_qwen_moe,
    "translated": frozenset({"decoder_sparse_step", "mlp_only_layers", "norm_topk_prob"}),
    "names": ((r"\.mlp\.router\.", ".mlp.gate."),),
}
_QWEN_MOE_KEYS = {**_DECODER, **{key: key for key in (*_EXPERTS, "router_aux_loss_coef")}}
QWEN2_MOE = Family(
    "Qwen2MoeForCausalLM",
    Qwen2MoeConfig,
    {
        **_QWEN_MOE_KEYS,
        "qkv_bias": "attention_bias",
        "shared_expert_intermediate_size": "shared_expert_intermediate_size",
    },
    {"shared_expert_gate": True},
    **_QWEN_MOE,
)
QWEN3_MOE = Family(
    "Qwen3MoeForCausalLM", Qwen3MoeConfig, {**_QWEN_MOE_KEYS, **_ATTENTION_BIAS}, {"qk_norm": True}, **_QWEN_MOE
)


# This project's own.


class _Own(Family):
    """GPTMoAForCausalLM: nothing to translate."""

    def from_own(self, own: GPTMoAConfig) -> GPTMoAConfig:
        return own

    def _translate(self, config: GPTMoAConfig) -> GPTMoAConfig:
        return config


OWN = _Own(
    "GPTMoAForCausalLM",
    GPTMoAConfig,
    {setting.name: setting.name for setting in dataclasses.fields(GPTMoAConfig) if setting.name not in _BASE},
)

# In the order in which an export tries them: a class before one that has it as a special case.
FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, QWEN2, QWEN3, GPT2, MIXTRAL, QWEN2_MOE, QWEN3_MOE)


def family_of(architecture: str, named_by: str = "config.json, architectures") -> Family:
    """The family of this name, GPTMoAForCausalLM's included.

    Args:
        named_by: what names it, for the message.

    Raises:
        UserError: there is none.
    """
    known = {family.architecture: family for family in (*FAMILIES, OWN)}
    if architecture not in known:
        raise UserError(f"{named_by} {architecture}: is not supported; supported: {', '.join(known)}")
    return known[architecture]


def stock_family(own: GPTMoAConfig) -> tuple[Family | None, str]:
    """Returns the first family that a model is one of.

    If there is none, it returns as a sentence what keeps the model from the nearest family.
    """
    differences = {family.architecture: family.differences(own) for family in FAMILIES}
    for family in FAMILIES:
        if not differences[family.architecture]:
            return family, ""
    nearest = min(differences, key=lambda name: ("moe_layers" in differences[name], len(differences[name])))
    return None, f"a plain {nearest} would not do: {next(iter(differences[nearest].values()))}"
