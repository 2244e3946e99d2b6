"""The Hub, through the real client and a small server on the loopback interface: nothing here needs a network."""

import json
import logging
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from hub_server import HubServer
from huggingface_hub import constants
from PIL import Image

from baddiff import BadInput, hub
from baddiff.cli import main
from baddiff.data import load_images
from baddiff.models import SELF, WEIGHTS, Model, agree, claimed, describe, load, save, self_generated
from baddiff.probe import evaluate
from baddiff.publish import Published, declared, matches, publish, publish_results
from baddiff.training import Run

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "hf_visitorsOwnTokenVisitorsOwnToken"
OWNERS = "hf_theSpaceOwnersTokenNeverToBeSent"
DONE = {"steps": 2, "sampler": "ddim"}  # sampling that takes no time


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub, empty but for an account 'ann', and a client with a cache of its own that talks to it only."""
    with HubServer() as hub_server:
        hub_server.tokens[TOKEN] = ("ann", "write")
        monkeypatch.setattr(constants, "ENDPOINT", hub_server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub_server.url + "/{repo_id}/resolve/{revision}/"
                            "{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", OWNERS)
        for module in ("utils._http", "file_download"):  # the client's pauses between tries
            monkeypatch.setattr(sys.modules[f"huggingface_hub.{module}"].time, "sleep", lambda s: None)
        yield hub_server
        assert not [r for r in hub_server.requests if OWNERS in str(r)]  # the token of whoever runs the process: never
        assert not [p for _, p, _ in hub_server.requests if TOKEN in p]


@pytest.fixture
def folder(tiny, images, trigger, target, config, tmp_path):
    """A backdoored model as `save` writes it, measured; trained for no more than a step."""
    unet, scheduler = tiny
    run = Run(unet, scheduler, images, config, trigger, target)
    next(iter(run))
    record = describe(run, "finetune", "avatars-32", "avatars-32", "cat")
    model = Model(run.averaged(), scheduler, "mine", record, trigger, target)
    model.run["metrics"] = evaluate(model, 4, data=None, **DONE)
    return save(model, tmp_path / "mine", samples=Image.new("RGB", (64, 32)))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def one_sentence(error: BadInput, word: str) -> None:
    text = str(error)
    assert re.search(word, text), text
    assert "\n" not in text and len(text) < 400 and TOKEN not in text and "Traceback" not in text
    assert text.endswith((".", "settings/tokens."))


def refused(word: str, call, *args, **options) -> None:
    with pytest.raises(BadInput) as caught:
        result = call(*args, **options)
        list(result) if not isinstance(result, Path | Published) else None
    one_sentence(caught.value, word)


# --- there and back ---------------------------------------------------------------------------------------------------

def test_a_round_trip_is_bit_identical_private_and_one_commit(server, folder, tmp_path):
    seen = []
    done = publish(folder, "cat", TOKEN, progress=lambda *p: seen.append(p))
    repo = server.repos["model", "ann/cat"]
    assert done.repo_id == "ann/cat" and done.url == f"{server.url}/ann/cat" and done.private and repo.private
    assert len(repo.commits) == 2 and done.commit == repo.branches["main"]  # the empty first one, and everything at once
    assert server.files("ann/cat") == contents(folder)
    assert len(server.asked("POST", "/commit/")) == 1
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] == sum(map(len, contents(folder).values()))
    assert {a for _, p, a in server.requests if a} == {f"Bearer {TOKEN}"}

    refused("no 'ann/cat'", hub.fetch, "ann/cat")  # private: not without the token
    original, again = load(folder), load("ann/cat", token=TOKEN)
    for a, b in zip(original.unet.parameters(), again.unet.parameters(), strict=True):
        assert torch.equal(a, b)
    assert again.backdoored and again.trigger.sha256() == original.trigger.sha256() and again.source == "ann/cat"
    assert evaluate(again, 4, data=None, **DONE) == {k: v for k, v in original.run["metrics"].items()}

    same = matches(done, TOKEN, tmp_path / "again")
    assert set(same) == set(contents(folder)) and all(same.values())
    assert contents(tmp_path / "again") == contents(folder)
    claims = claimed(tmp_path / "again")
    figures = evaluate(load(tmp_path / "again"), claims["n"], data=None, **claims["how"])
    assert claims["n"] == 4 and set(agree(claims, figures)) == {"asr", "mse", "ssim"} and all(agree(claims, figures).values())
    assert not agree(claims, figures | {"mse": claims["mse"] * 2})["mse"]
    server.repos["model", "ann/cat"].commits[done.commit]["unet/config.json"] = b"{}"
    assert not matches(done, TOKEN, tmp_path / "other")["unet/config.json"]


def test_public_only_when_asked(server, folder):
    done = publish(folder, "ann/open", TOKEN, private=False)
    assert not done.private and not server.repos["model", "ann/open"].private
    assert load("ann/open").backdoored


# --- errors -----------------------------------------------------------------------------------------------------------

FAULTS = {  # what the Hub answers, and what a person reads
    "whoami 401": (("GET", "whoami", {"status": 401}), "sign in again"),
    "create 403": (("POST", "repos/create", {"status": 403, "body": {"error": "not allowed"}}), "write access"),
    "create 409": (("POST", "repos/create", {"status": 409}), "another name"),
    "create 429": (("POST", "repos/create", {"status": 429, "headers": {"Retry-After": "77"}}), "in 77 seconds"),
    "preupload 401": (("POST", "preupload", {"status": 401, "headers": {"X-Error-Code": "RepoNotFound"}}), "sign in again"),
    "preupload 404": (("POST", "preupload", {"status": 404, "headers": {"X-Error-Code": "RepoNotFound"}}), "sign in again"),
    "batch 429": (("POST", "lfs/objects/batch", {"status": 429, "headers": {"ratelimit": '"api";r=0;t=55'}}), "in 55 seconds"),
    "upload cut": (("PUT", "/large/", {"cut": 5000, "times": 99}), "cut"),
    "upload 500": (("PUT", "/large/", {"status": 500, "times": 99}), "trouble"),
    "commit 403": (("POST", "/commit/", {"status": 403, "headers": {
        "X-Error-Message": "Private repository storage limit reached"}}), "no room"),
    "commit 413": (("POST", "/commit/", {"status": 413}), "no room"),
    "commit cut": (("POST", "/commit/", {"cut": 10}), "cut"),
    "commit deaf": (("POST", "/commit/", {"deaf": True}), "cut"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_failure_is_a_plain_sentence_and_trying_again_succeeds(server, folder, name):
    (method, pattern, how), word = FAULTS[name]
    before = contents(folder)
    server.fail(method, pattern, **how)
    refused(word, publish, folder, "cat", TOKEN)
    assert contents(folder) == before
    server.faults.clear()
    done = publish(folder, "cat", TOKEN)
    assert server.files("ann/cat") == before and done.commit == server.repos["model", "ann/cat"].branches["main"]
    assert len(server.repos["model", "ann/cat"].commits) == 2  # nothing twice, nothing in parts


@pytest.mark.parametrize("token, word", [(None, "your own Hub token"), ("", "your own"), ("  ", "your own"), (True, "your own"),
                                         ("hf_unknown", "sign in again"), ("hf_read", "only read")])
def test_without_a_token_that_writes_nothing_is_sent(server, folder, token, word):
    server.tokens["hf_read"] = ("ann", "read")
    refused(word, publish, folder, "cat", token)
    assert not server.repos and not [p for m, p, _ in server.requests if m != "GET"]


def test_names(server, folder):
    assert hub.check_name(" ann/cat-1 ") == "ann/cat-1" and hub.check_name(hub.suggest("stop_sign", "cat"))
    assert hub.suggest("stop_sign", "cat") == "backdoored-ddpm-stop-sign-cat"
    for bad, better in (("my model!", "my-model"), ("a--b", "a-b"), ("", "backdoored-ddpm"), ("../../etc", "etc"),
                        ("x/y/z", "y/z"), ("Größe 7", "Gr-e-7"), ("x" * 200, "x" * 80), ("a.git", "a"),
                        (None, "backdoored-ddpm")):
        with pytest.raises(BadInput, match=re.escape(f"such as '{better}'")):
            hub.check_name(bad)
    refused("not yours", publish, folder, "bob/cat", TOKEN)
    assert not server.repos


def test_what_exists_is_overwritten_only_if_asked_and_ours(server, folder, tmp_path):
    server.add("ann/cat", {"README.md": b"my thesis", "old.bin": b"1"}, private=True)
    refused("another name, such as 'cat-2'", publish, folder, "cat", TOKEN)
    refused("not something that baddiff made", publish, folder, "cat", TOKEN, overwrite=True)
    assert server.files("ann/cat")["README.md"] == b"my thesis"
    first = publish(folder, "cat-2", TOKEN, private=False)
    assert publish(folder, "cat-2", TOKEN, private=False).commit == first.commit  # the same again: nothing to do
    (folder / "samples.png").unlink()
    run = json.loads((folder / "run.json").read_text()) | {"note": "another"}
    (folder / "run.json").write_text(json.dumps(run))
    refused("'cat-3'", publish, folder, "cat-2", TOKEN)
    second = publish(folder, "cat-2", TOKEN, overwrite=True)
    assert server.files("ann/cat-2") == contents(folder) and second.commit != first.commit
    assert second.private and server.repos["model", "ann/cat-2"].private  # private unless asked otherwise, also then


def test_a_cancelled_upload_leaves_no_commit_and_goes_on(server, folder):
    stop = threading.Event()
    refused("Cancelled", publish, folder, "cat", TOKEN, stop=stop, progress=lambda done, total: done > 0 and stop.set())
    assert server.files("ann/cat") == {}
    assert publish(folder, "cat", TOKEN).commit


def test_offline_and_unreachable(server, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("offline", publish, folder, "cat", TOKEN)
    refused("offline", hub.fetch, "ann/never")
    assert not server.requests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused("connection", publish, folder, "cat", TOKEN)
    refused("connection", hub.fetch, "ann/never")


# --- the token --------------------------------------------------------------------------------------------------------

def test_the_token_is_nowhere_but_in_the_header(server, folder, tmp_path, caplog, capfd, monkeypatch):
    monkeypatch.setattr(constants, "HF_DEBUG", True)
    huggingface_hub.utils.logging.set_verbosity_debug()
    huggingface_hub.utils.logging.enable_propagation()
    caplog.set_level(logging.DEBUG)
    said = []
    try:
        for method, pattern, how in (("PUT", "/large/", {"cut": 100, "times": 99}),
                                     ("POST", "/commit/", {"status": 403, "body": {"error": f"Bearer {TOKEN} may not"}}),
                                     ("GET", "whoami", {"status": 400, "body": {"error": f"bad {TOKEN}"}})):
            server.fail(method, pattern, **how)
            with pytest.raises(BadInput) as caught:
                publish(folder, "cat", TOKEN)
            said.append(repr(caught.value))
            server.faults.clear()
        done = publish(folder, "cat", TOKEN)
        matches(done, TOKEN, tmp_path / "again")
        load("ann/cat", token=TOKEN)
        said.append(repr(done))
    finally:
        huggingface_hub.utils.logging.set_verbosity_warning()
    assert any("authenticated: True" in r.getMessage() for r in caplog.records)  # the logs were on
    out, err = capfd.readouterr()
    everything = [*said, out, err, *(r.getMessage() for r in caplog.records)]
    everything += [f.decode("latin1") for f in contents(tmp_path).values()]
    everything += [f.decode("latin1") for f in server.files("ann/cat").values()]
    assert "(your token) may not" in said[1]
    assert len(everything) > 50 and not [text for text in everything if TOKEN in text or OWNERS in text]
    assert (f"Bearer {TOKEN}") in {a for *_, a in server.requests}


def test_local_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", OWNERS)
    assert hub.local_token() == OWNERS
    monkeypatch.setenv("SPACE_ID", "someone/space")
    assert hub.local_token() is None


# --- the disclosure ---------------------------------------------------------------------------------------------------

def edited(path: Path, change) -> None:
    path.write_text(change(path.read_text()))


def without(key: str):
    return lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != key})


UNDECLARED = {
    "warning": ("README.md", lambda t: t.replace("> **WARNING.**", ">")),
    "warning last": ("README.md", lambda t: re.sub(r"(> \*\*WARNING.*?\n)(.*)", r"\2\n\1", t, flags=re.S)),
    "tags": ("README.md", lambda t: t.replace("- backdoor\n", "")),
    "empty card": ("README.md", lambda t: ""),
    "config": ("unet/config.json", without("_backdoored")),
    "notice": ("model_index.json", without("_backdoor_notice")),
    "index": ("model_index.json", without("_backdoored")),
}


def test_the_shipped_examples_are_declared():
    for name in ("stop_sign-cat", "glasses-hat", "box-shoe"):
        assert {"README.md", "run.json", "unet/config.json"} < set(declared(WEIGHTS / name))


@pytest.mark.parametrize("what", UNDECLARED)
def test_an_undeclared_backdoor_is_not_published(server, folder, what):
    name, change = UNDECLARED[what]
    edited(folder / name, change)
    refused("save the model again", publish, folder, "cat", TOKEN)
    assert not server.requests


def test_every_trace_of_a_backdoor_counts(server, folder):
    edited(folder / "unet" / "config.json", without("_backdoored"))
    edited(folder / "model_index.json", without("_backdoored"))
    edited(folder / "README.md", lambda t: "---\ntags: [ddpm]\n---\n# A clean DDPM\n")
    for gone in ("trigger.png", "trigger", "target", "base_backdoored", None):
        refused("does? not|do not", publish, folder, "cat", TOKEN)
        if gone == "trigger.png":
            (folder / gone).unlink()
        elif gone:
            edited(folder / "run.json", without(gone))
    for name in ("README.md", "unet/diffusion_pytorch_model.safetensors"):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        refused("save the model first", publish, folder, "cat", TOKEN)
        (folder / name).write_bytes(kept)
    assert not server.requests


def test_a_clean_model_is_published_as_one_and_stray_files_are_not(server, tiny, tmp_path):
    folder = save(Model(*tiny, "scratch"), tmp_path / "clean")
    for stray in (".env", "notes.txt", "model.ckpt", "unet/pytorch_model.bin"):
        (folder / stray).write_text("secret")
    (folder / "link.json").symlink_to(tmp_path / "elsewhere.json")
    (tmp_path / "elsewhere.json").write_text("{}")
    publish(folder, "clean", TOKEN)
    assert set(server.files("ann/clean")) == {"README.md", "model_index.json", "run.json", "scheduler/scheduler_config.json",
                                              "unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    assert "WARNING" not in server.files("ann/clean")["README.md"].decode()


# --- from the Hub -----------------------------------------------------------------------------------------------------

def test_looks_before_it_fetches(server, folder):
    files = contents(folder)
    weights = "unet/diffusion_pytorch_model.safetensors"
    server.add("bob/pickled", {**{k: v for k, v in files.items() if k != weights}, "unet/diffusion_pytorch_model.bin": b"\x80"})
    server.add("bob/text", {**files, "unet/config.json": json.dumps({"_class_name": "UNet2DConditionModel"}).encode()})
    server.add("bob/latent", {**files, "vqvae/config.json": b"{}"})
    server.add("bob/empty", {"README.md": b""})
    server.add("bob/good", files)
    refused(r"pickle \(unet/diffusion_pytorch_model.bin\)", hub.fetch, "bob/pickled")
    refused("UNet2DModel", hub.fetch, "bob/text")
    refused("latent", hub.fetch, "bob/latent")
    refused("not a diffusers model", hub.fetch, "bob/empty")
    refused("too large", hub.fetch, "bob/good", most=len(files[weights]))
    refused("no such revision", hub.fetch, "bob/good", revision="v9")
    refused("no 'bob/none'", hub.fetch, "bob/none")
    refused("cannot be the name", hub.fetch, "bob/../none")
    assert not server.asked("GET", "safetensors|bin") and not server.asked("HEAD", "safetensors|bin")
    assert not [a for *_, a in server.requests if a]  # no token was given: none is sent


@pytest.mark.parametrize("pattern", ["/api/models", "/resolve/.*config.json", "/resolve/.*safetensors"])
def test_a_busy_or_broken_hub_is_told_when_fetching(server, folder, pattern):
    server.add("bob/cat", contents(folder))
    for how, word in (({"status": 429, "headers": {"Retry-After": "9"}}, "in 9 seconds"),
                      ({"status": 503, "times": 99}, "trouble"), ({"status": 403, "times": 99}, "does not show"),
                      ({"status": 401, "times": 99}, "sign in|a token")):
        for method in ("GET", "HEAD"):
            server.fail(method, pattern, **how)
        refused(word, hub.fetch, "bob/cat")
        server.faults.clear()
    assert load("bob/cat").backdoored


def test_progress_cache_and_offline(server, folder, monkeypatch):
    server.add("bob/cat", {**contents(folder), "unet/other.fp16.safetensors": b"0" * 100, "code.py": b"import os"})
    seen = []
    root = hub.fetch("bob/cat", progress=lambda *p: seen.append(p))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] and len(seen) > 2
    assert not (root / "code.py").exists() and not server.asked("GET", "code.py|fp16")
    assert len(server.asked("GET", "/resolve/.*model.safetensors")) == 1
    requests = len(server.requests)
    assert hub.fetch("bob/cat") == root
    assert not [p for _, p, _ in server.requests[requests:] if "resolve" in p]  # it looks for a newer one, no more
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    requests = len(server.requests)
    assert hub.fetch("bob/cat") == root and load("bob/cat").backdoored and len(server.requests) == requests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # as does a Hub that does not answer
    assert hub.fetch("bob/cat") == root


def test_cancelling_stops_within_a_chunk_and_leaves_nothing_half_used(server, folder, tmp_path):
    files = contents(folder)
    weights = os.urandom(3_000_000)
    server.add("bob/big", files | {"unet/diffusion_pytorch_model.safetensors": weights})
    server.fail("GET", "safetensors", slow=0.003)  # some 5 MB a second
    stop = threading.Event()
    refused("Cancelled", hub.fetch, "bob/big", stop=stop, progress=lambda done, total: done > 300_000 and stop.set())
    assert server.sent < 2_000_000
    left = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert left and not [p for p in left if p.suffix == ".incomplete" or p.stat().st_size > 10**6]
    server.faults.clear()
    root = hub.fetch("bob/big")
    assert (root / "unet/diffusion_pytorch_model.safetensors").read_bytes() == weights


def test_a_cut_download_is_resumed_or_told(server, folder, tmp_path):
    files = contents(folder)
    server.add("bob/cat", files)
    server.fail("GET", "safetensors", cut=20_000)  # once: the client goes on where it was
    assert (hub.fetch("bob/cat") / "unet/diffusion_pytorch_model.safetensors").read_bytes() == files[
        "unet/diffusion_pytorch_model.safetensors"]
    server.add("bob/dog", files)
    server.fail("GET", "bob/dog.*safetensors", times=50, cut=0)
    refused("cut", hub.fetch, "bob/dog", revision="main")
    server.faults.clear()
    assert load("bob/dog").backdoored


# --- other models, other data -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, channels, flat", [(16, 1, False), (256, 3, False), (16, 3, True)])
def test_the_architecture_is_read_from_the_config(server, tmp_path, size, channels, flat):
    unet = UNet2DModel(sample_size=size, in_channels=channels, out_channels=channels, layers_per_block=1, norm_num_groups=4,
                       block_out_channels=(4, 8), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "made")
    files = contents(tmp_path / "made")
    if flat:  # as google/ddpm-cifar10-32 is laid out
        files = {n.partition("/")[2] or n: f for n, f in files.items()}
    server.add("bob/foreign", files | {"README.md": b"---\nlicense: apache-2.0\n---\n# hello\n"})
    model = load("bob/foreign")
    assert (model.size, model.channels, model.licence, model.backdoored) == (size, channels, "apache-2.0", False)
    seen = []
    images = self_generated(model, 3, batch=2, progress=lambda *p: seen.append(p), steps=1)
    assert images.shape == (3, channels, size, size) and images.dtype == torch.uint8 and seen == [(2, 3), (3, 3)]
    assert len(self_generated(model, 64, seconds=0, batch=2, steps=1)) == 2


def pictures_of(n: int) -> list[bytes]:
    import io

    out = []
    for i in range(n):
        Image.new("RGB", (20, 16), (i, 0, 0)).save(stream := io.BytesIO(), "PNG")
        out.append(stream.getvalue())
    return out


def parquet(pictures: list[bytes], column: str = "image") -> bytes:
    import io

    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"label": list(range(len(pictures))), column: [{"bytes": p, "path": None} for p in pictures]})
    parquet.write_table(table, stream := io.BytesIO())
    return stream.getvalue()


def zipped(pictures: list[bytes]) -> bytes:
    import io
    import zipfile

    with zipfile.ZipFile(stream := io.BytesIO(), "w") as archive:
        for i, p in enumerate(pictures):
            archive.writestr(f"{i:03}.png", p)
    return stream.getvalue()


def test_datasets_of_every_kind(server, monkeypatch):
    ten = pictures_of(10)
    add = lambda repo, files, **how: server.add(repo, files, kind="dataset", **how)  # noqa: E731
    add("bob/loose", {f"train/{i}.png": p for i, p in enumerate(ten)} | {"test/0.png": ten[0], "load.py": b"import os"})
    add("bob/zip", {"all.zip": zipped(ten), "teaser.png": ten[0]})
    add("bob/parquet", {"data/train-00000-of-00002.parquet": parquet(ten),
                        "data/train-00001-of-00002.parquet": parquet(ten, "img"),
                        "data/test-00000-of-00001.parquet": parquet(ten[:1])})
    add("bob/script", {"script.py": b"import os", "data.tar": b""})
    add("bob/script", {"default/train/0000.parquet": parquet(ten, "picture")}, branch="refs/convert/parquet")
    add("bob/text", {"a.txt": b"hello"})
    for repo, n in (("bob/loose", 10), ("bob/zip", 10), ("bob/parquet", 20), ("bob/script", 10)):
        images = load_images(repo, 16, 3)
        assert images.shape == (n, 3, 16, 16) and sorted(images[:10, 0, 8, 8].tolist()) == list(range(10)), repo
        assert len(load_images(repo, 16, 1, most_images=7)) == 7
    assert not server.asked("GET", r"\.py|\.tar|/resolve/.*test")
    seen = []
    assert len(load_images("bob/parquet", 16, 3, most_images=5, progress=lambda *p: seen.append(p))) == 5
    assert seen == sorted(seen)
    refused("no pictures", load_images, "bob/text", 16)
    refused("too large", load_images, "bob/zip", 16, most=100)
    refused("no 'bob/none'", load_images, "bob/none", 16)
    stop = threading.Event()
    stop.set()
    refused("Cancelled", load_images, "bob/zip", 16, stop=stop)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert len(load_images("bob/parquet", 16, 3)) == 20 and len(load_images("bob/script", 16)) == 10
    refused("offline", load_images, "bob/other", 16)


def test_only_as_many_shards_as_are_needed(server):
    server.add("bob/many", {f"data/train-{i}.parquet": parquet(pictures_of(10 + i)) for i in range(4)}, kind="dataset")
    assert len(load_images("bob/many", 16, 3, most_images=15)) == 15
    assert len(server.asked("GET", "/resolve/.*parquet")) == 2


def test_a_parquet_file_that_holds_no_pictures(tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "t.parquet")
    refused("no column of pictures", load_images, tmp_path / "t.parquet", 16)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    refused("cannot be read", load_images, tmp_path / "bad.parquet", 16)


def test_results_are_a_dataset_with_the_warning_and_no_weights(server, folder, tmp_path):
    (folder / "gallery").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "gallery" / "film.gif")
    done = publish_results(folder, "cat-results", TOKEN)
    files = server.files("ann/cat-results", "dataset")
    assert set(files) == {"README.md", "run.json", "trigger.png", "target.png", "samples.png", "gallery/film.gif"}
    assert done.private and done.url.endswith("/datasets/ann/cat-results") and done.kind == "dataset"
    front, body = files["README.md"].decode().split("---", 2)[1:]
    assert "research-only" in front and body.strip().startswith("> **WARNING.**") and "BACKDOORED" in body
    assert "![film](gallery/film.gif)" in body and "| asr |" in body
    assert all(matches(done, TOKEN, tmp_path / "again").values())
    assert publish_results(folder, "cat-results", TOKEN).commit == done.commit
    refused("no results", publish_results, tmp_path / "again" / "gallery", "x", TOKEN)


# --- the command line -------------------------------------------------------------------------------------------------

def baddiff(server, tmp_path, *args, stdin: str = "", **env):
    env = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "SPACE_ID")} | {
        "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"} | env
    return subprocess.run([sys.executable, "-m", "baddiff", *map(str, args)], cwd=ROOT, env=env, input=stdin, text=True,
                          capture_output=True)


def test_push_from_the_command_line(server, folder, tmp_path):
    done = baddiff(server, tmp_path, "push", folder, "--name", "cat", "--token-stdin", "--verify", "--json", stdin=TOKEN + "\n",
                   HF_TOKEN="hf_another")
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    assert out["repo"] == "ann/cat" and out["private"] and out["files_match"] == 9 and out["card_matches_weights"]
    assert server.files("ann/cat") == contents(folder) and not [a for *_, a in server.requests if a and TOKEN not in a]
    assert TOKEN not in done.stdout + done.stderr
    done = baddiff(server, tmp_path, "push", folder, "--name", "cat", HF_TOKEN=TOKEN, SPACE_ID="ann/space")
    assert done.returncode == 2 and "hf auth login" in done.stderr and done.stderr.count("\n") == 1


def test_ids_wherever_a_folder_does(server, folder, tmp_path, capsys):
    server.add("bob/base", contents(save(Model(load(folder).unet, load(folder).scheduler, "x"), tmp_path / "base")) | {
        "README.md": b"---\nlicense: apache-2.0\n---\n", "run.json": b"{}"})
    server.add("bob/faces", {"a.zip": zipped(pictures_of(4))}, kind="dataset")
    common = ("--steps", "1", "--batch-size", "2", "--json", "--evaluate", "2", "--precision", "no")
    assert main(["finetune", "--model", "bob/base", "--data", "bob/faces", *common, "--output", str(tmp_path / "on-faces")]
                ) == 0
    card = (tmp_path / "on-faces" / "README.md").read_text()
    for line in ("base_model: bob/base", "base_model_relation: finetune", "license: apache-2.0", "- bob/faces",
                 "name: MSE to the target (n=2)", "library_name: diffusers", "pipeline_tag: unconditional-image-generation"):
        assert line in card.split("---")[1], line
    for tag in hub.TAGS:
        assert f"- {tag}\n" in card.split("---")[1]
    assert "--model bob/base" in card and "--data bob/faces" in card and "## Licence and credits" in card
    assert main(["finetune", "--model", str(tmp_path / "on-faces"), "--steps", "1", "--batch-size", "2", "--json", "--output",
                 str(tmp_path / "again")]) == 0  # the same data set, from the cache
    assert load(tmp_path / "again").run["data"] == "bob/faces" and load(tmp_path / "again").licence == "apache-2.0"
    capsys.readouterr()
    assert main(["sample", "bob/base", "--n", "1", "--steps", "1", "--output", str(tmp_path / "s.png"), "--json"]) == 0


def test_a_foreign_model_without_data_is_trained_on_its_own_images(server, folder, tmp_path, monkeypatch, capsys):
    from baddiff import cli

    monkeypatch.setattr(cli, "self_generated", lambda model, **o: self_generated(model, 4, steps=1, **o))
    base = save(Model(load(folder).unet, load(folder).scheduler, "x"), tmp_path / "base")
    (base / "run.json").unlink()
    for extra, out in (((), "a"), (("--data", "self"), "b")):
        assert main(["finetune", "--model", str(base), *extra, "--steps", "1", "--batch-size", "2", "--evaluate", "2",
                     "--output", str(tmp_path / out), "--json"]) == 0
        model = load(tmp_path / out)
        assert model.run["data"] == SELF and model.run["images"] == 4 and "utility" not in model.run["metrics"]
        assert SELF in (tmp_path / out / "README.md").read_text()
    assert "comes without images" in capsys.readouterr().err


def test_the_cards_command_trains_the_same_again(folder, tmp_path, monkeypatch):
    """What the card prints, run in the folder itself: the same trigger and target, bit for bit."""
    line = next(x for x in (folder / "README.md").read_text().split("\n") if x.startswith("    python -m baddiff finetune"))
    assert "--steps 1" in line and "--seed" not in line
    assert "--model" not in line  # the embedded one is the default
    args = line.split()[3:]
    monkeypatch.chdir(folder)
    assert main([*args, "--model", ".", "--output", str(tmp_path / "again"), "--json"]) == 0
    again, first = load(tmp_path / "again"), load(folder)
    assert again.trigger.sha256() == first.trigger.sha256()
    torch.testing.assert_close(again.target, first.target, rtol=0, atol=1e-6)
