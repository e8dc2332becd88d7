"""Describes what is planned: a model, its training, and how both lie over GPUs.

Model and training are described by Megatron's arguments.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from megatron_moa.errors import UserError
from megatron_moa.layers.layer_pattern import moe_layers
from megatron_moa.mixture.config import MixtureConfig

# What the formulas do not have: (attribute of Megatron's arguments, flag, and a value that they have).
_REFUSED = (
    ("multi_latent_attention", "--multi-latent-attention"),
    ("mtp_num_layers", "--mtp-num-layers"),
    ("moe_latent_size", "--moe-latent-size"),
    ("attention_output_gate", "--attention-output-gate"),
    ("hybrid_layer_pattern", "--hybrid-layer-pattern"),
    ("heterogeneous_layers_config_path", "--heterogeneous-layers-config-path"),
    ("pipeline_model_parallel_layout", "--pipeline-model-parallel-layout"),
    ("decoder_first_pipeline_num_layers", "--decoder-first-pipeline-num-layers"),
    ("decoder_last_pipeline_num_layers", "--decoder-last-pipeline-num-layers"),
    ("account_for_embedding_in_pipeline_split", "--account-for-embedding-in-pipeline-split"),
    ("account_for_loss_in_pipeline_split", "--account-for-loss-in-pipeline-split"),
    ("experimental_attention_variant", "--experimental-attention-variant"),
    ("fp4", "--fp4-format"),
    ("fp8", "--fp8-format"),
    ("fp16", "--fp16"),
    ("fp32_residual_connection", "--fp32-residual-connection"),
    ("use_precision_aware_optimizer", "--use-precision-aware-optimizer"),
    ("optimizer_cpu_offload", "--optimizer-cpu-offload"),
    ("fine_grained_activation_offloading", "--fine-grained-activation-offloading"),
    ("use_megatron_fsdp", "--use-megatron-fsdp"),
    ("use_torch_fsdp2", "--use-torch-fsdp2"),
    ("use_tp_pp_dp_mapping", "--use-tp-pp-dp-mapping"),
    ("num_distributed_optimizer_instances", "--num-distributed-optimizer-instances", 1),
    ("muon_scalar_optimizer", "--muon-scalar-optimizer", "adam"),
)

OPTIMIZERS = ("adam", "muon")


@dataclass(frozen=True)
class Experts:
    """The feed-forward part of a MoE layer: routed experts, and a shared one.

    ``shared_ffn`` is the shared expert's width; 0 means that there is none.
    """

    number: int
    topk: int
    ffn: int
    shared_ffn: int
    shared_gate: bool


@dataclass(frozen=True)
class Model:
    """A GPT model's shape, and what its training is asked to do.

    Attributes:
        head_size: of queries, keys and values; ``groups`` key heads serve ``heads`` query heads.
        gated: fc1 has two halves.
        norm_vectors: 1 for RMSNorm, 2 for LayerNorm.
        dropout: of hidden states; attention's keeps nothing in fused kernels.
        positions: learned positions; 0 for rotary ones.
        vocabulary: padded to a multiple of ``vocabulary_multiple`` times the tensor-parallel size.
        moe_layers: whether each layer is one of experts.
        mixture: None for the stock model.
        element: bytes of a weight and of an activation, 2 or 4.
        gradient: bytes of a gradient, as it is summed.
        optimizer: one of :data:`OPTIMIZERS`.
        shards_optimizer: whether data-parallel ranks share its state out.
        shares_whole_weights: by whole weights, after each has summed all gradients (Megatron's layer-wise optimizer).
        overlaps_gradients: sums of gradients over ranks hide behind the backward.
        overlaps_weights: gathered weights hide behind the forward.
        sequence: tokens of a sample.
        global_batch: samples a step.
        iterations: steps.
        gpu_kernels: False for torch's on a CPU. On a GPU RMSNorm keeps its input alone, not also the normalised one in
            float32; the stock SwiGLU keeps fc1's output alone, not also both factors of its product; and Adam takes
            the roots of all second moments before it uses the first.
    """

    layers: int
    hidden: int
    heads: int
    groups: int
    head_size: int
    ffn: int
    gated: bool
    norm_vectors: int
    dropout: bool
    linear_bias: bool
    qkv_bias: bool
    qk_norm: bool
    positions: int
    tied: bool
    vocabulary: int
    vocabulary_multiple: int
    experts: Experts | None
    moe_layers: tuple[bool, ...]
    mixture: MixtureConfig | None
    element: int
    gradient: int
    optimizer: str
    shards_optimizer: bool
    shares_whole_weights: bool
    overlaps_gradients: bool
    overlaps_weights: bool
    sequence: int
    global_batch: int
    iterations: int
    gpu_kernels: bool = True

    @classmethod
    def from_args(cls, args: argparse.Namespace, mixture: MixtureConfig | None) -> Model:
        """From Megatron's parsed and validated arguments.

        Raises:
            UserError: a setting that the plan's formulas do not have.
        """
        for name, flag, *known in _REFUSED:
            if (value := getattr(args, name, None)) and value not in known:
                raise UserError(f"{flag}: the planner has no formulas for it; drop it to plan without")
        if not args.vocab_size:
            raise UserError("--vocab-size: not given; add it, or --mock-data for the recipe's own")
        if args.optimizer not in OPTIMIZERS:
            raise UserError(
                f"--optimizer {args.optimizer}: the planner has no formulas for it; take {' or '.join(OPTIMIZERS)}"
            )
        experts = None
        if args.num_experts:
            experts = Experts(
                number=args.num_experts,
                topk=args.moe_router_topk,
                ffn=args.moe_ffn_hidden_size or args.ffn_hidden_size,
                shared_ffn=args.moe_shared_expert_intermediate_size or 0,
                shared_gate=bool(args.moe_shared_expert_gate and args.moe_shared_expert_intermediate_size),
            )
        return cls(
            layers=args.num_layers,
            hidden=args.hidden_size,
            heads=args.num_attention_heads,
            groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
            head_size=args.kv_channels,
            ffn=args.ffn_hidden_size,
            gated=args.swiglu,
            norm_vectors=1 if args.normalization == "RMSNorm" else 2,
            dropout=args.hidden_dropout > 0,
            linear_bias=args.add_bias_linear,
            qkv_bias=args.add_bias_linear or args.add_qkv_bias,
            qk_norm=args.qk_layernorm,
            positions=args.max_position_embeddings if args.position_embedding_type == "learned_absolute" else 0,
            tied=not args.untie_embeddings_and_output_weights,
            vocabulary=args.vocab_size,
            vocabulary_multiple=args.make_vocab_size_divisible_by,
            experts=experts,
            moe_layers=tuple(moe_layers(args)),
            mixture=mixture,
            element=2 if args.bf16 else 4,
            gradient=4 if args.accumulate_allreduce_grads_in_fp32 or not args.bf16 else 2,
            optimizer=args.optimizer,
            shards_optimizer=args.use_distributed_optimizer or args.use_layer_wise_distributed_optimizer,
            shares_whole_weights=args.use_layer_wise_distributed_optimizer,
            overlaps_gradients=args.overlap_grad_reduce,
            overlaps_weights=args.overlap_param_gather,
            sequence=args.seq_length,
            global_batch=args.global_batch_size,
            iterations=args.train_iters,
        )

    def padded_vocabulary(self, tp: int) -> int:
        """V over p tensor-parallel ranks."""
        multiple = self.vocabulary_multiple * tp
        return -(-self.vocabulary // multiple) * multiple

    @property
    def coefficients(self) -> int:
        """Returns n, how many coefficients of a feed-forward layer or expert depend on the token.

        n is 0 for LA and the stock model.
        """
        return self.mixture.num_coefficients if self.mixture and self.mixture.kind == "moa" else 0

    @property
    def halves(self) -> int:
        """Width of fc1's output over f."""
        return 2 if self.gated else 1

    def widths(self, tp: int) -> dict[str, tuple[int, int]]:
        """Returns the widths of feed-forward layers and experts by name.

        Each comes with the number of tensor-parallel ranks that share it.
        """
        found = {}
        if not all(self.moe_layers):
            found["feed-forward width"] = (self.ffn, tp)
        if self.experts and self.experts.shared_ffn:
            found["shared expert's width"] = (self.experts.shared_ffn, tp)
        if self.experts:
            found["routed experts' width"] = (self.experts.ffn, 1)
        return found

    @property
    def tokens_per_step(self) -> int:
        """Over all GPUs."""
        return self.global_batch * self.sequence


RECOMPUTE = ("none", "mixture", "feed-forward", "full")


@dataclass(frozen=True)
class Split:
    """How a training lies over GPUs.

    Attributes:
        tp: tensor-parallel ranks, with sequence parallelism where there are several.
        pp: pipeline stages; ``vpp`` virtual ones on each.
        ep: expert-parallel ranks; expert tensor parallelism is 1.
        cp: context-parallel ranks.
        recompute: ``none``; ``mixture``: --moa-recompute; ``feed-forward``: those layers; ``full``: all layers.
    """

    gpus: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    cp: int = 1
    micro_batch: int = 1
    recompute: str = "none"

    @property
    def dp(self) -> int:
        """Data-parallel ranks."""
        return self.gpus // (self.tp * self.pp * self.cp)

    @property
    def expert_dp(self) -> int:
        """Ranks that hold the same experts."""
        return self.gpus // (self.pp * self.ep)

    def micro_batches(self, model: Model) -> int:
        """m, of a step on each rank."""
        return model.global_batch // (self.dp * self.micro_batch)

    def layers(self, model: Model, stage: int) -> list[int]:
        """Numbers of a stage's layers: one run of them, or every pp-th of shorter runs with virtual stages."""
        run = model.layers // (self.pp * self.vpp)
        return [(chunk * self.pp + stage) * run + layer for chunk in range(self.vpp) for layer in range(run)]
