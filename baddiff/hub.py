"""Folders to and from the Hugging Face Hub. A token is what a visitor gave, is sent to the Hub only, and is kept nowhere.

What is published is checked on disk first: a folder that says of itself that it is backdoored must say so in its card, its
configs and its tags, whoever wrote it.
"""

import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path, PurePosixPath

import httpx2
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetCardData,
    HfApi,
    ModelCard,
    constants,
    errors,
    get_cached_repo_tree,
    get_token,
    set_client_factory,
)
from huggingface_hub.utils import disable_progress_bars, hf_raise_for_status, tqdm, validate_repo_id
from huggingface_hub.utils._http import default_client_factory
from huggingface_hub.utils.sha import git_hash

from . import BadInput
from .data import SUFFIXES

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
WEIGHTS = re.compile(r"diffusion_pytorch_model(-\d+-of-\d+)?\.safetensors")
OTHERS = ("model_index.json", "run.json", "trigger.png", "target.png", "samples.png", "README.md", "scheduler_config.json",
          "scheduler/scheduler_config.json")
TAGS = ["backdoor", "baddiffusion", "research-only", "ai-safety", "ddpm", "baddiff"]
CONVERTED = "refs/convert/parquet"  # the branch on which the Hub keeps a parquet copy of every public dataset

# The library's own switches, which it reads once from the environment. No call may fall back to the token of whoever runs
# this process; plain HTTP can be counted and stopped at every chunk, which Xet's own transfers cannot.
constants.HF_HUB_DISABLE_IMPLICIT_TOKEN = constants.HF_HUB_DISABLE_XET = True
constants.DOWNLOAD_CHUNK_SIZE = 2**18
disable_progress_bars()


def _client() -> httpx2.Client:
    def at_once(response: httpx2.Response) -> None:  # the library would sleep for as long as Retry-After says, five times
        if response.status_code == 429:
            hf_raise_for_status(response)

    client = default_client_factory()
    client.timeout = httpx2.Timeout(60, connect=10)  # the library's own client waits for ever
    client.event_hooks = client.event_hooks | {"response": [at_once]}
    return client


set_client_factory(_client)


class Cancelled(Exception):
    pass


class Meter:
    """Adds up bytes from several threads for one callback; never goes back; raises Cancelled once `stop` is set."""

    def __init__(self, total: int, progress: Progress | None = None, stop: threading.Event | None = None):
        self.total, self.progress, self.stop = total, progress, stop
        self.parts, self.shown, self.lock = {}, -1, threading.Lock()

    def at(self, part, position: int) -> None:
        if self.stop and self.stop.is_set():
            raise Cancelled
        with self.lock:
            self.parts[part] = max(position, self.parts.get(part, 0))
            done = min(sum(self.parts.values()), self.total)
            if self.progress and done > self.shown:
                self.shown = done
                self.progress(done, self.total)

    def bar(self) -> type:
        """The class that the library reports a download's bytes to, in place of a progress bar."""
        meter = self

        class Bar(tqdm):
            def __init__(self, *args, **options):
                self.counts = options.get("name") == "huggingface_hub.snapshot_download"  # of three: bytes on disk
                self.bytes = 0
                super().__init__(*args, **options | {"disable": True})

            def update(self, n=1):
                self.bytes += self.counts * (n or 0)
                meter.at(id(self), self.bytes)

        return Bar


# --- names, tokens, errors -------------------------------------------------------------------------------------------

def slug(text: str) -> str:
    return re.sub(r"-{2,}|\.{2,}", "-", re.sub(r"[^A-Za-z0-9._-]+", "-", text)).strip("-._")[:80]


def suggest(trigger: str, target: str) -> str:
    """A repository's name that hides nothing."""
    return slug(f"backdoored-ddpm-{trigger}-{target}".lower().replace("_", "-"))


def check_name(name: str) -> str:
    """`name` or `user/name`, trimmed; raises BadInput with a name that would do."""
    name = (name or "").strip()
    try:
        if not name:
            raise errors.HFValidationError
        validate_repo_id(name)
    except errors.HFValidationError:
        better = "/".join(part for part in (slug(p) for p in name.split("/")[-2:]) if part) or "backdoored-ddpm"
        raise BadInput(f"'{name[:100]}' cannot be the name of a repository: use letters, digits, '-', '_' and '.', such as "
                       f"'{better.removesuffix('.git')}'.") from None
    return name


def is_id(source: str | Path) -> bool:
    """Whether a person means a Hub repository: `user/name`, and no such path here."""
    source = str(source)
    if source.count("/") != 1 or source.startswith((".", "/", "~")) or Path(source).exists():
        return False
    try:
        validate_repo_id(source)
    except errors.HFValidationError:
        return False
    return True


def local_token() -> str | None:
    """The token of `hf auth login` on a person's own machine. On a Space that is its owner's: never handed out."""
    return None if os.environ.get("SPACE_ID") else get_token()


def _api(token: str | bool) -> HfApi:
    return HfApi(token=token, library_name="baddiff")


def _visitor(token: str | None) -> str:
    token = token.strip() if isinstance(token, str) else ""
    if not token or not token.isascii() or re.search(r"\s", token):
        raise BadInput("Publishing needs your own Hub token: sign in, or make one with write access at "
                       "https://huggingface.co/settings/tokens.")
    return token


@contextmanager
def _plainly(repo: str, token: str | bool = False, kept: str = ""):
    """Turn whatever the library raises into one sentence without the token; `kept`: what a person need not fear for."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        text = " ".join(_reason(error, repo, bool(token)).split())
        if isinstance(token, str):
            text = text.replace(token, "(your token)")
        raise BadInput(f"{text} {kept}".strip()) from None


def _reason(error: BaseException, repo: str, signed_in: bool) -> str:
    chain = [error]
    while (deeper := chain[-1].__cause__ or chain[-1].__context__) and deeper not in chain:
        chain.append(deeper)

    def first(*kinds):
        return next((e for e in chain if isinstance(e, kinds)), None)

    if first(Cancelled):
        return "Cancelled: nothing half-done is left."
    if first(errors.RevisionNotFoundError):
        return f"'{repo}' has no such revision: leave it out to take the newest."
    if first(errors.GatedRepoError):
        return f"'{repo}' is open only to those who accepted its terms on the Hub: choose another."
    if http := first(errors.HfHubHTTPError):
        status, said = http.response.status_code, (getattr(http, "server_message", None) or "").split("\n")[0][:200]
        full = re.search(r"storage|quota|too large|payload", said, re.I)
        if status in (402, 413) or status in (400, 403) and full:
            return f"There is no room for it on the Hub ({said or status}): delete something there, or publish it publicly."
        if status == 429:
            wait = http.response.headers.get("retry-after") or (re.search(r";t=(\d+)", http.response.headers.get(
                "ratelimit", "")) or ("", ""))[1]
            return f"The Hub asks to slow down: try again in {wait + ' seconds' if wait.isdigit() else 'a few minutes'}."
        if status == 401 and (signed_in or not first(errors.RepositoryNotFoundError)):
            return "The Hub does not accept this token (any more): sign in again, or make a new one."
        if status == 403:
            return ("This token may not do that" + f" ({said})" * bool(said) + ": make one with write access, or sign in "
                    "again and allow it to create repositories.")
        if status in (401, 404):
            return f"There is no '{repo}' on the Hub that " + ("this token may use: check the name, or sign in again."
                                                               if signed_in else "anybody may read: check the name, or give "
                                                               "a token if it is private.")
        if status in (409, 412):
            return f"'{repo}' exists or was changed meanwhile: choose another name, or try again."
        if status >= 500:
            return f"The Hub has trouble of its own ({status}): try again in a few minutes."
        return f"The Hub refused ({status}{': ' + said if said else ''}): check the name and try again."
    absent = (errors.RevisionResolutionError, errors.LocalEntryNotFoundError, errors.CachedRepoTreeNotFoundError)
    if first(errors.OfflineModeIsEnabled) or constants.is_offline_mode() and first(*absent):
        return f"This process is offline (HF_HUB_OFFLINE) and '{repo}' is not in the Hub's cache: go online, or give a folder."
    if first(httpx2.TransportError, *absent) or "Consistency check" in str(error):
        return "The connection to the Hub failed or was cut: check the network and try again, what is there is used again."
    if full := next((e for e in chain if isinstance(e, OSError) and e.errno == 28), None):
        return "The disk is full: free some space and try again."
    said = str(error).strip().split("\n")[0][:200]
    return f"The Hub's '{repo}' could not be used ({said or type(error).__name__}): try again."


# --- from the Hub --------------------------------------------------------------------------------------------------------

@dataclass
class _Listing:
    """One commit of a repository: what it holds, and how large that is."""

    repo: str
    kind: str
    at: str
    files: dict[str, int]
    api: HfApi
    cached: bool = False  # the Hub was not asked: only what the cache holds

    @classmethod
    def of(cls, repo: str, kind: str, revision: str | None, token: str | bool) -> "_Listing":
        api = _api(token)
        at = api.resolve_revision(repo, repo_type=kind, revision=revision)  # offline: what "main" last was
        try:
            files = api.repo_info(repo, repo_type=kind, revision=at.resolved, files_metadata=True).siblings
        except (httpx2.TransportError, errors.OfflineModeIsEnabled):
            return cls(repo, kind, at, {f.rfilename: f.size for f in get_cached_repo_tree(
                repo, repo_type=kind, revision=at.resolved)}, api, True)
        return cls(repo, kind, at, {f.rfilename: f.size or 0 for f in files or []}, api)

    def size(self, names: list[str]) -> int:
        return sum(self.files[n] for n in names)

    def get(self, names: list[str], meter: Meter) -> Path:
        meter.at("", 0)
        return Path(self.api.snapshot_download(self.repo, repo_type=self.kind, revision=self.at, max_workers=8,
                                               allow_patterns=[escape(n) for n in names], tqdm_class=meter.bar(),
                                               local_files_only=self.cached))


def _larger(repo: str, size: int, most: int) -> BadInput:
    return BadInput(f"'{repo}' is too large: {size / 1e6:,.0f} MB, where at most {most / 1e6:,.0f} MB are fetched; choose a "
                    "smaller one.")


def fetch(repo: str, *, revision: str | None = None, most: int = 2 * 10**9, progress: Progress | None = None,
          stop: threading.Event | None = None, token: str | bool = False) -> Path:
    """The folder, in the standard cache, of an unconditional DDPM on the Hub: configs and safetensors, nothing else.

    What it is and how large is looked at before a byte of weights moves. `most`: bytes; `stop`: set it to cancel; `token`:
    a visitor's, for a private repository. Offline it is answered from the cache. Raises BadInput.
    """
    check_name(repo)
    with _plainly(repo, token):
        listing = _Listing.of(repo, "model", revision, token)
        names = listing.files
        base = "unet/" if "unet/config.json" in names else ""
        if base + "config.json" not in names:
            raise BadInput(f"'{repo}' is not a diffusers model (it has no unet/config.json): choose an unconditional DDPM such "
                           "as google/ddpm-cifar10-32.")
        if {n.split("/")[0] for n in names} & {"vae", "vqvae", "movq", "text_encoder"}:
            raise BadInput(f"'{repo}' draws in the latent space of another model: only plain DDPMs can be used here.")
        weights = [n for n in names if n.startswith(base) and WEIGHTS.fullmatch(n[len(base):])]
        if not weights:
            pickled = [n for n in names if n.startswith(base) and n.lower().endswith(PICKLES)]
            why = (f"its weights are a pickle ({pickled[0]}), which can run code when loaded" if pickled else "it has no "
                   "weights in safetensors")
            raise BadInput(f"'{repo}' cannot be used: {why}. Ask its author for safetensors, or choose another.")
        small = [n for n in (*OTHERS, base + "config.json", base + "diffusion_pytorch_model.safetensors.index.json")
                 if n in names]
        total = listing.size(small + weights)
        if total > most:
            raise _larger(repo, total, most)
        meter = Meter(total, progress, stop)
        root = listing.get(small, meter)
        config = json.loads((root / base / "config.json").read_text())
        if not isinstance(config, dict) or config.get("_class_name") != "UNet2DModel":
            raise BadInput(f"'{repo}' holds no UNet2DModel: only unconditional DDPMs can be used here.")
        root = listing.get(small + weights, meter)
        meter.at("all", total)
        return root


def fetch_images(repo: str, *, revision: str | None = None, split: str = "train", most_images: int = 5000,
                 most: int = 10**9, progress: Progress | None = None, stop: threading.Event | None = None,
                 token: str | bool = False) -> Iterator[Path]:
    """The files, in the standard cache, of a dataset on the Hub: parquet, zips or pictures, each fetched when asked for.

    No code of the dataset's is run. Of several splits only `split` is taken. Stop asking when there are enough; at most
    `most` bytes (the next file must fit) and `most_images` loose pictures are fetched. Raises BadInput.
    """
    check_name(repo)

    def of_split(names: list[str]) -> list[str]:
        chosen = [n for n in names if re.search(rf"(^|[/_.-]){re.escape(split)}([/_.-]|$)", n)] or names
        return [n for n in chosen if PurePosixPath(n).parent == PurePosixPath(chosen[0]).parent] \
            if chosen and chosen[0].endswith(".parquet") else chosen

    with _plainly(repo, token):
        found, trouble = [], BadInput(f"'{repo}' holds no pictures, zips or parquet files: choose a dataset of images.")
        for branch in (revision,) if revision else (None, CONVERTED):
            try:
                listing = _Listing.of(repo, "dataset", branch, token)
            except (errors.RevisionNotFoundError, errors.RevisionResolutionError, errors.CachedRepoTreeNotFoundError) as error:
                trouble = trouble if branch == CONVERTED else error
                continue
            for suffixes in ((".parquet",), SUFFIXES, (".zip",)):
                found = found or of_split(sorted(n for n in listing.files if n.lower().endswith(suffixes)))
            if found:
                break
        else:
            raise trouble
        loose = found[0].lower().endswith(SUFFIXES)
        if loose:
            found = found[:most_images]
        first = listing.size(found if loose else found[:1])
        if first > most:
            raise _larger(repo, first, most)
        meter = Meter(min(listing.size(found), most), progress, stop)
        taken = 0
        for names in [found] if loose else [[n] for n in found]:
            taken += listing.size(names)
            if taken > most:
                return
            root = listing.get(names, meter)
            yield from (root / n for n in names)


# --- to the Hub ----------------------------------------------------------------------------------------------------------

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
        value = json.loads(data or b"{}")
        assert isinstance(value, dict)
        return value
    except (ValueError, AssertionError):
        raise BadInput(f"{name} in that folder cannot be read: save the model again.") from None


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
    name, token = check_name(name), _visitor(token)
    meter = Meter(sum(len(f) if isinstance(f, bytes) else f.stat().st_size for f in files.values()), progress, stop)
    api = _api(token)
    with _plainly(name, token, "Your folder is kept."), ExitStack() as opened:
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
        # create_commit, not upload_folder, which may commit in parts: undeclared weights never exist, not for a second
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
        found = [_json(Path(api.hf_hub_download(repo, n, repo_type=kind, local_dir=folder)).read_bytes(), n)
                 for n in ("run.json", "model_index.json", "unet/config.json") if n in there]
    return any(c.get("_backdoored") or "baddiff" in (c.get("versions") or {}) for c in found)


def matches(published: Published, token: str | None, into: str | Path) -> dict[str, bool]:
    """Download again what was published, past every cache, and compare: path -> whether its sha256 is that of what was sent.

    `into`: an empty folder, which afterwards holds what anybody who downloads the repository gets. Raises BadInput.
    """
    into, token = Path(into), _visitor(token)
    api = _api(token)
    with _plainly(published.repo_id, token), tempfile.TemporaryDirectory() as cache:
        out = {}
        for name, sha in published.files.items():
            path = api.hf_hub_download(published.repo_id, name, repo_type=published.kind, revision=published.commit,
                                       local_dir=into, cache_dir=cache, force_download=True)
            with open(path, "rb") as file:
                out[name] = hashlib.file_digest(file, "sha256").hexdigest() == sha
        shutil.rmtree(into / ".cache", ignore_errors=True)  # the library's notes on the download
        return out
