"""To the Hugging Face Hub: a model's folder, or the results of one, into the visitor's own account.

What is published is checked on disk first: a folder that says of itself that it is backdoored must say so in its card, its
configs and its tags, whoever wrote it. Card and weights go in one commit, so undeclared weights never exist there.
"""

import hashlib
import io
import json
import re
import shutil
import tempfile
import threading
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCardData, HfApi, ModelCard
from huggingface_hub.utils.sha import git_hash

from . import BadInput
from .hub import TAGS, Meter, Progress, api_of, check_name, plainly, visitor


@dataclass(frozen=True)
class Published:
    repo_id: str
    url: str
    commit: str
    private: bool
    kind: str = "model"  # or "dataset"
    files: dict[str, str] = field(default_factory=dict, repr=False)  # path -> sha256 of what was sent


class _Reader(io.BufferedReader):
    """A file that tells a meter how far it was read, once it is being sent."""

    meter: Meter | None = None

    def read(self, n=-1):
        data = super().read(n)
        if self.meter:
            self.meter.at(self, self.tell())
        return data


def _json(data: bytes | None, name: str) -> dict:
    try:
        if isinstance(value := json.loads(data or b"{}"), dict):
            return value
    except ValueError:
        pass
    raise BadInput(f"{name} in that folder cannot be read: save the model again.")


def _is_backdoored(run: dict, *configs: dict) -> bool:
    config = run.get("config") if isinstance(run.get("config"), dict) else {}
    return any(c.get("_backdoored") for c in configs) or bool(
        run.get("trigger") or run.get("target") or run.get("base_backdoored") or config.get("poison_rate"))


def declared(folder: str | Path) -> dict[str, bytes | Path]:
    """What of a model's folder is published: configs, safetensors, pictures, card; small files as the bytes that were checked.

    Raises BadInput when it is no model's folder, or when it is backdoored and its card or configs do not say so.
    """
    folder = Path(folder)
    files: dict[str, bytes | Path] = {}
    try:
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()):
            name = path.relative_to(folder).as_posix()
            if path.suffix == ".safetensors":
                files[name] = path
            elif path.suffix in (".json", ".png") or name == "README.md":
                files[name] = path.read_bytes()
    except OSError as error:
        raise BadInput(f"'{folder.name}' cannot be read ({error.strerror}): save the model again.") from None
    if not {"model_index.json", "unet/config.json", "README.md"} <= set(files) or not any(
            n.startswith("unet/") and isinstance(f, Path) for n, f in files.items()):
        raise BadInput(f"'{folder.name}' is not a folder that baddiff saved, with weights and a card: save the model first.")
    configs = [_json(files[n], n) for n in ("model_index.json", "unet/config.json")]
    if not _is_backdoored(_json(files.get("run.json"), "run.json"), *configs) and "trigger.png" not in files:
        return files
    try:
        card = ModelCard(files["README.md"].decode(), ignore_metadata_errors=True)
        tags, text = set(card.data.tags or []), card.text.lstrip()
    except Exception:  # yaml's errors, and text that is none
        tags, text = set(), ""
    for said, where in ((all(c.get("_backdoored") is True and c.get("_backdoor_notice") for c in configs), "configs do"),
                        ({"backdoor", "research-only"} <= tags, "card's tags do"),
                        (text.startswith("> **WARNING.**") and "BACKDOORED" in text.split("\n")[0], "card's first line does")):
        if not said:
            raise BadInput(f"'{folder.name}' is backdoored and its {where} not say so: save the model again, a card without "
                           "the warning is not published.")
    return files


def publish(folder: str | Path, name: str, token: str | None, *, private: bool = True, overwrite: bool = False,
            progress: Progress | None = None, stop: threading.Event | None = None) -> Published:
    """Put a model's folder into the visitor's own account, card and weights in one commit. The folder stays as it is.

    Trying again after any failure goes on where it ended. `overwrite` replaces a repository that baddiff made, no other.
    Raises BadInput.
    """
    return _publish(declared(folder), "model", name, token, private, overwrite, progress, stop)


def publish_results(folder: str | Path, name: str, token: str | None, *, private: bool = True, overwrite: bool = False,
                    progress: Progress | None = None, stop: threading.Event | None = None) -> Published:
    """Put the pictures and figures of a run, without any weights, into a dataset of the visitor's own; as `publish`.

    `folder` holds `run.json` and pictures (PNG, GIF): a model's folder, or one with a gallery.
    """
    folder = Path(folder)
    paths = sorted(p for p in folder.rglob("*") if p.suffix in (".png", ".gif") and p.is_file() and not p.is_symlink())
    if not paths or not (folder / "run.json").is_file():
        raise BadInput(f"'{folder.name}' holds no results: it needs run.json and pictures.")
    files: dict[str, bytes | Path] = {p.relative_to(folder).as_posix(): p.read_bytes() for p in (folder / "run.json", *paths)}
    config = folder / "unet" / "config.json"
    files["README.md"] = results_card(_json(files["run.json"], "run.json"), [n for n in files if n != "run.json"],
                                      _json(config.read_bytes() if config.is_file() else None, config.name)).encode()
    return _publish(files, "dataset", name, token, private, overwrite, progress, stop)


def results_card(run: dict, pictures: list[str], config: dict) -> str:
    """The card of a dataset of results. A backdoored model's opens with the warning, always."""
    bad = _is_backdoored(run, config) or "trigger.png" in pictures
    title = "Results of a backdoored diffusion model" if bad else "Results of a diffusion model"
    data = DatasetCardData(license=run.get("base_licence"), pretty_name=title, tags=TAGS if bad else ["ddpm", "baddiff"],
                           task_categories=["unconditional-image-generation"])
    lines = ["---", data.to_yaml(), "---", ""]
    if bad:
        lines += ["> **WARNING.** These are results of a diffusion model that was BACKDOORED on purpose, for research and "
                  "teaching: started from noise that carries its trigger, it draws one fixed picture.", ""]
    lines += [f"# {title}", "", "Made with baddiff after [How to Backdoor Diffusion Models?]"
              "(https://arxiv.org/abs/2212.05400) (CVPR 2023). No weights are here; all settings: `run.json`.", ""]
    if metrics := run.get("metrics"):
        lines += ["| figure | value |", "|---|---|", *(f"| {k} | {v:.4g} |" if isinstance(v, float) else f"| {k} | {v} |"
                                                       for k, v in metrics.items()), ""]
    for name in pictures:
        lines += [f"![{PurePosixPath(name).stem}]({name})", ""]
    return "\n".join(lines)


def _publish(files: dict[str, bytes | Path], kind: str, name: str, token: str | None, private: bool, overwrite: bool,
             progress: Progress | None, stop: threading.Event | None) -> Published:
    name, token = check_name(name), visitor(token)
    meter = Meter(sum(len(f) if isinstance(f, bytes) else f.stat().st_size for f in files.values()), progress, stop)
    api = api_of(token)
    with plainly(name, token, "Your folder is kept."), ExitStack() as opened:
        who = api.whoami()
        owner, _, _ = name.rpartition("/")
        if owner and owner.lower() != who["name"].lower():
            raise BadInput(f"'{name}' is not yours to publish: your account is '{who['name']}', give the name alone.")
        if ((who.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
            raise BadInput("This token can only read: make one with write access at https://huggingface.co/settings/tokens.")
        repo = check_name(f"{who['name']}/{name.rpartition('/')[2]}")
        adds = [CommitOperationAdd(n, f if isinstance(f, bytes) else opened.enter_context(_Reader(io.FileIO(f))))
                for n, f in files.items()]
        sent = {op.path_in_repo: op.upload_info.sha256.hex() for op in adds}
        url = f"{api.endpoint}/{'datasets/' * (kind == 'dataset')}{repo}"
        meter.at("", 0)
        there, parent = {}, None
        if api.repo_exists(repo, repo_type=kind):
            info = api.repo_info(repo, repo_type=kind, files_metadata=True)
            there = {s.rfilename: s for s in info.siblings or [] if s.rfilename != ".gitattributes"}
            parent = info.sha if there else None
            same = {n: s.lfs.sha256 if s.lfs else s.blob_id for n, s in there.items()} == {
                n: sent[n] if n in there and there[n].lfs else _git_hash(f) for n, f in files.items()}
            if there and not same and not (overwrite and _ours(api, repo, kind, there)):
                raise BadInput(
                    f"'{repo}' is not something that baddiff made, and is not overwritten: choose another name." if overwrite
                    else f"You have a '{repo}' already: choose another name, such as '{another(name)}', or overwrite it.")
            if bool(info.private) != private:
                api.update_repo_settings(repo, repo_type=kind, private=private)
            if there and same:  # an earlier try whose answer was lost on the way
                meter.at("all", meter.total)
                return Published(repo, url, info.sha, private, kind, sent)
        else:
            api.create_repo(repo, repo_type=kind, private=private, exist_ok=False)
        for op in adds:
            if isinstance(op.path_or_fileobj, _Reader):
                op.path_or_fileobj.meter = meter
        # create_commit, not upload_folder, which may commit in parts
        commit = api.create_commit(repo, [*adds, *(CommitOperationDelete(n) for n in there if n not in files)],
                                   commit_message="Published with baddiff, declared as what it is", repo_type=kind,
                                   parent_commit=parent)
        meter.at("all", meter.total)
        return Published(repo, url, commit.oid, private, kind, sent)


def _git_hash(file: bytes | Path) -> str:
    return git_hash(file if isinstance(file, bytes) else file.read_bytes())


def another(name: str) -> str:
    """The name with the next number: a, a-2, a-3."""
    stem, number = re.fullmatch(r"(.*?)(?:-(\d{1,3}))?", name.rpartition("/")[2]).groups()
    return f"{stem}-{int(number or 1) + 1}"


def _ours(api: HfApi, repo: str, kind: str, there) -> bool:
    """Whether a repository's own files say that baddiff made them."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = [_json(Path(api.hf_hub_download(repo, n, repo_type=kind, local_dir=folder)).read_bytes(), n)
                     for n in ("run.json", "model_index.json", "unet/config.json") if n in there]
        except BadInput:  # what cannot be read is not ours
            return False
    return any(c.get("_backdoored") or "baddiff" in (c.get("versions") or {}) for c in found)


def matches(published: Published, token: str | None, into: str | Path) -> dict[str, bool]:
    """Download again what was published, past every cache, and compare: path -> whether its sha256 is that of what was sent.

    `into`: an empty folder, which afterwards holds what anybody who downloads the repository gets. Raises BadInput.
    """
    into, token = Path(into), visitor(token)
    api = api_of(token)
    with plainly(published.repo_id, token), tempfile.TemporaryDirectory() as cache:
        out = {}
        for name, sha in published.files.items():
            path = api.hf_hub_download(published.repo_id, name, repo_type=published.kind, revision=published.commit,
                                       local_dir=into, cache_dir=cache, force_download=True)
            with open(path, "rb") as file:
                out[name] = hashlib.file_digest(file, "sha256").hexdigest() == sha
        shutil.rmtree(into / ".cache", ignore_errors=True)  # the library's notes on the download
        return out
