"""Tests examples/vision/pretrain_mae.py: it learns, and splits a batch over processes.

After a kill the training goes on bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from megatron_moa import MixtureConfig
from megatron_moa.errors import UserError
from megatron_moa.mixture import functional
from tests.support import launch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples/vision/pretrain_mae.py"
sys.path.insert(0, str(SCRIPT.parent))  # as python finds what lies beside a script

masked_autoencoder = import_module("masked_autoencoder")
pictures = import_module("pictures")
pretrain_mae = import_module("pretrain_mae")

FLAGS = ["--steps", "24", "--save-interval", "8", "--batch-size", "16", "--micro-batch-size", "8"]
FLAGS += ["--lr", "4e-3"]
TINY = pretrain_mae.SIZES["tiny"].shape
QUADRATIC = MixtureConfig(form="quadratic", backend="eager")
MIXTURES = {
    "swiglu": None,
    "quadratic": QUADRATIC,
    "la": MixtureConfig(kind="la", form="quadratic"),
    "all": MixtureConfig(form="one-sided", gate_bias=True, amplitude="learned"),
}


@pytest.fixture(autouse=True)
def _threads_stay() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(folder) == (0, "")
    return folder


def train(folder: Path, *flags: str, processes: int = 0, kill: str = "never") -> tuple[int, str]:
    """Exit code of a run in processes of its own, and what it printed if it failed."""
    arguments = (kill, [*FLAGS, *flags, "--out", str(folder)])
    code, log = launch.launch(run_or_die, arguments, processes, ROOT)
    return code, log if code else ""


def run_or_die(kill: str, flags: list[str]) -> None:
    """A process of a run, which is killed at a moment, or never."""
    run_folder = import_module("run_folder")

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if kill == "between checkpoints":
        rate_of = pretrain_mae.learning_rate
        pretrain_mae.learning_rate = lambda step, *rest: die() if step == 13 else rate_of(step, *rest)
    elif kill == "within a checkpoint":
        save = torch.save

        def half(state: dict[str, object], path: Path) -> None:
            save(state, path)
            if state["step"] == 16:
                os.truncate(path, path.stat().st_size // 2)
                die()

        torch.save = half
    elif kill == "within a line":

        def torn(journal: object, **values: float) -> None:
            line = json.dumps(values) + "\n"
            journal.log.write(line[:9] if values["step"] == 20 else line)
            journal.log.flush()
            if values["step"] == 20:
                die()

        run_folder.Journal._note = torn
    pretrain_mae.main(flags)


def lines(folder: Path, key: str) -> dict[int, float]:
    """What losses.jsonl has under a key, by step."""
    rows = map(json.loads, (folder / "losses.jsonl").read_text().splitlines())
    return {row["step"]: row[key] for row in rows if key in row}


def main_fails(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """What a command prints that ends with exit code 2: one line."""
    with pytest.raises(SystemExit) as stop:
        pretrain_mae.main(list(flags))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("pretrain_mae.py: error: ")


class TestRun:
    def test_lowers_its_loss_and_leaves_what_it_says(self, whole_run: Path) -> None:
        losses, validation = lines(whole_run, "loss"), lines(whole_run, "validation_loss")
        assert list(losses) == list(range(1, 25))
        assert list(validation) == [8, 16, 24]
        assert 0.95 < losses[1] < 1.15  # of a prediction near 0, about the variance, 1
        assert sum(losses[step] for step in range(20, 25)) / 5 < 0.93
        assert validation[24] < validation[8]
        names = {path.name for path in whole_run.iterdir()}
        assert names == {"settings.json", "losses.jsonl", "checkpoint.pt", "reconstructions.png", "tensorboard"}
        with Image.open(whole_run / "reconstructions.png") as picture:
            assert picture.size == (6 * 98 + 2, 4 * 98 + 2)

    def test_goes_on_bit_for_bit_after_any_kill(self, whole_run: Path, tmp_path: Path) -> None:
        for kill in ("between checkpoints", "within a checkpoint", "within a line"):
            code, log = train(tmp_path / "run", kill=kill)
            assert code == -signal.SIGKILL, log
        assert train(tmp_path / "run") == (0, "")
        same_run(tmp_path / "run", whole_run)

    @pytest.mark.distributed
    @pytest.mark.parametrize("part", ["8", pytest.param("4", marks=pytest.mark.full)])
    def test_two_processes_have_one_s_losses(self, part: str, whole_run: Path, tmp_path: Path) -> None:
        """Trains on two processes, each with 8 crops a step, to the losses of the whole run.

        The 8 crops are one of the two parts of the whole run, or parts of the process's own, with other roundings.
        """
        assert train(tmp_path / "run", "--micro-batch-size", part, processes=2) == (0, "")
        for key in ("loss", "validation_loss"):
            exact = part == "8" and key == "loss"
            tolerance = 0 if exact else 1e-5
            assert lines(tmp_path / "run", key) == pytest.approx(lines(whole_run, key), abs=tolerance, rel=0)

    def test_finished_is_said_and_nothing_done(self, whole_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        before = {path: path.stat().st_mtime_ns for path in whole_run.rglob("*")}
        pretrain_mae.main([*FLAGS, "--out", str(whole_run)])
        assert "is finished: 24 steps" in capsys.readouterr().out
        assert {path: path.stat().st_mtime_ns for path in whole_run.rglob("*")} == before

    def test_model_is_read_back(self, whole_run: Path) -> None:
        """Its validation loss is the one that was noted last."""
        model = pretrain_mae.load_model(whole_run, backend="eager")
        _, held_out = pictures.split_pictures(None, None)
        crops = pictures.Crops(held_out, TINY.pixels, TINY.patches, 1, 1)
        batches = pictures.batches(crops, [range(96)], 0, torch.device("cpu"))
        loss = pretrain_mae.validation_loss(model, batches, bf16=False)
        assert loss == pytest.approx(lines(whole_run, "validation_loss")[24], abs=1e-6)

    @pytest.mark.full
    @pytest.mark.parametrize(
        "flags", [["--moa-mixing", "none"], ["--moa-mixing", "la"], ["--bf16"], ["--workers", "2"]]
    )
    def test_other_flags(self, flags: list[str], whole_run: Path, tmp_path: Path) -> None:
        assert train(tmp_path / "run", *flags) == (0, "")
        losses = lines(tmp_path / "run", "loss")
        assert losses[24] < 0.95
        if flags[0] == "--workers":
            same_run(tmp_path / "run", whole_run)


def same_run(folder: Path, whole: Path) -> None:
    """Losses, picture and checkpoint are equal."""
    for name in ("losses.jsonl", "reconstructions.png", "settings.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    states = [torch.load(path / "checkpoint.pt") for path in (folder, whole)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


class TestModel:
    def test_arms_of_a_seed_start_alike(self) -> None:
        models = {name: masked_autoencoder.build_model(TINY, mixture, 3) for name, mixture in MIXTURES.items()}
        base = models.pop("swiglu").state_dict()
        assert any(name.endswith("mlp.fc2.weight") for name in base)
        for model in models.values():
            state = model.state_dict()
            torch.testing.assert_close({name: state[name] for name in base}, base, rtol=0, atol=0)

    def test_layers_have_the_paper_s_width(self) -> None:
        model = masked_autoencoder.build_model(TINY, QUADRATIC, 1)
        layers = [*model.vit.layers, *model.decoder.decoder_layers]
        assert [tuple(layer.mlp.fc1.weight.shape) for layer in layers] == [(512, 96)] * 3 + [(340, 64)] * 2

    def test_every_patch_has_a_place_of_its_own(self) -> None:
        model = masked_autoencoder.build_model(TINY, None, 1)
        for positions in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
            (rows,) = positions
            assert not positions.requires_grad
            assert len(rows) == 37
            distances = (rows.unsqueeze(0) - rows.unsqueeze(1)).norm(dim=-1)
            assert distances.add(10 * torch.eye(37)).min() > 0.3
            patches = distances[1:, 1:].view(6, 6, 6, 6)  # at (row, column)
            torch.testing.assert_close(patches, patches.permute(1, 0, 3, 2))  # x and y are alike
        for token in (model.vit.embeddings.cls_token, model.decoder.mask_token):
            assert 0.01 < token.std() < 0.03

    def test_only_masked_patches_count(self) -> None:
        """The loss, by hand: squared errors of masked patches, each of mean 0 and variance 1."""
        model = masked_autoencoder.build_model(TINY, None, 1)
        pixels, noise = torch.randn(2, 3, 48, 48), torch.rand(2, 36)
        result = model(pixels, noise=noise)
        errors = []
        for image, picture in enumerate(pixels):
            for patch in noise[image].argsort()[9:].tolist():
                row, column = divmod(patch, 6)
                cut = picture[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].permute(1, 2, 0).flatten()
                errors.append((result.logits[image, patch] - (cut - cut.mean()) / cut.std()).square().mean())
        torch.testing.assert_close(result.loss, torch.stack(errors).mean(), rtol=1e-5, atol=1e-6)

    def test_base_is_the_paper_s(self) -> None:
        with torch.device("meta"):
            layers = nn.ModuleList(masked_autoencoder.SwiGLU(width, 8 * width // 3, 0.02) for width in (768, 512))
        assert [layer.fc2.in_features for layer in layers] == [2048, 1365]
        assert pretrain_mae.SIZES["base"].shape == masked_autoencoder.Shape(224, 16, (768, 12, 12), (512, 8, 16))

    @pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
    def test_decay_is_on_matrices_and_gates_only(self, mixture: MixtureConfig | None) -> None:
        model = masked_autoencoder.build_model(TINY, mixture, 1)
        decayed, others = pretrain_mae.parameter_groups(model)
        assert (decayed["weight_decay"], others["weight_decay"]) == (0.05, 0.0)
        ids = {id(parameter) for parameter in decayed["params"]}
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert len(trained) == len(decayed["params"]) + len(others["params"])
        for name, parameter in trained.items():
            ends = (".bias", "token", "norm.weight", "norm_before.weight", "norm_after.weight", ".value", ".amplitude")
            still = name.endswith((*ends, "layernorm_before.weight", "layernorm_after.weight"))
            assert (id(parameter) in ids) != still, name


def test_rate_rises_then_falls_to_0() -> None:
    rates = [pretrain_mae.learning_rate(step, 800, 2.0, 0.05) for step in range(1, 801)]
    assert rates[:40] == pytest.approx([step / 20 for step in range(1, 41)])
    assert max(rates) == rates[39] == 2.0
    assert rates[419] == pytest.approx(1.0)
    assert rates[799] == pytest.approx(0, abs=1e-12)


class TestPictures:
    def save(self, folder: Path, count: int) -> None:
        for index in range(count):
            path = folder / f"class{index % 3}" / f"{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.new("RGB", (80, 60), "black")
            picture.paste("white", (60, 0, 80, 60))
            picture.save(path)

    def test_a_sample_hangs_on_seed_stream_and_number_alone(self) -> None:
        training, _ = pictures.split_pictures(None, None)
        make = partial(pictures.Crops, training, 48, 36)
        torch.manual_seed(1)
        pixels, noise = make(1, 0)[7]
        state = torch.get_rng_state()
        again = make(1, 0)
        again[3]
        torch.testing.assert_close(again[7], (pixels, noise), rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), state)
        for other in (make(2, 0)[7], make(1, 1)[7], make(1, 0)[8], make(1, 0)[7 + len(training.files)]):
            assert not torch.equal(other[1], noise)

    def test_an_epoch_has_every_picture_once(self, tmp_path: Path) -> None:
        orders = [pictures.order_of_epoch(1, 0, epoch, 50).tolist() for epoch in range(2)]
        assert sorted(orders[0]) == sorted(orders[1]) == list(range(50))
        assert orders[0] != orders[1] != list(range(50))

    def test_what_is_held_out_is_not_trained_on(self, tmp_path: Path) -> None:
        self.save(tmp_path / "few", 6)
        training, held_out = pictures.split_pictures(tmp_path / "few", None)
        assert len(training.files) == len(held_out.files) == 6
        dark, bright = (pictures.Crops(part, 48, 36, 1, 0)[0][0] for part in (training, held_out))
        assert dark.max() < 0 < bright.min()
        self.save(tmp_path / "many", 41)
        training, held_out = pictures.split_pictures(tmp_path / "many", None)
        assert (len(training.files), len(held_out.files)) == (38, 3)
        assert not set(training.files) & set(held_out.files)
        training, held_out = pictures.split_pictures(tmp_path / "many", tmp_path / "few")
        assert (len(training.files), len(held_out.files)) == (41, 6)

    def test_a_moved_folder_is_the_same_data(self, tmp_path: Path) -> None:
        self.save(tmp_path / "one", 6)
        self.save(tmp_path / "two/deep", 6)
        one, two = (pictures.split_pictures(tmp_path / name, None)[0].describe() for name in ("one", "two"))
        assert one == two
        (tmp_path / "two/deep/class0/00.png").rename(tmp_path / "two/deep/class0/77.png")
        assert pictures.split_pictures(tmp_path / "two", None)[0].describe() != one

    @pytest.mark.distributed
    @pytest.mark.parametrize("processes", [0, pytest.param(2, marks=pytest.mark.full)])
    def test_a_damaged_picture_is_named(self, processes: int, tmp_path: Path) -> None:
        self.save(tmp_path / "data", 6)
        damaged = tmp_path / "data/class1/04.png"
        damaged.write_bytes(damaged.read_bytes()[:60])
        flags = ["--data", str(tmp_path / "data"), "--workers", "1"]
        code, log = train(tmp_path / "run", *flags, processes=processes)
        assert code == 2
        assert f"error: {damaged}: cannot be read as a picture (" in log
        assert "Traceback" not in log


class TestMistakes:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ("--data nowhere", "--data nowhere: not a folder; name one with pictures, at any depth"),
            ("--size base", "--size base: needs pictures; name their folder by --data"),
            ("--lr 0", "argument --lr: a number from 1e-09 to 10 is wanted, not 0; see pretrain_mae.py --help"),
            ("--lr nan", "argument --lr: a number from 1e-09 to 10 is wanted, not nan; see pretrain_mae.py --help"),
            ("--lr fast", "argument --lr: invalid float value: 'fast'; see pretrain_mae.py --help"),
            ("--warmup 40", "argument --warmup: a number from 0 to 1 is wanted, not 40; see pretrain_mae.py --help"),
            (
                "--moa-mixing none --moa-form quadratic",
                "--moa-form quadratic: has no effect with --moa-mixing none; drop one of them",
            ),
            (
                "--moa-mixing none --moa-backend eager",
                "--moa-backend eager: has no effect with --moa-mixing none; drop one of them",
            ),
            (
                "--seed -1",
                "argument --seed: a number from 0 to 4294967295 is wanted, not -1; see pretrain_mae.py --help",
            ),
            ("--moa-form type1", "argument --moa-form: invalid choice: 'type1'"),
            ("--steps 5 --epochs 5", "argument --epochs: not allowed with argument --steps"),
        ],
    )
    def test_are_one_line_and_write_nothing(
        self, flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        line = main_fails(capsys, *flags.split(), "--out", str(tmp_path / "run"))
        assert line.startswith(message)
        assert not any(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ("--batch-size 16", "--batch-size 16: not divisible by 3 processes; give a multiple of 3"),
            ("--batch-size 18 --val-crops 2", "--val-crops 2: fewer than the 3 processes; give 3 or more"),
        ],
    )
    def test_numbers_that_processes_cannot_share(
        self,
        flags: str,
        message: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", "3")
        assert main_fails(capsys, *flags.split(), "--out", str(tmp_path / "run")) == message
        assert not any(tmp_path.iterdir())

    @pytest.mark.skipif(torch.cuda.is_available(), reason="has what is missing here")
    def test_backend_that_is_not_here(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        resolve = functional.resolve_backend.__wrapped__  # what other tests have found here is remembered
        monkeypatch.setattr(pretrain_mae, "resolve_backend", resolve)
        line = main_fails(capsys, "--moa-backend", "triton", "--out", str(tmp_path / "run"))
        assert line.startswith("--moa-backend triton: no GPU; take --moa-backend compile, or ")
        assert not any(tmp_path.iterdir())

    def test_folder_without_pictures(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "notes.txt").touch()
        line = main_fails(capsys, "--data", str(tmp_path), "--out", str(tmp_path / "run"))
        assert line.startswith(f"--data {tmp_path}: has no pictures (.jpg ")

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ("--lr 2e-3", "--lr 0.002: the run in {} has 0.004; give that, or another --out"),
            ("--moa-mixing none", "--moa-mixing none: the run in {} has moa; give that, or another --out"),
            ("--seed 2", "--seed 2: the run in {} has 1; give that, or another --out"),
        ],
    )
    def test_checkpoint_of_other_settings(
        self, flags: str, message: str, whole_run: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = (whole_run / "losses.jsonl").read_bytes()
        line = main_fails(capsys, *FLAGS, *flags.split(), "--out", str(whole_run))
        assert line == message.format(whole_run)
        assert (whole_run / "losses.jsonl").read_bytes() == before

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("settings.json", lambda text: text[:9], "settings.json is damaged (JSONDecodeError: "),
            (
                "settings.json",
                lambda text: text.replace("--moa-form", "--moa-shape"),
                "settings.json is another version's",
            ),
            (
                "settings.json",
                lambda text: text.replace("{", '{"--new": 1,'),
                "settings.json is another version's, with -",
            ),
            ("losses.jsonl", lambda text: "{}\n" + text, "losses.jsonl has a damaged line (KeyError: 'step'); delete"),
            ("checkpoint.pt", None, "checkpoint.pt is damaged (KeyError: "),
        ],
    )
    def test_files_of_a_run_that_are_damaged_or_another_versions(
        self,
        name: str,
        change: Callable[[str], str] | None,
        message: str,
        whole_run: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        folder = tmp_path / "run"
        shutil.copytree(whole_run, folder)
        if change is None:
            torch.save({"model": {}}, folder / name)
        else:
            (folder / name).write_text(change((folder / name).read_text()))
        if name != "checkpoint.pt":
            (folder / "checkpoint.pt").unlink()  # a run of no further step looks at no losses
        assert main_fails(capsys, *FLAGS, "--out", str(folder)).startswith(f"--out {folder}: {message}")

    def test_what_no_model_can_be_read_from(self, whole_run: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=f"^--out {tmp_path}: no run is there; name the folder of one$"):
            pretrain_mae.load_model(tmp_path)
        (tmp_path / "settings.json").write_bytes((whole_run / "settings.json").read_bytes())
        with pytest.raises(UserError, match=r": has no checkpoint yet; wait for the run's first$"):
            pretrain_mae.load_model(tmp_path)
        (tmp_path / "settings.json").write_text('{"--size": "tiny"}')
        with pytest.raises(UserError, match=r"without --moa-mixing, --moa-form, --seed; give another --out$"):
            pretrain_mae.load_model(tmp_path)

    def test_folder_of_something_else(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "thesis.tex").touch()
        line = main_fails(capsys, "--out", str(tmp_path))
        assert line == f"--out {tmp_path}: holds what is not this program's; name a new or an empty folder"
        line = main_fails(capsys, "--out", str(tmp_path / "thesis.tex"))
        assert line == f"--out {tmp_path / 'thesis.tex'}: is a file; name a folder"

    def test_damaged_checkpoint(self, whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "settings.json").write_bytes((whole_run / "settings.json").read_bytes())
        (tmp_path / "checkpoint.pt").write_bytes((whole_run / "checkpoint.pt").read_bytes()[:999])
        line = main_fails(capsys, *FLAGS, "--out", str(tmp_path))
        assert line.startswith(f"--out {tmp_path}: checkpoint.pt is damaged (")

    def test_loss_that_is_none(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        flags = ["--steps", "20", "--batch-size", "2", "--warmup", "0", "--lr", "10", "--out", str(tmp_path / "run")]
        with pytest.raises(SystemExit) as stop:
            pretrain_mae.main(flags)
        assert stop.value.code == 2
        assert "--lr 10: step " in capsys.readouterr().err


def test_no_pictures_among_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--data: neither scikit-learn nor matplotlib is here to lend pictures; "):
        pictures.split_pictures(None, None)
