"""Pretrains a masked autoencoder whose feed-forward layers mix activations, as the paper does.

    pip install -c constraints.txt -e '.[vision]'                        # make does it, too
    python examples/vision/pretrain_mae.py                               # tiny, on three pictures: 1 minute on 2 cores
    torchrun --nproc-per-node 8 examples/vision/pretrain_mae.py --size base --bf16 \\
        --data imagenet/train --val-data imagenet/val --out runs/mae-quadratic
    ... the same with --moa-mixing none --out runs/mae-swiglu            # the baseline

- The task (MAE, arXiv 2111.06377): a vision transformer sees a quarter of a picture's patches; a small decoder predicts
  the others. The loss is the squared error of the pixels of masked patches, each patch scaled to mean 0 and variance 1.
- The experiment (MoA, arXiv 2605.26647, section 5.4 and A.4): ViT-B/16, decoder of 8 layers and width 512;
  feed-forward layers are SwiGLU of width 8d/3, or a quadratic mixture in their place. Ours: the decoder's are, too;
  8d/3 is rounded down; no biases in them; the mixture's dictionary.
- Training, the paper's: AdamW, betas 0.9 and 0.999, decay 0.05, warm-up over 40 of 800 epochs.
- Training, MAE's where the paper is silent: batch 4096, peak rate 1.5e-4 for each 256 of the batch, crops of 20 to
  100 % of a picture, flips, a cosine down to 0, no clipping of gradients.
- Training, ours: sigmoid gates; weights drawn with 0.02; gate vectors decay as other matrices; biases, norms, tokens,
  LA coefficients and all else of one dimension do not. The patches' projection does, as a matrix.
- Peak rates: the text at hand names no grid for vision. Tune each arm; mixtures bore 1.25 to 2 times the baseline's
  rate in language models. We would try --lr 1.2e-3, 2.4e-3, 3.6e-3 and 4.8e-3 at batch 4096.
- Memory: --micro-batch-size computes the same batch in parts. On a CPU two processes that compute a part each have
  the losses of one that computes both, bit for bit; other sums differ by rounding, which grows over some ten steps.
- Sample n of a run has its picture, crop, flip and mask from (--seed, n) alone.
  So both arms see the same, and so do 1 process and 8.
- --out gets losses.jsonl, tensorboard/, reconstructions.png (picture, what the model sees, what it makes of it) and
  checkpoint.pt, which load_model below reads. The same command goes on from there: on a CPU, bit for bit.

Read masked_autoencoder.py (the model), pictures.py (the data), then optimizer and loop here, then run_folder.py.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from masked_autoencoder import Shape, build_model, reconstruct
from pictures import FEW, PROGRAM, Crops, Pictures, batches, split_pictures
from run_folder import Journal, RunFolder
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import save_image
from transformers import ViTMAEForPreTraining

from megatron_moa import MixtureConfig
from megatron_moa.command_line.numbers import positive, seed, within
from megatron_moa.errors import OneLineParser, UserError, one_line, one_line_errors
from megatron_moa.mixture.config import BACKENDS, MIXINGS
from megatron_moa.mixture.functional import resolve_backend

FORMS = ("one-sided", "bi-sided", "quadratic")  # those of SwiGLU's shape
SHOWN = 8  # reconstructions in the picture


@dataclass(frozen=True)
class Size:
    """A model, and how it is trained by default: for so many steps or epochs."""

    shape: Shape
    batch: int
    micro_batch: int | None  # None: a process' whole share
    rate_per_256: float  # the peak rate for each 256 crops of a batch
    save_interval: int
    val_crops: int
    workers: int
    backend: str
    steps: int | None = None
    epochs: int | None = None


SIZES = {
    "tiny": Size(
        Shape(pixels=48, patch=8, encoder=(96, 3, 3), decoder=(64, 2, 2)),
        batch=32,
        micro_batch=16,  # two processes then add the very numbers that one adds
        rate_per_256=1.6e-2,
        save_interval=50,
        val_crops=96,
        workers=0,
        backend="eager",
        steps=400,
    ),
    "base": Size(
        Shape(pixels=224, patch=16, encoder=(768, 12, 12), decoder=(512, 8, 16)),
        batch=4096,
        micro_batch=None,
        rate_per_256=1.5e-4,
        save_interval=1000,
        val_crops=8192,
        workers=8,
        backend="auto",
        epochs=800,
    ),
}


# ---- optimizer


def parameter_groups(model: nn.Module) -> list[dict[str, object]]:
    """Returns two groups of parameters: those that decay by 0.05, and those that do not.

    Matrices and gate vectors decay; tokens and all of one dimension do not.
    """
    groups = [{"params": [], "weight_decay": decay} for decay in (0.05, 0.0)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim < 2 or name.endswith("token")]["params"].append(parameter)
    return groups


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Returns the learning rate of a step, counted from 1.

    The rate goes up in a line to the peak over a share of the steps, then down to 0 along a cosine.
    """
    rising = max(1, round(warmup * steps))
    if step <= rising:
        return peak * step / rising
    return peak * (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2


# ---- loop


@dataclass(frozen=True)
class Plan:
    """What a run does, flags and defaults put together; this process is ``rank`` of ``world``."""

    size: Size
    mixture: MixtureConfig | None
    training: Pictures
    held_out: Pictures
    batch: int
    micro_batch: int  # of a rank
    val_crops: int
    steps: int
    peak: float  # rate
    rank: int
    world: int
    device: torch.device

    @classmethod
    def of(cls, options: argparse.Namespace) -> Self:
        """Raises UserError for flags that do not go together."""
        size, world = SIZES[options.size], int(os.environ.get("WORLD_SIZE", "1"))
        if options.size != "tiny" and not options.data:
            raise UserError(f"--size {options.size}: needs pictures; name their folder by --data")
        if options.moa_mixing == "none" and options.moa_backend:
            raise UserError(
                f"--moa-backend {options.moa_backend}: has no effect with --moa-mixing none; drop one of them"
            )
        mixture = make_mixture(options.moa_mixing, options.moa_form, options.moa_backend or size.backend)
        training, held_out = split_pictures(options.data, options.val_data)
        batch = options.batch_size or size.batch
        if batch % world:
            raise UserError(f"--batch-size {batch}: not divisible by {world} processes; give a multiple of {world}")
        if (options.val_crops or world) < world:
            raise UserError(f"--val-crops {options.val_crops}: fewer than the {world} processes; give {world} or more")
        epochs = options.epochs or (None if options.steps else size.epochs)
        steps = max(1, epochs * len(training.files) // batch) if epochs else options.steps or size.steps
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
        if mixture:
            resolve_backend(mixture.backend, device.type)  # raises for one that is not here
        return cls(
            size,
            mixture,
            training,
            held_out,
            batch,
            micro_batch=min(options.micro_batch_size or size.micro_batch or batch, batch // world),
            val_crops=options.val_crops or size.val_crops,
            steps=steps,
            peak=options.lr or size.rate_per_256 * batch / 256,
            rank=int(os.environ.get("RANK", "0")),
            world=world,
            device=device,
        )

    def settings(self, options: argparse.Namespace) -> dict[str, object]:
        """What decides the losses, by flag."""
        flags = ("size", "moa_mixing", "warmup", "seed", "bf16")
        return {f"--{name.replace('_', '-')}": getattr(options, name) for name in flags} | {
            "--moa-form": self.mixture.form if self.mixture else None,
            "--data": self.training.describe(),
            "--val-data": self.held_out.describe(),
            "--val-crops": self.val_crops,
            "--batch-size": self.batch,
            "--steps": self.steps,
            "--lr": self.peak,
        }

    def training_numbers(self, done: int) -> list[range]:
        """The samples of this rank, by step: its part of each global batch."""
        share = self.batch // self.world
        firsts = [step * self.batch + self.rank * share for step in range(done, self.steps)]
        return [range(first, first + share) for first in firsts]

    def validation_numbers(self) -> list[range]:
        """The held-out samples of this rank, by batch; the same at every validation."""
        mine = range(self.rank, self.val_crops, self.world)
        return [mine[start : start + self.micro_batch] for start in range(0, len(mine), self.micro_batch)]

    def describe(self, model: nn.Module) -> str:
        """The run in a line."""
        layers = f"layers of {self.mixture.describe()}" if self.mixture else "layers of SwiGLU"
        millions = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) / 1e6
        return (
            f"ViT-MAE, {layers}, {millions:.2f}M parameters; {len(self.training.files)} pictures; {self.steps} steps "
            f"of {self.batch} crops, peak rate {self.peak:g}; {self.world} x {self.device.type}"
        )


def all_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if distributed.is_initialized():
        distributed.all_reduce(tensor)
    return tensor


def backward(model: nn.Module, pixels: Tensor, noise: Tensor, micro_batch: int, bf16: bool) -> Tensor:
    """Adds the gradients of a rank's mean loss, a micro-batch at a time, and returns that loss."""
    loss = pixels.new_zeros(())
    parts = list(zip(pixels.split(micro_batch), noise.split(micro_batch), strict=True))
    for index, (part, part_noise) in enumerate(parts):
        waits = isinstance(model, DistributedDataParallel) and index < len(parts) - 1  # the last one talks for all
        with model.no_sync() if waits else nullcontext():
            with torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
                part_loss = model(part, noise=part_noise).loss * (len(part) / len(pixels))
            part_loss.backward()
        loss += part_loss.detach()
    return loss


@torch.no_grad()
def validation_loss(model: nn.Module, batches: Iterable[list[Tensor]], bf16: bool) -> float:
    """The mean loss of all ranks' batches (pixels, noise)."""
    total, count = 0.0, 0
    for pixels, noise in batches:
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
            total += model(pixels, noise=noise).loss.double() * len(pixels)
        count += len(pixels)
    total, count = all_sum(torch.stack([total, torch.full_like(total, count)])).tolist()
    return total / count


def train(options: argparse.Namespace) -> None:
    """Trains from the last checkpoint, or from the start, to the last step."""
    plan, folder = Plan.of(options), RunFolder(options.out)
    folder.check(plan.settings(options))
    checkpoint = folder.read_checkpoint()
    done = checkpoint["step"] if checkpoint else 0
    if done == plan.steps:
        if plan.rank == 0:
            print(f"The run in {folder.path} is finished: {done} steps. Name another --out for another run.")
        return
    if plan.device.type == "cuda":
        torch.cuda.set_device(plan.device)
    elif options.size == "tiny":
        torch.set_num_threads(1)  # a second one only waits at matrices of this size
    if plan.world > 1:
        distributed.init_process_group("nccl" if plan.device.type == "cuda" else "gloo")
        distributed.barrier()  # all have looked at the folder before the first writes to it
    train_rank(options, plan, folder, checkpoint)
    if plan.world > 1:
        # A DistributedDataParallel that outlives its gloo group may hang when it goes: it joins the group's thread
        # under the GIL, for which that thread may wait.
        distributed.destroy_process_group()


def train_rank(
    options: argparse.Namespace, plan: Plan, folder: RunFolder, checkpoint: Mapping[str, object] | None
) -> None:
    """Trains from a checkpoint, or from the start, as one of the ranks that talk to each other."""
    done = checkpoint["step"] if checkpoint else 0
    shape = plan.size.shape
    model = build_model(shape, plan.mixture, options.seed).to(plan.device)
    crops, held_out = (
        Crops(pictures, shape.pixels, shape.patches, options.seed, stream)
        for stream, pictures in enumerate((plan.training, plan.held_out))
    )
    workers = plan.size.workers if options.workers is None else options.workers
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=plan.peak, betas=(0.9, 0.999))
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    parallel = DistributedDataParallel(model) if plan.world > 1 else model

    first_rank = plan.rank == 0
    journal = Journal(folder, plan.settings(options), done, plan.steps, plan.describe(model)) if first_rank else None
    clock = time.monotonic()
    for step, batch in enumerate(batches(crops, plan.training_numbers(done), workers, plan.device), done + 1):
        rate = learning_rate(step, plan.steps, plan.peak, options.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss = all_sum(backward(parallel, *batch, plan.micro_batch, options.bf16) / plan.world).item()
        if not math.isfinite(loss):
            raise UserError(f"--lr {plan.peak:g}: step {step} has the loss {loss}; try a lower one, with another --out")
        optimizer.step()
        if journal:
            journal.add_step(step, loss, rate, speed=plan.batch / (time.monotonic() - clock))
        if step % (options.save_interval or plan.size.save_interval) == 0 or step == plan.steps:
            fixed = batches(held_out, plan.validation_numbers(), workers, plan.device)
            validation = validation_loss(model, fixed, options.bf16)
            if journal:
                journal.add_validation(step, loss, validation)
                (shown,) = batches(held_out, [range(SHOWN)], 0, plan.device)
                pictures = reconstruct(model, *shown)
                folder.write_picture(lambda path: save_image(pictures, path, nrow=6, format="png"))  # noqa: B023
                state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
                folder.write_checkpoint(state)  # last: all else is there when it is
        clock = time.monotonic()
    if journal:
        journal.close()


def load_model(folder: Path, backend: str = "auto") -> ViTMAEForPreTraining:
    """The model that a run in this folder saved last, on the CPU.

    Raises:
        UserError: there is no run or no checkpoint, or they cannot be read.
    """
    run = RunFolder(Path(folder))
    flags = ("--moa-mixing", "--moa-form", "--size", "--seed")
    mixing, form, size, number = map(run.read_settings(flags).get, flags)
    checkpoint = run.read_checkpoint()
    if checkpoint is None:
        raise UserError(f"--out {folder}: has no checkpoint yet; wait for the run's first")
    try:
        model = build_model(SIZES[size].shape, make_mixture(mixing, form, backend), number)
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        reason = one_line(error, typed=True)
        raise UserError(
            f"--out {folder}: settings.json and checkpoint.pt do not go together ({reason}); name another run's folder"
        ) from None
    return model


# ---- command line


def make_mixture(mixing: str, form: str | None, backend: str = "auto") -> MixtureConfig | None:
    """The settings of the feed-forward layers; None for SwiGLU."""
    if mixing == "none":
        if form is not None:
            raise UserError(f"--moa-form {form}: has no effect with --moa-mixing none; drop one of them")
        return None
    return MixtureConfig(kind=mixing, form=form or "quadratic", backend=backend)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains as the flags say; exit code 2 for a user's mistake."""
    parser = OneLineParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=SIZES, default="tiny", help="base is ViT-B/16; default: tiny")
    add("--moa-mixing", choices=("none", *MIXINGS), default="moa", help="none is SwiGLU; default: moa")
    add("--moa-form", choices=FORMS, help="default: quadratic")
    add("--moa-backend", choices=BACKENDS, help="what computes the mixture; default: eager (tiny), auto (base)")
    add("--data", type=Path, metavar="FOLDER", help="of pictures, at any depth; default: three of installed packages")
    add("--val-data", type=Path, metavar="FOLDER", help=f"default: 1 of {FEW} pictures, or of few the right quarter")
    add(
        "--val-crops",
        type=positive,
        metavar="N",
        help="to validate on, the same each time; default: 96 (tiny), 8192 (base)",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, metavar="N", help="default: 400 (tiny)")
    length.add_argument("--epochs", type=positive, metavar="N", help="default: 800 (base)")
    add("--batch-size", type=positive, metavar="N", help="over all processes; default: 32 (tiny), 4096 (base)")
    add(
        "--micro-batch-size",
        type=positive,
        metavar="N",
        help="a process' crops at a time; default: 16 (tiny), its share (base)",
    )
    add(
        "--lr",
        type=within(float, 1e-9, 10),
        metavar="RATE",
        help="peak; default: 2e-3 (tiny), 2.4e-3 (base) at these batch sizes",
    )
    add("--warmup", type=within(float, 0, 1), default=0.05, metavar="SHARE", help="of the steps; default: 0.05")
    add("--bf16", action="store_true", help="autocast to bfloat16")
    add("--seed", type=seed, default=1, metavar="N", help="of weights, crops and masks; default: 1")
    add(
        "--workers",
        type=within(int, 0, 1024),
        metavar="N",
        help="processes that make crops, a rank; default: 0 (tiny), 8 (base)",
    )
    add("--save-interval", type=positive, metavar="STEPS", help="default: 50 (tiny), 1000 (base)")
    add("--out", type=Path, default=Path("runs/mae"), metavar="FOLDER", help="default: runs/mae")
    options = parser.parse_args(arguments)
    with one_line_errors(PROGRAM, f"the same command goes on from the last checkpoint in {options.out}"):
        train(options)


if __name__ == "__main__":
    main()
