"""Defines GPTMoAForCausalLM for transformers: GPT models whose feed-forward layers mix activations.

The same function as the Megatron model it was trained as. Tensors lie as transformers has them, [b, s, h]; equations
of the mixture are in reference.py (docs/mixture.md of the project). With megatron_moa installed its fused kernels
compute the mixture, otherwise the reference does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import can_return_tuple
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from megatron_moa.mixture.config import ACTIVATION_NAMES, FORMAT_VERSION, FORMS, GATES

from .configuration_gpt_moa import GPTMoAConfig

try:
    from megatron_moa.mixture import config as installed
    from megatron_moa.mixture.config import MixtureConfig
    from megatron_moa.mixture.functional import gate_coefficients, mixed_activation
    from megatron_moa.mixture.start_scale import matching_scale

    names = (ACTIVATION_NAMES, installed.ACTIVATION_NAMES), (FORMS, installed.FORMS), (GATES, installed.GATES)
    if installed.FORMAT_VERSION != FORMAT_VERSION or any(set(own) - set(theirs) for own, theirs in names):
        raise ImportError("the installed megatron_moa has another format version, or lacks names of this folder's code")
except ImportError:  # an export, which carries what it needs of the package
    from .config import MixtureConfig
    from .reference import gate_coefficients, mixed_activation
    from .start_scale import matching_scale

# Since 5.24 transformers calls a cache ``cache``, before that ``past_key_values``; forwards here take either name.
_CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


def _refuse_unknown_caches(kwargs: dict[str, Any]) -> None:
    """Raises TypeError for a cache under a name that nothing here reads.

    A step without its cache sees one token only.
    """
    if unread := sorted(name for name, value in kwargs.items() if isinstance(value, Cache)):
        raise TypeError(f"forward() got {', '.join(unread)}: give a cache as cache or past_key_values")


class RMSNorm(nn.Module):
    """x / rms(x) times a weight, inside in float32; over the last dimension."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


def build_norm(config: GPTMoAConfig, size: int) -> nn.Module:
    """The normalization that the configuration names."""
    if config.normalization == "RMSNorm":
        return RMSNorm(size, config.norm_eps)
    return nn.LayerNorm(size, eps=config.norm_eps)


class RotaryEmbedding(nn.Module):
    """Cosines and sines of rotary positions, of all kinds that transformers knows (``rope_parameters``)."""

    def __init__(self, config: GPTMoAConfig) -> None:
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        compute = self.compute_default_rope_parameters
        if self.rope_type != "default":
            compute = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = compute(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: GPTMoAConfig, **kwargs: Any) -> tuple[Tensor, float]:
        """Returns inverse frequencies [d/2], and the factor on cosines and sines.

        d is the size of the part of a head that is rotated.
        """
        size = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, size, 2, dtype=torch.float) / size
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [b, s, d] in x's dtype for position_ids [b, s]."""
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [b, heads, s, head size] with its first d entries rotated, the two halves of them as pairs."""
    size = cos.shape[-1]
    rotated, rest = x[..., :size], x[..., size:]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain PyTorch, with the arguments and results of transformers' attention functions."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class GPTMoAAttention(nn.Module):
    """Causal self-attention with grouped queries."""

    def __init__(self, config: GPTMoAConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        h, width = config.hidden_size, config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(h, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(h, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(h, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, h, bias=config.attention_output_bias)
        self.o_proj.starts_smaller = True  # _init_weights is not told a layer's place in its parent
        self.q_norm = build_norm(config, config.head_dim) if config.qk_norm else None
        self.k_norm = build_norm(config, config.head_dim) if config.qk_norm else None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[b, s, h] -> [b, s, h], and the attention's weights where the implementation gives them."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape)  # [b, s, heads, head size]
        key = self.k_proj(hidden_states).view(shape)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)  # [b, heads, s, head size]
        if position_embeddings is not None:
            query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class MixtureCoefficients(nn.Module):
    """The mixing coefficients of a feed-forward layer or an expert: gates (MoA) or parameters (LA)."""

    def __init__(self, config: GPTMoAConfig, mixture: MixtureConfig) -> None:
        super().__init__()
        self.mixture = mixture
        n = mixture.num_coefficients
        moa = mixture.kind == "moa"
        self.value = None if moa else nn.Parameter(torch.empty(n))
        self.weight = nn.Parameter(torch.empty(n, config.hidden_size)) if moa else None
        self.bias = nn.Parameter(torch.empty(n)) if moa and mixture.gate_bias else None
        self.amplitude = nn.Parameter(torch.empty(n)) if moa and mixture.amplitude == "learned" else None
        has_scale = moa and config.mixing_scale
        matched = has_scale or mixture.init_scale == "matched"
        self.start = matching_scale(mixture, config.initializer_range, config.hidden_size) if matched else 1.0
        self.scale = nn.Buffer(torch.tensor([self.start], dtype=torch.float32)) if has_scale else None

    def forward(self, hidden_states: Tensor, mixture: MixtureConfig) -> Tensor:
        """[..., n] float32 for hidden_states [..., h]; [n] for LA. ``mixture`` says by which backend."""
        if self.value is not None:
            return self.value.float()
        with maybe_autocast(device_type=hidden_states.device.type, enabled=False):
            return gate_coefficients(hidden_states, self.weight, mixture, self.bias, self.amplitude, self.scale)


def _summing_gradients(x: Tensor, linear: nn.Module) -> Tensor:
    """Returns x; under tensor parallelism its gradient is summed over the ranks that split ``linear``.

    Each rank multiplies the same x by its own columns only, so that each has a part of the gradient. What goes in
    through a linear layer is summed by transformers.
    """
    mesh = getattr(getattr(linear, "weight", None), "device_mesh", None)  # of a DTensor
    mesh = getattr(linear, "_hf_device_mesh", None) if mesh is None else mesh  # older transformers
    if mesh is None or not torch.is_grad_enabled():
        return x
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = mesh if mesh.ndim == 1 else mesh["tp"]
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


class GPTMoAMLP(nn.Module):
    """A feed-forward layer, or an expert of a MoE layer: mixed, or with a fixed activation."""

    def __init__(self, config: GPTMoAConfig, width: int) -> None:
        super().__init__()
        h = config.hidden_size
        self.gate_proj = nn.Linear(h, width, bias=config.mlp_bias) if config.gated else None
        self.up_proj = nn.Linear(h, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, h, bias=config.mlp_bias)
        self.down_proj.starts_smaller = True
        self.has_bias = config.mlp_bias
        self.activation = ACT2FN[config.hidden_act] if config.mixing is None else None
        self.mixture = mixture_config(config)
        # Unless a backend is named, plain PyTorch computes the mixture on CPUs, where lengths change from call to call
        # and compiling costs more than it saves.
        is_auto = self.mixture is not None and self.mixture.backend == "auto"
        self.plain_mixture = replace(self.mixture, backend="eager") if is_auto else self.mixture
        self.coefficients = None if self.mixture is None else MixtureCoefficients(config, self.mixture)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """[..., h] -> [..., h]; ``scale`` [...], a router's probabilities, multiplies the output."""
        inner, outer = (None, scale) if self.has_bias else (scale, None)  # before down_proj, as in training, if it can
        if inner is not None:
            inner = _summing_gradients(inner, self.down_proj)
        if self.mixture is None:
            activated = self.activation(self.up_proj(x) if self.gate_proj is None else self.gate_proj(x))
            if self.gate_proj is not None:
                activated = activated * self.up_proj(x)
            if inner is not None:
                activated = (activated * inner.unsqueeze(-1)).to(x.dtype)
        else:
            preactivation = self.up_proj(x)
            if self.gate_proj is not None:  # the activated branch first
                preactivation = torch.cat((self.gate_proj(x), preactivation), dim=-1)
            mixture = self.plain_mixture if x.device.type == "cpu" else self.mixture
            coefficients = _summing_gradients(self.coefficients(x, mixture), self.down_proj)
            activated = mixed_activation(preactivation, coefficients, mixture, None, inner)
        output = self.down_proj(activated)  # by its module, which LoRA or a parallel layer may have replaced
        return output if outer is None else output * outer.unsqueeze(-1).to(output.dtype)


def mixture_config(config: GPTMoAConfig) -> MixtureConfig | None:
    """The mixture of a configuration; None for a fixed activation."""
    if config.mixing is None:
        return None
    return MixtureConfig.from_json(config.mixing, backend=config.mixing_backend or "auto")


class GPTMoARouter(nn.Module):
    """Chooses each token's experts. No nn.Linear, so that LoRA and quantization of all those pass over it."""

    def __init__(self, config: GPTMoAConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, tokens: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Chooses k experts for each of the tokens [t, h].

        It returns logits [t, experts], and probabilities and numbers of the experts chosen, [t, k] each. By the softmax
        of these logits the balance of experts is measured; those of sigmoid scores are the scores' logarithms.
        """
        config, k = self.config, self.config.num_experts_per_tok
        with maybe_autocast(device_type=tokens.device.type, enabled=False):
            dtype = torch.float32 if config.router_float32 else tokens.dtype
            logits = F.linear(tokens.to(dtype), self.weight.to(dtype))
        if config.router_score == "sigmoid":
            scores = logits.float().sigmoid()
            chosen = (scores if bias is None else scores + bias).topk(k, dim=-1).indices
            probabilities = scores.gather(-1, chosen)
            if k > 1:
                probabilities = probabilities / (probabilities.sum(-1, keepdim=True) + 1e-20)
        elif config.router_pre_softmax:
            probabilities, chosen = logits.softmax(-1, dtype=torch.float32).topk(k, dim=-1)
        else:
            probabilities, chosen = logits.topk(k, dim=-1)
            probabilities = probabilities.softmax(-1, dtype=torch.float32)
        probabilities = (probabilities * config.router_scaling_factor).to(logits.dtype)
        return F.logsigmoid(logits.float()) if config.router_score == "sigmoid" else logits, probabilities, chosen


class SharedExpertGate(nn.Module):
    """The logit [..., 1] of the shared expert's gate; no nn.Linear, for the router's reason."""

    def __init__(self, config: GPTMoAConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., 1]"""
        return F.linear(x, self.weight)


class GPTMoASparseMLP(nn.Module):
    """A MoE layer: every token goes to its experts, and through the shared one."""

    def __init__(self, config: GPTMoAConfig) -> None:
        super().__init__()
        self.router = GPTMoARouter(config)
        # Of the choice alone, not of the probabilities; in float32 as it was trained.
        self.router_bias = (
            nn.Buffer(torch.zeros(config.num_experts, dtype=torch.float32)) if config.router_bias else None
        )
        # No nn.ModuleList: vLLM would put SwiGLU experts of its own in the place of one.
        self.experts = nn.ModuleDict(
            {str(number): GPTMoAMLP(config, config.moe_intermediate_size) for number in range(config.num_experts)}
        )
        shared = config.shared_expert_intermediate_size
        self.shared_expert = GPTMoAMLP(config, shared) if shared else None
        self.shared_expert_gate = SharedExpertGate(config) if config.shared_expert_gate else None

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]"""
        tokens = x.reshape(-1, x.shape[-1])  # [t, h]
        _, probabilities, chosen = self.router(tokens, self.router_bias)
        self._check_experts()
        route = self._routed_as_one_graph if torch.compiler.is_compiling() else self._routed
        output = route(tokens, probabilities, chosen)
        if self.shared_expert is not None:
            shared = self.shared_expert(tokens)
            if self.shared_expert_gate is not None:
                shared = shared * self.shared_expert_gate(tokens).sigmoid()
            output = output + shared
        return output.view_as(x)

    def _check_experts(self) -> None:
        """Raises TypeError where a library has put experts of its own in place of this project's.

        Such experts mix no activations.
        """
        experts = self.experts.values() if hasattr(self.experts, "values") else [self.experts]
        for expert in experts:  # others may lie around ours, as a wrapper for sharding does
            if not isinstance(expert, GPTMoAMLP) and not any(isinstance(m, GPTMoAMLP) for m in expert.modules()):
                raise TypeError(f"experts: {type(expert).__name__} has taken their place and computes something else")

    def _routed(self, tokens: Tensor, probabilities: Tensor, chosen: Tensor) -> Tensor:
        """The experts' output [t, h]; each computes its own tokens."""
        output = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts.values()):
            rows, column = (chosen == number).nonzero(as_tuple=True)
            if rows.numel():
                routed = expert(tokens[rows], probabilities[rows, column])
                output.index_add_(0, rows, routed.to(output.dtype))  # of another dtype under autocast
        return output

    def _routed_as_one_graph(self, tokens: Tensor, probabilities: Tensor, chosen: Tensor) -> Tensor:
        """As :meth:`_routed`, with every expert for all tokens: no shape depends on the choice of experts."""
        output = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts.values()):
            own = chosen == number  # [t, k], at most one of a row
            routed = expert(tokens, (probabilities * own).sum(-1))
            # What an expert makes of others' tokens may be infinite in half precision, where a factor of 0 gives NaN.
            output = output + routed.to(output.dtype).where(own.any(-1, keepdim=True), 0)
        return output


class GPTMoADecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward part, each behind a norm and with a residual connection."""

    def __init__(self, config: GPTMoAConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = build_norm(config, config.hidden_size)
        self.self_attn = GPTMoAAttention(config, layer_idx)
        self.post_attention_layernorm = build_norm(config, config.hidden_size)
        is_moe = config.moe_layers[layer_idx]
        self.mlp = GPTMoASparseMLP(config) if is_moe else GPTMoAMLP(config, config.intermediate_size)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """[b, s, h] -> [b, s, h]; arguments of :class:`GPTMoAAttention`."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class GPTMoAPreTrainedModel(PreTrainedModel):
    """What transformers needs to know."""

    config: GPTMoAConfig
    config_class = GPTMoAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPTMoADecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": GPTMoADecoderLayer,
        "attentions": GPTMoAAttention,
        "router_logits": OutputRecorder(GPTMoARouter, index=0),
    }
    # Buffers that training keeps in float32 too: an expert bias is a sum of small steps.
    _keep_in_fp32_modules_strict = ["router_bias", "coefficients.scale"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialises a module as training starts it (Megatron's defaults; docs/mixture.md).

        Weights are normal, smaller before the residual connection; coefficients follow the mixture's settings.
        """
        super()._init_weights(module)
        std = self.config.initializer_range
        if getattr(module, "starts_smaller", False):
            init.normal_(module.weight, std=std / (2 * self.config.num_hidden_layers) ** 0.5)
        elif isinstance(module, (GPTMoARouter, SharedExpertGate)):
            init.normal_(module.weight, std=std)
        elif isinstance(module, GPTMoASparseMLP) and module.router_bias is not None:
            init.zeros_(module.router_bias)
        elif isinstance(module, MixtureCoefficients):
            self._init_coefficients(module)

    def _init_coefficients(self, module: MixtureCoefficients) -> None:
        mixture = module.mixture
        for parameter in (module.value, module.amplitude):
            if parameter is not None:
                init.copy_(
                    parameter, module.start * torch.tensor(list(mixture.start_values()), device=parameter.device)
                )
        if module.weight is not None:
            init.normal_(module.weight, std=mixture.gate_init_std)
        if module.bias is not None:
            init.zeros_(module.bias)
        if module.scale is not None:
            init.constant_(module.scale, module.start)


class GPTMoAModel(GPTMoAPreTrainedModel):
    """The decoder without the output layer."""

    def __init__(self, config: GPTMoAConfig) -> None:
        super().__init__(config)
        # No padding_idx: the token that pads may be the one that ends a document, which has to learn.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        learned = config.position_embedding_type == "learned_absolute"
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size) if learned else None
        self.rotary_emb = RotaryEmbedding(config) if config.position_embedding_type == "rope" else None
        self.layers = nn.ModuleList(GPTMoADecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = build_norm(config, config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Hidden states [b, s, h] behind the last norm, for input_ids [b, s] or inputs_embeds [b, s, h].

        ``cache`` and ``past_key_values`` are two names of one argument.
        """
        _refuse_unknown_caches(kwargs)
        past_key_values = cache if past_key_values is None else past_key_values
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{_CACHE: past_key_values},
        )
        hidden_states = inputs_embeds
        if self.embed_positions is not None:
            hidden_states = hidden_states + self.embed_positions(position_ids)
        position_embeddings = None if self.rotary_emb is None else self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class GPTMoAForCausalLM(GPTMoAPreTrainedModel, GenerationMixin):
    """The language model: ``labels`` give a loss, :meth:`generate` text."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: GPTMoAConfig) -> None:
        super().__init__(config)
        self.model = GPTMoAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Computes logits [b, s, vocabulary], and the loss of labels [b, s] if given.

        With ``logits_to_keep`` the logits are those of that many last positions.

        ``output_router_logits`` of a MoE model gives those of every layer of experts, [t, experts], and the loss of
        their balance as transformers' MoE models have it, which is added to the labels' by ``router_aux_loss_coef``.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs: MoeModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache if past_key_values is None else past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        aux_loss = None
        if outputs.router_logits:
            experts = self.config.num_experts, self.config.num_experts_per_tok
            aux_loss = load_balancing_loss_func(outputs.router_logits, *experts, attention_mask)
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits or None,
        )


__all__ = ["GPTMoAForCausalLM", "GPTMoAModel", "GPTMoAPreTrainedModel"]
