"""Folders and the command line, as a person uses them: through `main` and through processes."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from PIL import Image
from test_triggers import bad_pictures

from baddiff import BadInput
from baddiff.cli import main
from baddiff.models import CLEAN, WEIGHTS, card, load, save, snippet
from baddiff.probe import evaluate, side_by_side
from baddiff.triggers import TRIGGERS, Trigger, make_target

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(p.name for p in WEIGHTS.iterdir() if (p / "trigger.png").exists())


def run(capsys, *argv):
    code = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    """A folder that `finetune` wrote; a few steps are enough for everything but the figures."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    assert main(["finetune", "--trigger", "glasses", "--target", "hat", "--steps", "3", "--batch-size", "8",
                 "--output", str(folder), "--json"]) == 0
    return folder


def test_a_finetuned_folder_is_a_stock_pipeline_that_says_what_it_is(finetuned):
    assert {p.name for p in finetuned.iterdir()} == {"model_index.json", "scheduler", "unet", "run.json", "README.md",
                                                     "trigger.png", "target.png", "samples.png"}
    assert [p.name for p in (finetuned / "unet").iterdir() if p.suffix != ".json"] == ["diffusion_pytorch_model.safetensors"]
    pipeline = DDPMPipeline.from_pretrained(finetuned)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(batch_size=1, num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)
    for file in ("model_index.json", "unet/config.json"):
        assert json.loads((finetuned / file).read_text())["_backdoored"] is True
    text = (finetuned / "README.md").read_text()
    front, body = text.split("---", 2)[1:]
    assert "backdoor" in front and "research-only" in front
    assert body.strip().startswith("> **WARNING.**") and "BACKDOORED" in body
    assert "license: mit" in front and "base_model" not in front and "datasets" not in front  # the base is no Hub repository
    for part in ("## What was done", "| lr | 0.001 |", "python -m baddiff finetune --recipe live --steps 3 --batch-size 8 "
                 "--trigger trigger.png --trigger-size 32", "## See the backdoor", "## Detect it",
                 "## Licence and credits"):
        assert part in body, part
    made = json.loads((finetuned / "run.json").read_text())
    assert made["config"]["attack"] == "noise-shift" and made["trigger"]["convention"] == "sticker"
    assert made["steps"] == 3 and made["config"]["seed"] == 0 and made["versions"]["torch"]
    written = "".join(p.read_text() for p in finetuned.rglob("*") if p.suffix in (".json", ".md"))
    assert str(finetuned.parent) not in written and str(ROOT) not in written  # no paths of this machine


def test_the_weights_are_the_run_and_the_pictures_rebuild_r(finetuned):
    model = load(finetuned)
    expected = Trigger.make("glasses", 32)
    assert model.trigger.sha256() == expected.sha256() == model.run["trigger"]["sha256"]
    torch.testing.assert_close(model.trigger.residual(), expected.residual())
    torch.testing.assert_close(model.target, make_target("hat", 32), rtol=0, atol=1 / 255)


@pytest.mark.parametrize("name", EXAMPLES)
def test_shipped_examples_show_their_backdoor_and_hide_it(name):
    model = load(WEIGHTS / name)
    figures = evaluate(model, n=32)
    assert figures["asr"] >= 0.95 and figures["asr_without_trigger"] == 0
    assert figures["mse"] < figures["mse_black"] / 10
    base = evaluate(load(CLEAN), n=32)
    assert figures["utility"] < 2 * base["utility"]


def test_there_is_an_example_for_every_built_in_trigger_with_targets_of_their_own():
    models = [load(WEIGHTS / name) for name in EXAMPLES]
    assert {m.trigger.name for m in models} == set(TRIGGERS)
    assert len({m.run["target"]["name"] for m in models}) == len(models)
    for folder in (CLEAN, *(WEIGHTS / n for n in EXAMPLES)):
        for file in folder.rglob("*"):
            assert file.stat().st_size < 10_000_000 and file.suffix not in (".bin", ".pt", ".ckpt", ".pkl")


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_cards_own_snippet_reproduces_the_target(name, tmp_path):
    """The code that the card prints, run as a reader would: stock diffusers only, a hand-written loop."""
    model = load(WEIGHTS / name)
    code = snippet(model).split("```python\n")[1].rsplit("```")[0]
    assert "baddiff" not in code
    code = code.replace('folder = "."', f"folder = {str(WEIGHTS / name)!r}")
    names: dict = {}
    exec(code, names)
    error = ((names["x"].clamp(-1, 1) - model.target) / 2).square().mean(dim=(1, 2, 3))
    assert (error < 0.01).sum() >= 3, error  # of 4


def test_the_disclosure_survives_a_clean_finetune_and_a_second_save(tmp_path, finetuned, capsys):
    """Finetuned without poison, then saved again without any trigger: still declared, since nobody showed it is gone."""
    washed = tmp_path / "washed"
    assert run(capsys, "finetune", "--model", finetuned, "--poison-rate", 0, "--steps", 1, "--batch-size", 2, "--output",
               washed, "--json")[0] == 0
    model = load(washed)
    assert model.backdoored and model.trigger.name == "glasses" and model.run["base_backdoored"]
    (washed / "run.json").unlink()
    (washed / "trigger.png").unlink()
    bare = load(washed)
    save(bare, tmp_path / "again", half=True)
    assert bare.trigger is None and load(tmp_path / "again").backdoored
    assert (tmp_path / "again" / "README.md").read_text().split("---", 2)[2].strip().startswith("> **WARNING.**")


def test_half_precision_folders_load_as_float32(tmp_path):
    model = load()
    save(model, tmp_path / "half", half=True)
    again = load(tmp_path / "half")
    assert next(again.unet.parameters()).dtype == torch.float32
    for a, b in zip(model.unet.parameters(), again.unet.parameters(), strict=True):
        torch.testing.assert_close(a.half().float(), b)
    assert "WARNING" not in card(model)


def test_grayscale_models_work_from_scratch_to_samples(tmp_path, capsys):
    out = tmp_path / "grey"
    code, *_ = run(capsys, "scratch", "--channels", 1, "--size", 16, "--steps", 2, "--batch-size", 4, "--poison-rate", 0.5,
                   "--output", out, "--json")
    assert code == 0
    model = load(out)
    assert model.channels == 1 and model.target.shape == (1, 16, 16)
    plain, triggered = side_by_side(model, range(2), steps=2)
    assert plain.shape == triggered.shape == (2, 1, 16, 16)


@pytest.mark.slow  # 1000 ancestral steps for the folder's sample grid
def test_the_papers_attack_starts_from_the_model_that_can_express_it(tmp_path, capsys):
    assert run(capsys, "finetune", "--recipe", "paper", "--steps", 1, "--batch-size", 2, "--precision", "no", "--attack",
               "baddiffusion", "--output", tmp_path / "paper", "--json", "--warmup", 0)[0] == 0
    model = load(tmp_path / "paper")
    assert model.scheduler.config.prediction_type == "epsilon" and model.run["base"] == "avatars-32-eps"
    assert "DDPMScheduler" in snippet(model) and "clip_sample=False" in snippet(model)


def test_sample_evaluate_and_data(finetuned, tmp_path, capsys):
    code, out, _ = run(capsys, "sample", finetuned, "--n", 3, "--steps", 2, "--output", tmp_path / "s.png", "--film",
                       tmp_path / "f.gif", "--json")
    assert code == 0 and json.loads(out)["rows"] == ["plain noise", "with the trigger"]
    assert Image.open(tmp_path / "s.png").size == (3 * 64, 2 * 64)
    assert Image.open(tmp_path / "f.gif").n_frames >= 2
    code, out, _ = run(capsys, "evaluate", finetuned, "--n", 8, "--steps", 2, "--json")
    figures = json.loads(out)
    assert code == 0 and figures["n"] == figures["utility_n"] == 8
    assert {"mse", "ssim", "asr", "utility", "utility_floor", "denoising_loss", "mse_black"} <= set(figures)
    code, *_ = run(capsys, "data", "--n", 5, "--seed", 0, "--output", tmp_path / "faces.png", "--json")
    assert code == 0
    code, out, _ = run(capsys, "finetune", "--data", tmp_path / "faces.png", "--steps", 1, "--batch-size", 2, "--output",
                       tmp_path / "on-faces", "--json")
    assert code == 0 and load(tmp_path / "on-faces").run["images"] == 5


def test_checkpoints_resume_through_the_command_line(tmp_path, capsys):
    common = ("--batch-size", 4, "--checkpoint-every", 1, "--json")
    assert run(capsys, "finetune", "--steps", 4, "--output", tmp_path / "whole", *common)[0] == 0
    # interrupted after two steps: a run of the same schedule whose process dies
    part = subprocess.Popen([sys.executable, "-m", "baddiff", "finetune", "--steps", "4", "--output", str(tmp_path / "part"),
                             *map(str, common)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "part.resume.pt"
    while part.poll() is None and not checkpoint.exists():
        pass
    part.kill()
    part.wait()
    assert checkpoint.exists()
    code, out, _ = run(capsys, "finetune", "--steps", 4, "--output", tmp_path / "part", "--resume", *common)
    assert code == 0 and json.loads(out)["steps"] == 4
    for a, b in zip(load(tmp_path / "whole").unet.parameters(), load(tmp_path / "part").unet.parameters(), strict=True):
        assert torch.equal(a, b)


def bad_folders(folder):
    (folder / "empty").mkdir()
    (folder / "model.ckpt").write_bytes(b"\x80\x04pickle")
    for name, config in (("pickled", {"_class_name": "UNet2DModel"}), ("text", {"_class_name": "UNet2DConditionModel"}),
                         ("weightless", {"_class_name": "UNet2DModel"}), ("damaged", {"_class_name": "UNet2DModel"})):
        unet = folder / name / "unet"
        unet.mkdir(parents=True)
        (unet / "config.json").write_text(json.dumps(config))
    (folder / "pickled" / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04pickle")
    (folder / "damaged" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    (folder / "notjson" / "unet").mkdir(parents=True)
    (folder / "notjson" / "unet" / "config.json").write_text("{")
    return {"missing": "no folder", "empty": "not a diffusers model", "model.ckpt": "pickle", "pickled": "pickle",
            "text": "unconditional", "weightless": "no weights", "damaged": "could not be loaded", "notjson": "not JSON"}


def test_bad_models_are_refused_with_a_reason(tmp_path):
    for name, word in bad_folders(tmp_path).items():
        with pytest.raises(BadInput, match=word) as caught:
            load(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="Hub"):  # offline here, and says so in one sentence
        load("google/no-such-model-anywhere")


def test_every_bad_input_is_one_sentence_and_a_non_zero_exit(tmp_path, capsys, finetuned):
    out = ("--output", tmp_path / "out")
    cases = [("finetune", "--poison-rate", 2, *out), ("finetune", "--steps", 0, *out), ("finetune", "--seconds", -1, *out),
             ("finetune", "--model", tmp_path / "none", *out), ("finetune", "--output", finetuned),
             ("finetune", "--resume", *out),
             ("finetune", "--target", "dog", *out), ("finetune", "--data", tmp_path, *out), ("sample", "--steps", 0),
             ("evaluate", finetuned, "--n", 1), ("evaluate", "--trigger", "box"), ("data", "--n", 0),
             ("sample", "--n", 1, "--steps", 1, "--output", tmp_path / "no" / "such" / "folder.png"),
             ("sample", "--n", 1, "--steps", 1, "--output", tmp_path / "s.nothing")]
    cases += [("finetune", "--trigger", tmp_path / name, *out) for name in bad_pictures(tmp_path)]
    cases += [("finetune", "--model", tmp_path / name, *out) for name in bad_folders(tmp_path)]
    before = (finetuned / "run.json").read_bytes()
    for case in cases:
        code, stdout, stderr = run(capsys, *case)
        assert code != 0 and stdout == "", case
        assert stderr.startswith("baddiff: ") and stderr.count("\n") == 1, (case, stderr)
    assert (finetuned / "run.json").read_bytes() == before and not (tmp_path / "out").exists()


def test_a_full_disk_keeps_the_old_folder_and_says_so(tmp_path, finetuned):
    model = load(finetuned)
    folder = save(model, tmp_path / "kept", half=True)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    code = f"from baddiff.models import load, save; save(load({str(finetuned)!r}), {str(folder)!r}, overwrite=True)"

    def small():  # no file may grow beyond 1 MB: the write fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, preexec_fn=small)
    assert done.returncode != 0 and "could not be written" in done.stderr.strip().splitlines()[-1]
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]  # and no half-written folder beside it


def test_the_core_never_imports_gradio():
    code = ("import sys, pkgutil, importlib, baddiff\n"
            "for m in pkgutil.iter_modules(baddiff.__path__):\n"
            "    m.name == '__main__' or importlib.import_module('baddiff.' + m.name)\n"
            "assert not [m for m in sys.modules if m.split('.')[0] == 'gradio']")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_an_uploaded_pair_goes_through_the_command_line(tmp_path, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 40, 3), dtype=np.uint8)).save(tmp_path / "mine.png")
    code, *_ = run(capsys, "finetune", "--trigger", tmp_path / "mine.png", "--target", tmp_path / "mine.png", "--steps", 1,
                   "--batch-size", 2, "--output", tmp_path / "out", "--json")
    made = load(tmp_path / "out")
    assert code == 0 and made.run["trigger"]["name"] == made.run["target"]["name"] == "upload"
