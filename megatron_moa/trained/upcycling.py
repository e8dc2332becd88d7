"""Converts a model from one mixture to another that computes the same function and can learn more.

A stock layer is a mixture of one activation: SwiGLU is LA, one-sided, over {identity} with the coefficient 1, since
SiLU is fixed on W1's branch. So every conversion is one between mixtures. A coefficient of the result is one of the
source's, or 1 (silu on W1's branch, which has no coefficient in one-sided), or 0 (docs/upcycling.md has the table).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_moa.checkpoints.tensors import ModelTensors
from megatron_moa.checkpoints.writer import write_release
from megatron_moa.command_line.megatron_flags import as_typed, has_tanh_gelu
from megatron_moa.errors import UserError
from megatron_moa.layers.coefficients import Coefficients
from megatron_moa.mixture.config import DEFAULT_GATE_INIT_STD, DICTIONARIES, FORMAT_VERSION, MixtureConfig, auto_form
from megatron_moa.trained.compare_logits import Comparison, compared_tokens, reference_logits
from megatron_moa.trained.from_megatron import empty_model, prepare_checkpoint
from megatron_moa.training.model import model_config_from_args

# What one-sided computes on W1's branch, without a coefficient.
_FIXED = "silu"

# Where a coefficient of a result comes from: an index of the source's, or one of these (see start_amplitudes).
ONE, ZERO = -2, -1

# What a form can become.
_BECOMES = {
    "type1": ("type1",),
    "one-sided": ("one-sided", "bi-sided", "quadratic"),
    "bi-sided": ("bi-sided",),
    "quadratic": ("quadratic",),
}

# What decides which function a mixture's parameters are.
_FUNCTION = ("kind", "form", "activations", "gate", "gate_bias", "amplitude")

# Stock activations that no dictionary has, by the setting of Megatron's that asks for them, with its neutral value.
_NO_MIXTURE = {"quick_geglu": False, "glu_linear_offset": 0.0, "activation_func_clamp_value": None}


# Settings.


def stock_as_mixture(saved: argparse.Namespace) -> MixtureConfig:
    """The mixture of one activation that a stock model of these saved args is.

    Raises:
        UserError: an activation that no dictionary has.
    """
    for name, neutral in _NO_MIXTURE.items():
        value = getattr(saved, name, neutral)
        if value != neutral:
            raise UserError(
                f"--load: the checkpoint was trained with {as_typed(name, value)}, which no mixture starts as; "
                "SwiGLU, GELU and squared ReLU can be converted"
            )
    if not saved.swiglu and getattr(saved, "use_te_activation_func", False):
        raise UserError(
            "--load: the checkpoint was trained with --use-te-activation-func, whose result without --swiglu cannot be "
            "compared here; train without that flag"
        )
    form, activation = "type1", "gelu"
    if saved.swiglu:
        form, activation = "one-sided", "identity"
    elif getattr(saved, "squared_relu", False):
        activation = "relu2"
    elif has_tanh_gelu(saved):
        activation = "gelu_tanh"
    return MixtureConfig(kind="la", form=form, activations=(activation,), initial_coefficients=(1.0,))


def target_mixture(
    source: MixtureConfig,
    mixing: str,
    form: str | None = None,
    activations: Sequence[str] = (),
    gate: str | None = None,
    gate_bias: bool = False,
    stock: bool = False,
    routed_experts: bool = False,
) -> MixtureConfig:
    """Returns the mixture to convert to; what is not given is the source's.

    Of a stock source it is the default of training. Gates of the result have learned amplitudes: the amplitude makes a
    gate start as the source's coefficient.

    Args:
        source: the mixture there is (:func:`stock_as_mixture`).
        mixing: ``la`` or ``moa``.
        form: of the result.
        activations: all of the result's.
        gate: of a MoA.
        gate_bias: of a MoA; gates that have one keep it.
        stock: the source is :func:`stock_as_mixture`'s.
        routed_experts: whether the model has some, which decides the form that training takes by default.

    Raises:
        UserError: no such mixture, none that computes the same function, or the one there is.
    """
    form = form or (auto_form(source.gated, routed_experts)[0] if stock else source.form)
    is_moa = mixing == "moa"
    if source.kind == "moa" and is_moa:
        gate, gate_bias = gate or source.gate, gate_bias or source.gate_bias
    try:
        target = dataclasses.replace(
            source,
            kind=mixing,
            form=form,
            activations=tuple(activations) or (_default_dictionary(source, form) if stock else source.activations),
            gate=gate or "sigmoid",
            gate_bias=gate_bias,
            amplitude="learned" if is_moa else "fixed",
            initial_coefficients=(1.0,),
            gate_init_std=DEFAULT_GATE_INIT_STD,
            init_scale="paper",
            freeze=False,  # it is converted to learn
        )
    except UserError as error:  # names the flags of training
        raise UserError(str(error).replace("--moa-", "--")) from None
    _check_exact(source, target)
    if not stock and all(getattr(source, name) == getattr(target, name) for name in _FUNCTION):
        raise UserError(
            f"--mixing {mixing}: the checkpoint is {target.describe()} already; ask for another --form, --activations "
            "or --gate-bias"
        )
    start = [_gate_factor(source)] * source.num_coefficients if _fixed_gates(source) else list(source.start_values())
    values = start_amplitudes(torch.tensor(start, dtype=torch.float64), origins(source, target))
    return dataclasses.replace(target, initial_coefficients=tuple(values.tolist()))


def _default_dictionary(source: MixtureConfig, form: str) -> tuple[str, ...]:
    """Returns training's dictionary of activations for a form.

    GELU's tanh approximation takes the exact one's place where the source's activation is the approximation.
    """
    names = DICTIONARIES.get(form, ())  # none: MixtureConfig refuses the form
    if source.activations == ("gelu_tanh",):
        return tuple("gelu_tanh" if name == "gelu" else name for name in names)
    return names


def _check_exact(source: MixtureConfig, target: MixtureConfig) -> None:
    """Raises UserError unless the target can compute every function of the source's."""
    forms = _BECOMES[source.form]
    if target.form not in forms:
        why = ""
        if (source.form, target.form) == ("bi-sided", "quadratic"):
            why = "; its product of two sums has the pairs (k, l) and (l, k), the quadratic form those of k <= l only"
        raise UserError(
            f"--form {target.form}: the checkpoint's form is {source.form}, which can become {', '.join(forms)}{why}"
        )
    needed = dict.fromkeys(source.activations)
    if source.form == "one-sided" and target.form != "one-sided":
        needed[_FIXED] = None
    if missing := [name for name in needed if name not in target.activations]:
        raise UserError(
            f"--activations {' '.join(target.activations)}: {', '.join(missing)} must be among them for the same "
            "function; add what is missing"
        )
    if target.form == "quadratic":
        _check_order(source, target)
    if source.kind == "la":
        return
    gates = f"{source.gate} gates of {source.amplitude} amplitude"
    if target.kind == "la":
        raise UserError(
            f"--mixing la: the checkpoint has {gates}, which depend on the token, and LA's coefficients do not; take "
            "--mixing moa"
        )
    if _fixed_gates(source) and source.gate == "tanh":
        raise UserError(
            f"--mixing moa: the checkpoint has {gates}, which no learned amplitude times (1 + tanh) equals; only "
            "sigmoid and softmax gates of fixed amplitude, or learned amplitudes, can be converted"
        )
    if target.gate != source.gate:
        raise UserError(f"--gate {target.gate}: the checkpoint has {gates}; leave that as it is, without --gate")
    if source.gate == "softmax" and target.softmax_size != source.softmax_size:
        raise UserError(
            f"--activations {' '.join(target.activations)} --form {target.form}: softmax over {target.softmax_size} "
            f"entries where the checkpoint's is over {source.softmax_size}; keep its form and activations"
        )


def _check_order(source: MixtureConfig, target: MixtureConfig) -> None:
    """Raises UserError if a quadratic target lacks a pair (k, l) that the source has.

    The error names an order of activations that would do.
    """
    names = target.activations
    lost = [pair for pair in _pairs(source) if names.index(pair[0]) > names.index(pair[1])]
    if not lost:
        return
    kept = source.activations
    if source.form == "one-sided":
        kept = (_FIXED, *(name for name in names if name in source.activations and name != _FIXED))
    in_order = iter(kept)
    remedy = " ".join(next(in_order) if name in kept else name for name in names)
    raise UserError(
        f"--activations {' '.join(names)}: the checkpoint has the pair ({', '.join(lost[0])}), and the quadratic form "
        f"has (k, l) only where k is not after l; take --activations {remedy}"
    )


def _fixed_gates(mixture: MixtureConfig) -> bool:
    return mixture.kind == "moa" and mixture.amplitude == "fixed"


def _gate_factor(mixture: MixtureConfig) -> float:
    """The amplitude a for which a psi_hat is psi; for gates whose psi_hat has no offset."""
    slope, offset = mixture.psi_hat
    assert offset == 0
    return 1 / slope


# Coefficients.


def origins(source: MixtureConfig, target: MixtureConfig) -> list[int]:
    """Returns where each of the target's n coefficients comes from, in their order.

    An origin is an index of the source's coefficients, :data:`ONE` or :data:`ZERO`. The function is for mixtures that
    :func:`target_mixture` admits.
    """
    names = target.activations
    if target.form == "quadratic":
        pairs = _pairs(source)
        return [pairs.get((names[first], names[second]), ZERO) for first, second in target.pairs]
    own = {name: index for index, name in enumerate(source.activations)}
    if target.form != "bi-sided":
        return [own.get(name, ZERO) for name in names]
    first, second = own, own
    if source.form == "one-sided":
        first = {_FIXED: ONE}
    else:
        second = {name: source.num_activations + index for name, index in own.items()}
    return [branch.get(name, ZERO) for branch in (first, second) for name in names]


def _pairs(source: MixtureConfig) -> dict[tuple[str, str], int]:
    """Returns the index of each coefficient of a source by its product sigma_k(y) sigma_l(z).

    The source is one-sided or quadratic.
    """
    names = source.activations
    if source.form == "one-sided":
        return {(_FIXED, name): index for index, name in enumerate(names)}
    return {(names[first], names[second]): index for index, (first, second) in enumerate(source.pairs)}


def start_amplitudes(source: Tensor, origins: list[int]) -> Tensor:
    """The target's coefficients (or amplitudes) [n'] from the source's [n], of its dtype."""
    return torch.cat((source, source.new_tensor([1.0, 0.0])))[origins]  # ONE and ZERO count from the end


def _kept_rows(source: Tensor | None, rows: Tensor, origins: list[int]) -> Tensor:
    """Fills ``rows``, gate weights [n', h] or biases [n'], and returns them.

    A kept gate gets its own; every other gets 0, where psi_hat is 1.
    """
    rows.zero_()
    if source is None:
        return rows
    for row, origin in enumerate(origins):
        if origin not in (ONE, ZERO):
            rows[row] = source[origin]
    return rows


def upcycled(
    read: Callable[[str], Tensor], model: GPTModel, source: MixtureConfig, target: MixtureConfig, stock: bool = False
) -> Callable[[str], Tensor]:
    """Reads a model as one of another mixture that computes the same function.

    Args:
        read: gives the source's parameter or buffer of a name.
        model: of the target's mixture; on the meta device it takes no memory.
        source: its mixture (:func:`stock_as_mixture`).
        target: of :func:`target_mixture`.
        stock: the source has no coefficients, it is a mixture in name only.

    Returns:
        As ``read``, by the names of ``model.state_dict()``: coefficients (float32) are the target's, filled when asked
        for; every other tensor is the source's.
    """
    come_from = origins(source, target)
    wanted = {
        f"{module_name}.{kind}": (module_name, kind, parameter.shape)
        for module_name, module in model.named_modules()
        if isinstance(module, Coefficients)
        for kind, parameter in module.named_parameters()
    }

    def amplitudes(module: str) -> Tensor:
        """The source's [n], by which its gates or constants count."""
        if stock:
            return torch.ones(1)
        if source.kind == "la":
            return read(f"{module}.value").float()
        if source.amplitude == "learned":
            return read(f"{module}.amplitude").float()
        scale = read(f"{module}.scale").float() if source.has_scale else torch.ones(1)
        return (scale * _gate_factor(source)).expand(source.num_coefficients)

    def read_converted(name: str) -> Tensor:
        if name not in wanted:
            return read(name)
        module, kind, shape = wanted[name]
        if kind in ("value", "amplitude"):
            return start_amplitudes(amplitudes(module), come_from)
        has_it = source.kind == "moa" and (kind == "weight" or source.gate_bias)
        return _kept_rows(read(name).float() if has_it else None, torch.empty(shape), come_from)

    return read_converted


# Models.


def mixture_flags(target: MixtureConfig) -> dict[str, Any]:
    """Megatron's args that a checkpoint of this mixture carries."""
    return {
        **target.to_args(),
        "squared_relu": False,  # the mixture has it as relu2
        "bias_gelu_fusion": False,
        "bias_swiglu_fusion": False,
    }


# The whole of it.


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was done, and how equal the two models are.

    Attributes:
        source: None for stock feed-forward layers.
        target: the new mixture.
        comparison: of the result's logits with the source's.
    """

    source: MixtureConfig | None
    target: MixtureConfig
    comparison: Comparison


def convert(
    load: str, root: Path, megatron_flags: Sequence[str] = (), iteration: int | None = None, **target_settings: Any
) -> Conversion:
    """Writes the checkpoint of the new mixture and compares it with the one it comes from.

    The new checkpoint is compared as it lies on disk. What is being done is said on standard error.

    Args:
        load: what training's ``--save`` named.
        root: where to write, as ``--save`` names it; not there yet.
        megatron_flags: further ones, such as ``--tokenizer-model``.
        iteration: which checkpoint; None for the latest.
        target_settings: ``mixing`` and others, of :func:`target_mixture`.

    Raises:
        UserError: nothing to load, or nothing it can become.
    """
    # Layers of plain PyTorch: only those can be built without memory on every machine.
    megatron_flags = ["--transformer-impl", "local", *megatron_flags]
    prepared = prepare_checkpoint(load, megatron_flags, iteration)
    if prepared.args.params_dtype != torch.float32:
        raise UserError("--bf16, --fp16: models are compared in fp32; drop the flag, the checkpoint keeps its dtype")
    mixture, saved = prepared.config.mixture, prepared.saved
    stock = mixture is None
    source = stock_as_mixture(saved) if stock else mixture
    target = target_mixture(source, stock=stock, routed_experts=bool(saved.num_experts), **target_settings)

    args = copy.copy(prepared.args)
    vars(args).update(mixture_flags(target))
    model = empty_model(model_config_from_args(args, dataclasses.replace(target, backend="eager")))
    tensors = ModelTensors(prepared.checkpoint.path, prepared.build_empty())
    tokens = compared_tokens(prepared.vocab_size, args.seq_length)
    print(f"> computing logits of {load}", file=sys.stderr)
    expected = reference_logits(prepared, tokens)
    print(f"> converting to {target.describe()}", file=sys.stderr)
    read = upcycled(tensors.__getitem__, model, source, target, stock)
    write_release(model, args_of_new_run(saved, target), root, read)
    print("> reading back and computing logits", file=sys.stderr)
    found = reference_logits(prepare_checkpoint(str(root), megatron_flags), tokens)
    return Conversion(mixture, target, Comparison.of(found, expected))


def args_of_new_run(saved: argparse.Namespace, target: MixtureConfig) -> argparse.Namespace:
    """The source's saved args with the new mixture, before any training."""
    args = copy.copy(saved)
    vars(args).update(
        mixture_flags(target),
        moa_format_version=FORMAT_VERSION,
        ckpt_format="torch_dist",
        iteration=0,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        skipped_train_samples=0,
    )
    return args
