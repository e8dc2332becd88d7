"""Records a trained mixture's coefficients on a text.

It also takes the mixture's loss with other coefficients in their place. Hooks on the modules that own the coefficients
see, and may replace, what those modules return. Nothing else of the model changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_moa.errors import UserError
from megatron_moa.layers.coefficients import Coefficients
from megatron_moa.layers.experts import MixedSharedExpertMLP
from megatron_moa.layers.mlp import MixedMLP
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.trained.from_megatron import LoadedModel
from megatron_moa.training.gate_statistics import GateStatistics

DENSE, ROUTED, SHARED = "dense", "routed experts", "shared expert"
_BATCH_TOKENS = 4096  # in one forward pass
FEWEST_WINDOWS = 4


@dataclass(frozen=True)
class Windows:
    """A text as a model is trained on it, cut into windows.

    Its documents stand one after the other, each with its end.

    Attributes:
        tokens: [windows, context + 1]; the last token of one is the first of the next.
        types: [windows, context], the input tokens as numbers from 0 to :attr:`kinds` - 1.
        vocabulary: [kinds], the token of each such number.
        documents: [windows], the document of a window's first predicted token.
        taken: how many documents there is anything of.
    """

    tokens: Tensor
    types: Tensor
    vocabulary: Tensor
    documents: tuple[int, ...]
    taken: int

    @classmethod
    def of(cls, documents: Sequence[Sequence[int]], end: int, context: int, most: int, seed: int) -> Windows:
        """Windows of documents in a random order.

        Args:
            documents: their tokens.
            end: the token behind each, and before the first.
            context: tokens of a window.
            most: tokens to take.
            seed: of the order.

        Raises:
            UserError: too little text.
        """
        stream, owner = [end], []  # of every token but the first
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
        for number in order:
            body = [*documents[number], end]
            if body[0] == end:  # an empty document
                continue
            stream += body
            owner += [number] * len(body)
            if len(stream) > most:
                break
        number = min((len(stream) - 1) // context, most // context)
        if number < FEWEST_WINDOWS:
            raise UserError(
                f"TEXT: {min(len(stream) - 1, most)} tokens are fewer than {FEWEST_WINDOWS} windows of the model's "
                f"context of {context}; give more text, and --tokens of at least {FEWEST_WINDOWS * context}"
            )
        flat, owner = torch.tensor(stream[: number * context + 1]), owner[: number * context]
        tokens = flat.unfold(0, context + 1, context)
        vocabulary, types = tokens[:, :-1].unique(return_inverse=True)
        return cls(tokens, types, vocabulary, tuple(owner[::context]), len(set(owner)))

    @property
    def kinds(self) -> int:
        """How many different tokens there are."""
        return len(self.vocabulary)

    @property
    def context(self) -> int:
        """Tokens of a window."""
        return self.types.shape[1]

    @property
    def half(self) -> int:
        """The first window of the second half."""
        return len(self.tokens) // 2

    def batches(self, first: int, last: int) -> Iterator[slice]:
        """The windows from ``first`` to ``last`` - 1, as many at once as a forward pass takes."""
        size = max(1, _BATCH_TOKENS // self.context)
        for start in range(first, last, size):
            yield slice(start, min(start + size, last))


@dataclass(frozen=True)
class Site:
    """A feed-forward layer, or all routed experts of one.

    Attributes:
        layer: from 1.
        kind: :data:`DENSE`, :data:`ROUTED` or :data:`SHARED`.
        names: in the model, of the module that owns the coefficients; one an expert.
        modules: those modules.
        mlps: the layers they belong to.
    """

    layer: int
    kind: str
    names: tuple[str, ...]
    modules: tuple[Coefficients, ...]
    mlps: tuple[MixedMLP, ...]

    @property
    def title(self) -> str:
        """For tables: ``layer 3, routed experts``."""
        return f"layer {self.layer}" + ("" if self.kind == DENSE else f", {self.kind}")


# Coefficients [t, n] in, others out: given the site, the expert's number and places of the tokens in the batch [t].
Change = Callable[[Site, int, Tensor, Tensor], Tensor]


def find_sites(loaded: LoadedModel) -> list[Site]:
    """Finds every layer with coefficients, except those of multi-token prediction.

    Layers of multi-token prediction take no part in the loss.
    """
    sites = []
    for layer_name, layer in loaded.model.named_modules():
        if not isinstance(layer, TransformerLayer) or ".mtp." in f".{layer_name}.":
            continue
        found: dict[str, list[tuple[str, MixedMLP]]] = {}
        routed = isinstance(layer.mlp, MoELayer)
        for name, module in layer.named_modules():
            if isinstance(module, MixedMLP):
                kind = SHARED if isinstance(module, MixedSharedExpertMLP) else ROUTED if routed else DENSE
                found.setdefault(kind, []).append((f"{layer_name}.{name}.coefficients", module))
        for kind, members in found.items():
            names, mlps = zip(*members, strict=True)
            sites.append(Site(layer.layer_number, kind, names, tuple(mlp.coefficients for mlp in mlps), mlps))
    return sites


class GateProbe:
    """A loaded mixture with hooks on its coefficients.

    Args:
        loaded: experts one by one, not grouped, and not padded to their capacity.
        windows: the text.
    """

    def __init__(self, loaded: LoadedModel, windows: Windows) -> None:
        self.loaded, self.windows = loaded, windows
        self.sites = find_sites(loaded)
        self.mixture: MixtureConfig = loaded.mixture
        self._change: Change | None = None
        self._observe: Callable[[Site, int, Tensor, Tensor], None] | None = None
        self._routing: dict[int, Tensor] = {}  # by layer: [tokens, experts], who gets which token
        self._types = self._positions = torch.empty(0, dtype=torch.long)  # [s * b] of the batch, as Megatron lays it
        for site in self.sites:
            for expert, module in enumerate(site.modules):
                module.register_forward_hook(self._hook(site, expert))
        for layer in loaded.model.modules():
            if isinstance(layer, TransformerLayer) and isinstance(layer.mlp, MoELayer):
                number = layer.layer_number
                layer.mlp.router.register_forward_hook(
                    lambda _, __, output, number=number: self._routing.__setitem__(number, output[1])
                )

    def _hook(self, site: Site, expert: int) -> Callable[..., Tensor | None]:
        def hook(_: Coefficients, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
            if self._change is None and self._observe is None:
                return None
            tokens = inputs[0].shape[:-1]
            rows = output.expand(*tokens, -1).reshape(-1, output.shape[-1])  # LA's are [n]
            places = self._places(site, expert, len(rows))
            if self._observe is not None:
                self._observe(site, expert, rows, places)
            if self._change is None:
                return None
            return self._change(site, expert, rows, places).to(output.dtype).view(*tokens, -1)

        return hook

    def _places(self, site: Site, expert: int, rows: int) -> Tensor:
        if site.kind != ROUTED:
            return torch.arange(rows, device=self.loaded.device)
        places = self._routing[site.layer][:, expert].nonzero()[:, 0]  # Megatron sorts an expert's tokens by place
        assert len(places) == rows, f"{site.title}: expert {expert} gets {rows} tokens, the router names {len(places)}"
        return places

    @contextlib.contextmanager
    def changed(self, change: Change | None) -> Iterator[None]:
        """Inside, the model computes with other coefficients."""
        self._change = change
        try:
            yield
        finally:
            self._change = None

    def types_at(self, places: Tensor) -> Tensor:
        """The types of the batch's tokens at these places, [t]."""
        return self._types[places]

    @torch.inference_mode()
    def losses(self, first: int, last: int) -> Tensor:
        """Nats a token in each window from ``first`` to ``last`` - 1, [windows] float64."""
        return torch.cat([self._losses(batch) for batch in self.windows.batches(first, last)])

    def _losses(self, batch: slice) -> Tensor:
        device, context = self.loaded.device, self.windows.context
        tokens = self.windows.tokens[batch].to(device)
        self._types = self.windows.types[batch].to(device).T.flatten()
        self._positions = torch.arange(context, device=device).repeat_interleave(len(tokens))
        logits = self.loaded.forward(tokens[:, :-1]).float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return losses.double().view(len(tokens), context).mean(1).cpu()

    @torch.inference_mode()
    def record(self, sampled: Sequence[tuple[int, int]]) -> Recording:
        """One pass over the text.

        Args:
            sampled: (window, position) of tokens whose coefficients are kept.
        """
        windows, device = self.windows, self.loaded.device
        n, shape = self.mixture.num_coefficients, (windows.kinds, windows.context)
        halves = [
            [GateStatistics(n, *shape, len(site.modules), device) for site in self.sites] for _ in ("first", "second")
        ]
        index = {id(site): number for number, site in enumerate(self.sites)}
        samples: list[dict[int, Tensor]] = [{} for _ in self.sites]
        losses = []
        for half, bounds in enumerate(((0, windows.half), (windows.half, len(windows.tokens)))):
            for batch in windows.batches(*bounds):
                width = batch.stop - batch.start
                wanted = {
                    position * width + window - batch.start: number
                    for number, (window, position) in enumerate(sampled)
                    if batch.start <= window < batch.stop
                }

                def observe(
                    site: Site,
                    expert: int,
                    rows: Tensor,
                    places: Tensor,
                    half: int = half,
                    wanted: dict[int, int] = wanted,
                ) -> None:
                    number = index[id(site)]
                    halves[half][number].add(rows, self._types[places], self._positions[places], expert)
                    for place, sample in wanted.items():
                        for row in (places == place).nonzero()[:, 0].tolist():
                            samples[number].setdefault(sample, rows[row].double().cpu())  # of its first expert

                self._observe = observe
                try:
                    losses.append(self._losses(batch))
                finally:
                    self._observe = None
        kept = [[by_sample[key] for key in sorted(by_sample)] for by_sample in samples]
        return Recording(*halves, torch.cat(losses), kept)

    @torch.inference_mode()
    def output_changes(self, means: Sequence[Tensor]) -> list[float]:
        """Measures how much each layer's output changes when the mean replaces its coefficients.

        No other layer's are replaced, and the input is the trained model's own. The measure is the root of the summed
        squares of the change over that of the output, on the second half of the text.

        Args:
            means: of each site, [experts, n].
        """
        sums = torch.zeros(len(self.sites), 2, dtype=torch.float64)

        def hook(number: int, expert: int) -> Callable[..., None]:
            def compare(mlp: MixedMLP, inputs: tuple, options: dict, output: tuple | Tensor) -> None:
                with self.changed(lambda _, __, rows, ___: means[number][expert].expand_as(rows)):
                    other = type(mlp).forward(mlp, *inputs, **options)  # without this hook
                # A shared expert returns its output alone.
                ours, other = (result[0] if isinstance(result, tuple) else result for result in (output, other))
                sums[number, 0] += (ours - other).double().square().sum().cpu()
                sums[number, 1] += ours.double().square().sum().cpu()

            return compare

        handles = [
            mlp.register_forward_hook(hook(number, expert), with_kwargs=True)
            for number, site in enumerate(self.sites)
            for expert, mlp in enumerate(site.mlps)
        ]
        try:
            self.losses(self.windows.half, len(self.windows.tokens))
        finally:
            for handle in handles:
                handle.remove()
        return (sums[:, 0] / sums[:, 1]).sqrt().nan_to_num(0.0).tolist()


@dataclass(frozen=True)
class Recording:
    """What one pass over a text gave.

    Attributes:
        first, second: statistics of each site, of the text's two halves.
        losses: of every window, [windows].
        samples: of each site, the coefficients [n] of the sampled tokens.
    """

    first: list[GateStatistics]
    second: list[GateStatistics]
    losses: Tensor
    samples: list[list[Tensor]]

    @property
    def whole(self) -> list[GateStatistics]:
        """Of the whole text."""
        return [one + other for one, other in zip(self.first, self.second, strict=True)]


@dataclass(frozen=True)
class Ablation:
    """Coefficients to put in the place of a model's own.

    Attributes:
        name: in words.
        kind: ``mean``, ``type mean``, ``permuted``, ``without`` or ``layer mean``.
        change: see :data:`Change`.
        about: activation and branch, or layer and kind of layer.
    """

    name: str
    kind: str
    change: Change
    about: dict[str, str | int]


def branches_of(mixture: MixtureConfig) -> dict[str, dict[str, list[int]]]:
    """Numbers of the coefficients by branch and activation: ``activated`` is W1's branch, ``linear`` W2's.

    Of the one-sided form only the linear branch is mixed. Of the quadratic form c_kl belongs to both branches: to
    sigma_k in the activated one, to sigma_l in the linear one.
    """
    names = mixture.activations
    if mixture.form == "quadratic":
        return {
            branch: {
                name: [number for number, pair in enumerate(mixture.pairs) if pair[side] == k]
                for k, name in enumerate(names)
            }
            for side, branch in enumerate(("activated", "linear"))
        }
    mixed = {"type1": ("activated",), "one-sided": ("linear",), "bi-sided": ("activated", "linear")}[mixture.form]
    return {
        branch: {name: [half * len(names) + k] for k, name in enumerate(names)} for half, branch in enumerate(mixed)
    }


def ablations(probe: GateProbe, statistics: Sequence[GateStatistics], seed: int) -> Iterator[Ablation]:
    """What is tried: means, types' means, permutations, activations left out, one layer's mean.

    Args:
        statistics: of each site, on a text that the losses will not be taken on.
        seed: of the permutations.
    """
    index = {id(site): number for number, site in enumerate(probe.sites)}
    if probe.mixture.kind == "moa":
        means = [site.expert_means() for site in statistics]

        def mean(site: Site, expert: int, rows: Tensor, _: Tensor) -> Tensor:
            return means[index[id(site)]][expert].expand_as(rows)

        yield Ablation("every coefficient at its mean (LA)", "mean", mean, {})
        type_means = [site.type_means() for site in statistics]
        shifts = [expert_mean - site.mean for expert_mean, site in zip(means, statistics, strict=True)]

        def type_mean(site: Site, expert: int, rows: Tensor, places: Tensor) -> Tensor:
            number = index[id(site)]
            return type_means[number][probe.types_at(places)] + shifts[number][expert]

        yield Ablation("every coefficient at its token type's mean", "type mean", type_mean, {})
        generator = torch.Generator().manual_seed(seed)

        def permuted(_: Site, __: int, rows: Tensor, ___: Tensor) -> Tensor:
            return rows[torch.randperm(len(rows), generator=generator).to(rows.device)]

        yield Ablation("coefficients permuted among tokens", "permuted", permuted, {})
    branches = branches_of(probe.mixture)
    for activation in probe.mixture.activations:
        left_out = {branch: numbers[activation] for branch, numbers in branches.items()}
        if len(branches) > 1:
            left_out = {"both": [*left_out["activated"], *left_out["linear"]], **left_out}
        for branch, numbers in left_out.items():

            def without(_: Site, __: int, rows: Tensor, ___: Tensor, numbers: list[int] = numbers) -> Tensor:
                return rows.index_fill(1, torch.tensor(numbers, device=rows.device), 0.0)

            about = {"activation": activation, "branch": branch}
            where = "" if len(branches) == 1 else f", {branch} branch{'es' * (branch == 'both')}"
            yield Ablation(f"without {activation}{where}", "without", without, about)
    if probe.mixture.kind == "moa":
        for site in probe.sites:

            def alone(where: Site, expert: int, rows: Tensor, places: Tensor, site: Site = site) -> Tensor:
                return mean(where, expert, rows, places) if where is site else rows

            about = {"layer": site.layer, "site": site.kind}
            yield Ablation(f"{site.title} alone at its mean", "layer mean", alone, about)
