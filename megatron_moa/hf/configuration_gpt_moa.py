"""Defines the settings of GPTMoAForCausalLM: GPTs whose feed-forward layers mix activations."""

from __future__ import annotations

from importlib import import_module
from os import PathLike
from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from megatron_moa.mixture.config import FORMAT_VERSION, refuse_changed_form

NORMALIZATIONS = ("RMSNorm", "LayerNorm")
POSITIONS = ("rope", "learned_absolute", "none")
ROUTER_SCORES = ("softmax", "sigmoid")
# The dictionary that format version 1 took where none was named; its type1 left out the identity.
_VERSION_1_DICTIONARY = ("identity", "gelu", "silu", "relu", "leaky_relu", "relu2", "tanh")
# transformers' name for a parameter that all ranks hold, each with the gradient of its own heads only.
_SUM_GRADIENTS = "replicated_with_grad_allreduce"


class GPTMoAConfig(PreTrainedConfig):
    """Settings of a model as Megatron trained it.

    Args:
        vocab_size: entries of embedding and output layer, without what only padded them in training.
        hidden_size: h.
        intermediate_size: f of dense feed-forward layers.
        num_key_value_heads: groups of grouped-query attention; default: as many as heads.
        head_dim: default: hidden_size / num_attention_heads.
        normalization: ``RMSNorm`` or ``LayerNorm``.
        position_embedding_type: ``rope``, ``learned_absolute`` or ``none``.
        rope_parameters: transformers' own; ``partial_rotary_factor`` among them.
        attention_bias, attention_output_bias, mlp_bias: biases of q, k, v; of attention's output; of feed-forward
            layers.
        qk_norm: whether queries and keys are normalised per head.
        gated: whether feed-forward layers have two branches (SwiGLU's place).
        mixing: settings of the mixture as :class:`megatron_moa.mixture.config.MixtureConfig` takes them, those of its
            start among them (``initial_coefficients``, ``gate_init_std``, ``init_scale``); None for the fixed
            activation ``hidden_act`` (docs/mixture.md).
        mixing_format_version: says what ``mixing`` means; a config.json without it is of version 1, and brought to
            today's where that can be.
        mixing_scale: whether gates have a constant factor, as ``init_scale`` ``matched`` gives those of fixed
            amplitude.
        mixing_backend: ``eager``, ``compile`` or ``triton``, where megatron_moa is installed; ``auto`` or None: the
            fastest on GPUs, ``eager`` on CPUs.
        num_experts: routed experts of a MoE layer; 0 for a dense model.
        num_experts_per_tok: how many of them a token is sent to.
        moe_layers: for each layer, whether it is one of experts; default: all or none.
        moe_intermediate_size: f of a routed expert.
        shared_expert_intermediate_size: f of the shared expert; 0 for none.
        shared_expert_gate: whether a sigmoid gate scales the shared expert's output.
        router_score: ``softmax`` or ``sigmoid``.
        router_pre_softmax: softmax over all experts before the choice; else over those chosen.
        router_scaling_factor: multiplies the probabilities.
        router_bias: whether experts are chosen with a bias that their probabilities do not have.
        router_float32: whether the router's product is computed in float32.
        output_router_logits: whether the model returns them, and adds the loss of the experts' balance to the labels'.
        router_aux_loss_coef: the factor on that loss.
    """

    model_type = "gpt_moa"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 1024
    normalization: str = "RMSNorm"
    norm_eps: float = 1e-5
    position_embedding_type: str = "rope"
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    gated: bool = True
    hidden_act: str = "silu"
    mixing: dict[str, Any] | None = None
    mixing_format_version: int = FORMAT_VERSION
    mixing_scale: bool = False
    mixing_backend: str | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_layers: list[bool] | None = None
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool = False
    router_score: str = "softmax"
    router_pre_softmax: bool = False
    router_scaling_factor: float = 1.0
    router_bias: bool = False
    router_float32: bool = False
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.moe_layers is None:
            self.moe_layers = [self.num_experts > 0] * self.num_hidden_layers
        if self.position_embedding_type == "rope" and self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        if self.mixing_format_version != FORMAT_VERSION:
            raise ValueError(
                f"mixing_format_version {self.mixing_format_version}: this code reads versions up to {FORMAT_VERSION}; "
                f"load the model with a megatron_moa that knows version {self.mixing_format_version}"
            )
        if self.mixing is not None and self.mixing.get("init_scale") == "matched":
            fixed = self.mixing.get("amplitude", "fixed") == "fixed"
            self.mixing_scale = self.mixing_scale or (self.mixing.get("mixing", "moa") == "moa" and fixed)
        for name, legal in (
            ("normalization", NORMALIZATIONS),
            ("position_embedding_type", POSITIONS),
            ("router_score", ROUTER_SCORES),
        ):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name} {getattr(self, name)!r}: unknown; one of {', '.join(legal)}")
        if len(self.moe_layers) != self.num_hidden_layers:
            raise ValueError(f"moe_layers: {len(self.moe_layers)} entries for {self.num_hidden_layers} layers")
        if any(self.moe_layers) and not self.num_experts:
            raise ValueError("moe_layers: some layers are of experts, and num_experts is 0")
        if any(self.moe_layers) and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok}: not 1 to num_experts {self.num_experts}")
        if self.num_attention_heads % self.num_key_value_heads:
            heads = f"num_attention_heads {self.num_attention_heads}"
            raise ValueError(f"num_key_value_heads {self.num_key_value_heads}: {heads} is no multiple of it")
        if self.mixing is None and self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {self.hidden_act!r}: transformers has no activation of that name")
        self.base_model_tp_plan = self._tensor_parallel_plan()
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory: str | PathLike, *args: Any, **kwargs: Any) -> None:
        """Saves as transformers does, with the model's code beside it; a model that is saved calls it, too.

        A class that was loaded from an export has that folder's code, which transformers copies.
        """
        if __name__ == "megatron_moa.hf.configuration_gpt_moa":
            # No import statement: transformers refuses code that imports what is not installed.
            import_module("megatron_moa.hf.exported_code").write_code(self, save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)

    def _tensor_parallel_plan(self) -> dict[str, str]:
        """Returns how transformers and vLLM split the model's modules over GPUs.

        Both branches of a layer are cut alike.
        """
        plan = dict.fromkeys((f"layers.*.self_attn.{name}_proj" for name in "qkv"), "colwise")
        plan["layers.*.self_attn.o_proj"] = "rowwise"
        if self.qk_norm:
            plan |= dict.fromkeys(("layers.*.self_attn.q_norm", "layers.*.self_attn.k_norm"), _SUM_GRADIENTS)
        parts = [] if all(self.moe_layers) else ["mlp"]
        if any(self.moe_layers):
            parts += ["mlp.experts.*", *(["mlp.shared_expert"] if self.shared_expert_intermediate_size else [])]
        for part in parts:
            for name in ("gate_proj", "up_proj") if self.gated else ("up_proj",):
                plan[f"layers.*.{part}.{name}"] = "colwise"
            plan[f"layers.*.{part}.down_proj"] = "rowwise"
        return plan

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', from the settings in a file.

        Raises:
            UserError: a form of format version 1 that means another function today.
        """
        if config_dict.get("mixing_format_version", 1) == 1:
            config_dict = _upgraded(config_dict)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_json_file(cls, json_file: str | PathLike) -> GPTMoAConfig:
        """As :meth:`from_dict`."""
        return cls.from_dict(cls._dict_from_json_file(json_file))


def _upgraded(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of format version 1 as today's; what version 1 took for granted is written out."""
    mixing = settings.get("mixing")
    if mixing is not None:
        form, is_moa = mixing.get("form", "bi-sided"), mixing.get("mixing", "moa") == "moa"
        refuse_changed_form(form, "config.json, mixing")
        mixing = {**mixing, "init_scale": "matched" if mixing.get("init_scale") == "swiglu" else "paper"}
        if not mixing.get("activations"):
            mixing["activations"] = list(_VERSION_1_DICTIONARY[form == "type1" :])
        start = mixing.pop("initial_coefficients", [0.5])
        if is_moa:
            mixing["gate_init_std"] = settings.get("initializer_range", 0.02)
        if not is_moa or mixing.get("amplitude") == "learned":
            mixing["initial_coefficients"] = start
    return {**settings, "mixing": mixing, "mixing_format_version": FORMAT_VERSION}


__all__ = ["GPTMoAConfig"]
