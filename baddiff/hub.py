"""From the Hugging Face Hub: models and datasets, and what publishing shares with that: names, tokens, plain errors.

A token is what a visitor gave. It is sent to the Hub only, and kept nowhere; the token of whoever runs this is never used.
"""

import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path, PurePosixPath

import httpx2
from huggingface_hub import HfApi, constants, errors, get_cached_repo_tree, get_token, set_client_factory
from huggingface_hub.utils import disable_progress_bars, hf_raise_for_status, logging, tqdm, validate_repo_id
from huggingface_hub.utils._http import default_client_factory

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
if "HF_HUB_VERBOSITY" not in os.environ:
    logging.set_verbosity_error()  # what goes wrong is told once, in a sentence


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


def api_of(token: str | bool | None) -> HfApi:
    return HfApi(token=token or False, library_name="baddiff")  # None would mean the token of whoever runs this


def visitor(token: str | None) -> str:
    """A token that a person gave, or BadInput: an empty one is never made up for."""
    token = token.strip() if isinstance(token, str) else ""
    if not token or not token.isascii() or re.search(r"\s", token):
        raise BadInput("Publishing needs your own Hub token: sign in, or make one with write access at "
                       "https://huggingface.co/settings/tokens.")
    return token


@contextmanager
def plainly(repo: str, token: str | bool = False, kept: str = ""):
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
        return "Cancelled."
    if first(errors.RevisionNotFoundError):
        return f"'{repo}' has no such revision: leave it out to take the newest."
    if first(errors.GatedRepoError):
        return f"'{repo}' is open only to those who accepted its terms on the Hub: choose another."
    if http := first(errors.HfHubHTTPError):
        status, said = http.response.status_code, (getattr(http, "server_message", None) or "").split("\n")[0][:200]
        full = re.search(r"storage|quota|too large|payload", said, re.I)
        if status in (402, 413) or status in (400, 403) and full:
            return f"There is no room for it on the Hub ({said or status}): delete something there first."
        if status == 429:
            wait = http.response.headers.get("retry-after") or (re.search(r";t=(\d+)", http.response.headers.get(
                "ratelimit", "")) or ("", ""))[1]
            return f"The Hub asks to slow down: try again in {wait + ' seconds' if wait.isdigit() else 'a few minutes'}."
        if status == 401 and (signed_in or not first(errors.RepositoryNotFoundError)):
            return "The Hub does not accept this token (any more): sign in again, or make a new one."
        if status == 403 and not signed_in:
            return f"The Hub does not show '{repo}' to everybody: choose another, or give a token that may read it."
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
        api = api_of(token)
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
    with plainly(repo, token):
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

    with plainly(repo, token):
        found, trouble = [], BadInput(f"'{repo}' holds no pictures, zips or parquet files: choose a dataset of images.")
        for branch in (revision,) if revision else (None, CONVERTED):
            try:
                listing = _Listing.of(repo, "dataset", branch, token)
            except (errors.RevisionNotFoundError, errors.RevisionResolutionError, errors.CachedRepoTreeNotFoundError) as error:
                trouble = trouble if branch == CONVERTED else error
                continue
            found = max((of_split(sorted(n for n in listing.files if n.lower().endswith(suffixes)))
                         for suffixes in ((".parquet",), SUFFIXES, (".zip",))), key=listing.size)  # not a teaser beside it
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
