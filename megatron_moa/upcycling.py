"""From one mixture to another that computes the same function: a trained model goes on with more to learn.

A stock layer is the mixture of one activation: SwiGLU is LA, one-sided, over {silu} with the coefficient 1. So every
conversion is one between mixtures, and each coefficient of the result is a product of some of the source's: of one that
is kept, of two (c_kl = c_k d_l), of none (the constant 1, the identity in the linear branch), or it is 0, where the
result has an activation that the source lacks (docs/upcycling.md).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_moa.checkpoint import empty_model, prepare_checkpoint
from megatron_moa.checkpoint_tensors import ModelTensors
from megatron_moa.checkpoint_writer import write_release
from megatron_moa.coefficients import Coefficients
from megatron_moa.config import GATED_DICTIONARY, TYPE1_DICTIONARY, MixingConfig
from megatron_moa.errors import UserError
from megatron_moa.model import model_config_from_args
from megatron_moa.saved_settings import FORMAT_VERSION, as_typed, has_tanh_gelu
from megatron_moa.verification import Comparison, compared_tokens, reference_logits

# Where each coefficient of a result comes from: indices of the source's to multiply, () for 1, None for 0.
Origins = list[tuple[int, ...] | None]

# What a form can become. The linear branch starts as the identity; a product of sums is a sum of products.
_BECOMES = {
    "type1": ("type1",),
    "one-sided": ("one-sided", "bi-sided", "quadratic"),
    "bi-sided": ("bi-sided", "quadratic"),
    "quadratic": ("quadratic",),
}

# Stock activations that no dictionary has, by the setting of Megatron's that asks for them, with its neutral value.
_NO_MIXTURE = {"quick_geglu": False, "glu_linear_offset": 0.0, "activation_func_clamp_value": None}


# Settings.


def stock_as_mixture(saved: argparse.Namespace) -> MixingConfig:
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
        form, activation = "one-sided", "silu"
    elif getattr(saved, "squared_relu", False):
        activation = "relu2"
    elif has_tanh_gelu(saved):
        activation = "gelu_tanh"
    return MixingConfig(mixing="la", form=form, activations=(activation,), initial_coefficients=(1.0,))


def target_mixing(
    source: MixingConfig,
    mixing: str,
    form: str | None = None,
    activations: Sequence[str] = (),
    gate: str | None = None,
    gate_bias: bool = False,
    stock: bool = False,
) -> MixingConfig:
    """The mixture to convert to: what is not given is the source's (of a stock one, the default of training).

    Gates of the result have learned amplitudes: those are what makes it start as another function than its gates.

    Args:
        source: the mixture there is (:func:`stock_as_mixture`).
        mixing: ``la`` or ``moa``.
        form: of the result.
        activations: all of the result's.
        gate: of a MoA.
        gate_bias: of a MoA; gates that have one keep it.
        stock: the source is :func:`stock_as_mixture`'s.

    Raises:
        UserError: no such mixture, or none that computes the same function.
    """
    form = form or (source.form if not stock else "bi-sided" if source.gated else "type1")
    if not activations:
        activations = _default_dictionary(source) if stock else source.activations
    is_moa = mixing == "moa"
    if source.mixing == "moa" and is_moa:
        gate, gate_bias = gate or source.gate, gate_bias or source.gate_bias
    try:
        target = dataclasses.replace(
            source,
            mixing=mixing,
            form=form,
            activations=tuple(activations),
            gate=gate or "sigmoid",
            gate_bias=gate_bias,
            amplitude="learned" if is_moa else "fixed",
            initial_coefficients=(1.0,),
            freeze=False,  # it is converted to learn
        )
    except UserError as error:  # names the flags of training
        raise UserError(str(error).replace("--moa-", "--")) from None
    _check_exact(source, target)
    start = [_gate_factor(source)] * source.num_coefficients if _fixed_gates(source) else list(source.start_values())
    values = start_amplitudes(torch.tensor(start, dtype=torch.float64), origins(source, target))
    return dataclasses.replace(target, initial_coefficients=tuple(values.tolist()))


def _default_dictionary(source: MixingConfig) -> tuple[str, ...]:
    """Training's, of which GELU's tanh approximation takes the exact one's place where that is the source's."""
    if source.activations == ("gelu_tanh",):
        return tuple("gelu_tanh" if name == "gelu" else name for name in TYPE1_DICTIONARY)
    return GATED_DICTIONARY if source.gated else TYPE1_DICTIONARY


def _check_exact(source: MixingConfig, target: MixingConfig) -> None:
    """Raises UserError unless the target can compute every function of the source's."""
    forms = _BECOMES[source.form]
    if target.form not in forms:
        raise UserError(
            f"--form {target.form}: the checkpoint's form is {source.form}, which can become {', '.join(forms)}"
        )
    missing = [name for name in source.activations if name not in target.activations]
    if source.form == "one-sided" and target.form != "one-sided" and "identity" not in target.activations:
        missing.append("identity")  # what the linear branch has been
    if missing:
        raise UserError(
            f"--activations {' '.join(target.activations)}: {', '.join(missing)} must be among them for the same "
            "function; add what is missing"
        )
    if source.mixing == "la":
        return
    gates = f"{source.gate} gates of {source.amplitude} amplitude"
    if target.mixing == "la":
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
    if (source.form, target.form) == ("bi-sided", "quadratic"):
        raise UserError(
            "--form quadratic: the checkpoint's bi-sided gates would have to become products of two gates, which one "
            "gate cannot be; only LA's or a one-sided MoA's coefficients can, or keep --form bi-sided"
        )
    if source.gate == "softmax" and target.softmax_size != source.softmax_size:
        raise UserError(
            f"--activations {' '.join(target.activations)} --form {target.form}: softmax over {target.softmax_size} "
            f"entries where the checkpoint's is over {source.softmax_size}; keep its form and activations"
        )


def _fixed_gates(mixing: MixingConfig) -> bool:
    return mixing.mixing == "moa" and mixing.amplitude == "fixed"


def _gate_factor(mixing: MixingConfig) -> float:
    """The amplitude a for which a psi_hat is psi; for gates whose psi_hat has no offset."""
    slope, offset = mixing.psi_hat
    assert offset == 0
    return 1 / slope


# Coefficients.


def origins(source: MixingConfig, target: MixingConfig) -> Origins:
    """Where each of the target's n coefficients comes from, in their order; for mixtures that
    :func:`target_mixing` admits.
    """
    if source.form == "quadratic":
        pairs = [(first, second) for first in source.activations for second in source.activations]
        kept = {pair: (index,) for index, pair in enumerate(pairs)}
        return [kept.get((first, second)) for first in target.activations for second in target.activations]
    activated = {name: (index,) for index, name in enumerate(source.activations)}
    linear: dict[str, tuple[int, ...]] = {"identity": ()}
    if source.form == "bi-sided":
        linear = {name: (source.num_activations + index,) for index, name in enumerate(source.activations)}
    first = [activated.get(name) for name in target.activations]
    second = [linear.get(name) for name in target.activations]
    if target.form == "bi-sided":
        return first + second
    if target.form == "quadratic":
        return [None if row is None or column is None else row + column for row in first for column in second]
    return first


def start_amplitudes(source: Tensor, origins: Origins) -> Tensor:
    """The target's coefficients (or amplitudes) from the source's.

    Args:
        source: [n].
        origins: one of each of the target's n'.

    Returns:
        [n'], source's dtype.
    """
    values = [source.new_zeros(()) if origin is None else source[list(origin)].prod() for origin in origins]
    return torch.stack(values)


def _kept_rows(source: Tensor | None, rows: Tensor, origins: Origins) -> Tensor:
    """Gate weights [n', h] or biases [n'], filled in ``rows``: a kept gate's, 0 for every other, where psi_hat is 1."""
    rows.zero_()
    if source is None:
        return rows
    for row, origin in enumerate(origins):
        if origin:
            (index,) = origin  # a product of two gates was refused
            rows[row] = source[index]
    return rows


def upcycled(
    read: Callable[[str], Tensor], model: GPTModel, source: MixingConfig, target: MixingConfig, stock: bool = False
) -> Callable[[str], Tensor]:
    """Reads a model as one of another mixture that computes the same function.

    Args:
        read: gives the source's parameter or buffer of a name.
        model: of the target's mixture; on the meta device it takes no memory.
        source: its mixture (:func:`stock_as_mixture`).
        target: of :func:`target_mixing`.
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
        if source.mixing == "la":
            return read(f"{module}.value").float()
        if source.amplitude == "learned":
            return read(f"{module}.amplitude").float()
        scale = read(f"{module}.scale").float() if source.init_scale == "swiglu" else torch.ones(1)
        return (scale * _gate_factor(source)).expand(source.num_coefficients)

    def read_converted(name: str) -> Tensor:
        if name not in wanted:
            return read(name)
        module, kind, shape = wanted[name]
        if kind in ("value", "amplitude"):
            return start_amplitudes(amplitudes(module), come_from)
        has_it = source.mixing == "moa" and (kind == "weight" or source.gate_bias)
        return _kept_rows(read(name).float() if has_it else None, torch.empty(shape), come_from)

    return read_converted


# Models.


def mixture_flags(target: MixingConfig) -> dict[str, Any]:
    """Megatron's args that a checkpoint of this mixture carries (megatron_moa.arguments.MODEL_FLAGS)."""
    return {
        "moa_mixing": target.mixing,
        "moa_form": target.form,
        "moa_activations": list(target.activations),
        "moa_gate": target.gate,
        "moa_gate_bias": target.gate_bias,
        "moa_amplitude": target.amplitude,
        "moa_init_scale": target.init_scale,
        "moa_la_init": list(target.initial_coefficients),
        "moa_freeze_gates": target.freeze,
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

    source: MixingConfig | None
    target: MixingConfig
    comparison: Comparison


def convert(
    load: str, root: Path, megatron_flags: Sequence[str] = (), iteration: int | None = None, **target_settings: Any
) -> Conversion:
    """Writes the checkpoint of the new mixture and compares it, as it lies on disk, with the one it comes from.

    Args:
        load: what training's ``--save`` named.
        root: where to write, as ``--save`` names it; not there yet.
        megatron_flags: further ones, such as ``--tokenizer-model``.
        iteration: which checkpoint; None for the latest.
        target_settings: ``mixing`` and others, of :func:`target_mixing`.

    Raises:
        UserError: nothing to load, or nothing it can become.
    """
    # Layers of plain PyTorch: only those can be built without memory on every machine.
    megatron_flags = ["--transformer-impl", "local", *megatron_flags]
    prepared = prepare_checkpoint(load, megatron_flags, iteration)
    if prepared.args.params_dtype != torch.float32:
        raise UserError("--bf16, --fp16: models are compared in fp32; drop the flag, the checkpoint keeps its dtype")
    mixing, saved = prepared.config.mixing, prepared.saved
    stock = mixing is None
    source = stock_as_mixture(saved) if stock else mixing
    target = target_mixing(source, stock=stock, **target_settings)
    if target == mixing:
        raise UserError(
            f"--load {load}: is {target.describe()} already; ask for another --form, --activations or --gate-bias"
        )

    args = copy.copy(prepared.args)
    vars(args).update(mixture_flags(target))
    model = empty_model(model_config_from_args(args, dataclasses.replace(target, backend="eager")))
    tensors = ModelTensors(prepared.checkpoint.path, prepared.build_empty())
    tokens = compared_tokens(prepared.vocab_size, args.seq_length)
    print(f"> computing logits of {load}", flush=True)
    expected = reference_logits(prepared, tokens)
    print(f"> converting to {target.describe()}", flush=True)
    read = upcycled(tensors.__getitem__, model, source, target, stock)
    write_release(model, args_of_new_run(saved, target), root, read)
    print("> reading back and computing logits", flush=True)
    found = reference_logits(prepare_checkpoint(str(root), megatron_flags), tokens)
    return Conversion(mixing, target, Comparison.of(found, expected))


def args_of_new_run(saved: argparse.Namespace, target: MixingConfig) -> argparse.Namespace:
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
