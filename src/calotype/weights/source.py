"""From what a user calls a model to local files: a shipped name, a folder, a file, or a Hub id with its cache."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import cast

from calotype.errors import CalotypeWarning, CheckpointError, ModelNotFoundError
from calotype.rules import shown
from calotype.weights.files import NUMBERED, PICKLES, STEMS, pickles, unsafe, variants

SHIPPED = "icons"
FOLDERS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
ROOT_FILES = ("model_index.json", "calotype.json")
HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class HubId:
    """A repository on the Hub and which state of it: a branch, a tag or a commit."""

    repo: str
    revision: str

    def __str__(self) -> str:
        return self.repo if self.revision == "main" else f"{self.repo}@{self.revision}"


def resolve(
    ref: str | Path | None,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    offline: bool = False,
    without: Sequence[str] = (),
) -> Path:
    """The local folder (or file) of a model, downloaded if it must be.

    `ref` is a folder, a file, a Hub id "org/name[@revision]", or the name of a shipped model (None: SHIPPED).
    With `subfolder`, the result is the folder of that one part: ref/subfolder, or ref where that is the part alone.
    `without` names folders that need no download. Raises ModelNotFoundError.
    """
    ref = SHIPPED if ref is None else str(ref)
    hub_id = None
    root = _local(ref)
    if root is None:
        hub_id = _hub_id(ref, revision)
        if hub_id is None:
            raise _not_found(ref)
        where = str(hub_id)
        root = _from_hub(hub_id, lambda files: needed(files, where, subfolder, variant, without), offline)
    elif revision is not None:
        raise _no_revision(root, revision)
    if subfolder is None:
        return root
    if root.is_dir() and (root / subfolder / "config.json").is_file():
        return root / subfolder
    if root.is_dir() and not (root / "config.json").is_file():
        raise ModelNotFoundError(f"{hub_id or root} has neither {subfolder}/config.json nor config.json")
    return root


def resolve_file(
    ref: str | Path,
    name: str | None = None,
    *,
    preferred: Sequence[str] = (),
    beside: Sequence[str] = (),
    revision: str | None = None,
    offline: bool = False,
) -> Path:
    """One .safetensors file: `ref` itself, or the file `name` of the folder or Hub id `ref`, downloaded if it must be.

    Without a name it is the first of `preferred` that is there, else the only .safetensors file at the top. Files with
    a name of `beside` in its folder come along. Raises ModelNotFoundError, UnsafeFileError.
    """
    ref = str(ref)
    root = _local(ref)
    if root is None:
        hub_id = _hub_id(ref, revision)
        if hub_id is None:
            raise _not_found(ref)

        def wanted(files: list[str]) -> list[str]:
            file = choose_file(files, ref, name, preferred)
            companions = {str(PurePosixPath(file).with_name(other)) for other in beside}
            return [file, *(other for other in files if other in companions)]

        root = _from_hub(hub_id, wanted, offline)
    elif revision is not None:
        raise _no_revision(root, revision)
    if root.is_file():
        if name is not None and root.name != name:
            raise ModelNotFoundError(f"{root} is a file: {shown(name)} cannot be in it", "leave the file's name out")
        return root
    files = [path.name for path in root.iterdir() if path.is_file()]
    if name is not None and (root / name).is_file():
        files.append(name)  # it may lie deeper
    return root / choose_file(files, ref, name, preferred)


def _no_revision(root: Path, revision: str) -> ModelNotFoundError:
    return ModelNotFoundError(f"{root} is on this machine, where it has no revision {shown(revision)}", "leave it out")


def choose_file(files: Sequence[str], where: str, name: str | None, preferred: Sequence[str]) -> str:
    """The file that `resolve_file` takes out of those of a folder or repository."""
    if name is not None and name.endswith(PICKLES):
        raise _pickle(where, name, name)
    there = sorted(file for file in files if file.endswith(".safetensors") and "/" not in file)
    if name is not None:
        if name not in files:
            listed = ", ".join(there[:10]) or "none at its top"
            raise ModelNotFoundError(f"{where} has no file {shown(name)}; .safetensors files: {listed}")
        return name
    first = [file for file in preferred if file in there]
    if first or len(there) == 1:
        return (first or there)[0]
    if there:
        raise ModelNotFoundError(f"{where} has several files: {', '.join(there[:10])}", "say which by weight_name")
    stems = tuple(file.removesuffix(".safetensors") for file in preferred)
    if left := pickles(files, stems) or pickles(files):
        raise _pickle(where, left[0], left[0])
    raise ModelNotFoundError(f"{where} has no .safetensors file")


def _pickle(where: str, name: str, wanted: str = "") -> CheckpointError:
    """The refusal of a pickle in a folder; or in a repository, where it must be downloaded (`wanted`, or all) first."""
    error, match = unsafe(Path(where) / name), HUB_ID.fullmatch(where)
    if match is None or Path(os.path.expanduser(where)).exists():
        return error
    revision = [] if match["revision"] is None else ["--revision", match["revision"]]
    folder = match["repo"].partition("/")[2]
    words = ["hf", "download", match["repo"], *([wanted] if wanted else []), *revision, "--local-dir", folder]
    return type(error)(error.message, f"if you trust it, download it and give the folder {folder}: {shlex.join(words)}")


def _local(ref: str) -> Path | None:
    """The shipped model or the path on this machine that `ref` names, if it is one."""
    if ref in shipped():
        return shipped()[ref]
    if not ref.strip() or "\0" in ref:
        return None
    path = Path(os.path.expanduser(ref))  # Path's own raises for the home of nobody
    try:
        return path if path.exists() else None
    except OSError:  # such as a name that is too long for the file system
        return None


def shipped() -> dict[str, Path]:
    """The models that came with the package: name -> folder."""
    folder = Path(__file__).parents[1] / "models"
    return {index.parent.name: index.parent for index in sorted(folder.glob("*/model_index.json"))}


def _hub_id(ref: str, revision: str | None) -> HubId | None:
    match = HUB_ID.fullmatch(ref)
    if match is None or ".." in ref or "--" in ref or len(ref) > 200 or ref.endswith((".safetensors", *PICKLES)):
        return None
    if revision is not None and match["revision"] is not None and revision != match["revision"]:
        raise ModelNotFoundError(
            f"{shown(ref)} and revision {shown(revision)} contradict each other", "give one of them"
        )
    chosen = revision if revision is not None else match["revision"]
    if chosen is None:
        return HubId(match["repo"], "main")
    if not re.fullmatch(r"[\w./-]+", chosen) or ".." in chosen or chosen.startswith("/"):
        raise ModelNotFoundError(
            f"{shown(chosen)} is not the name of a revision", "a branch, a tag or a commit is needed"
        )
    return HubId(match["repo"], chosen)


# ---- the Hub ----


def _from_hub(hub_id: HubId, choose: Callable[[list[str]], list[str]], offline: bool) -> Path:
    """The snapshot of a repository: downloaded, or from the cache where there is no network (or none is wanted).

    `choose` takes the names of its files and gives those that are wanted.
    """
    cached = cached_snapshot(hub_id)
    if offline or _env_offline():
        if cached is None:
            raise _not_found(str(hub_id), f"offline, and {hub_id} is not in the cache ({hub_cache()})", OFFLINE_HINT)
        return cached
    # Imported on use: most models are folders.
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    # The library's HTTP client has changed over time; the base of its errors is what HfHubHTTPError derives from.
    unreachable = cast(tuple[type[Exception], ...], (OSError, *HfHubHTTPError.__bases__))
    try:
        info = HfApi().model_info(hub_id.repo, revision=hub_id.revision, timeout=10)
        wanted = choose([file.rfilename for file in info.siblings or ()])
        patterns = [name.replace("[", "[[]") for name in wanted]  # they are matched as fnmatch does
        return Path(
            snapshot_download(hub_id.repo, revision=hub_id.revision, allow_patterns=patterns, cache_dir=hub_cache())
        )
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{hub_id.repo} has no revision {shown(hub_id.revision)}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        hint = "if it is private or gated, accept its terms on huggingface.co and log in: hf auth login"
        raise _not_found(str(hub_id), f"the Hub has no model {hub_id} that you may read", hint) from error
    except unreachable as error:
        reason = f"{hub_id} could not be downloaded ({shown(str(error))})"
        if cached is None:
            raise ModelNotFoundError(f"{reason} and is not in the cache ({hub_cache()})", OFFLINE_HINT) from error
        warnings.warn(f"{reason}; the copy in the cache is used", CalotypeWarning, stacklevel=2)
        return cached


OFFLINE_HINT = "load it once with a network, or give a folder"


def needed(
    files: Iterable[str], where: str, subfolder: str | None, variant: str | None, without: Sequence[str] = ()
) -> list[str]:
    """Which of a repository's files a model (or its one part `subfolder`) takes: configs, tokenizers, weights once.

    Raises UnsafeFileError where a part has pickles only.
    """
    names = set(files)
    folders: tuple[str, ...]
    if subfolder is not None:
        folders = (subfolder,) if f"{subfolder}/config.json" in names else ("",)
    elif "model_index.json" in names:
        folders = tuple(folder for folder in FOLDERS if folder not in without)
    else:
        folders = ("",)
    wanted = {name for name in ROOT_FILES if name in names}
    for folder in folders:
        prefix = f"{folder}/" if folder else ""
        inside = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        inside = {name for name in inside if "/" not in name}
        weights = _weights(inside, variant)
        left = [] if weights or folder.startswith(("tokenizer", "scheduler")) else pickles(inside, STEMS, variant)
        if left:
            raise _pickle(where, f"{prefix}{left[0]}")
        texts = {name for name in inside if name.endswith((".json", ".txt")) and ".index" not in name}
        wanted |= {prefix + name for name in texts | weights}
    return sorted(wanted)


def _weights(names: set[str], variant: str | None) -> set[str]:
    """One folder's weight files: the variant's, else the plain ones, else those there are."""
    wanted: set[str] = set()
    for stem in STEMS:
        found = variants(names, stem)
        chosen = [key for key in (variant, None) if key in found][:1] or list(found)
        for key in chosen:
            wanted |= {found[key]}
            if found[key].endswith(".json") or NUMBERED.fullmatch(found[key]):
                dotted = "" if key is None else rf"\.{key}"  # before the numbers; in older repositories behind them
                numbers = r"-\d{5}-of-\d{5}"
                shard = re.compile(rf"{stem}({dotted}{numbers}|{numbers}{dotted})\.safetensors")
                wanted |= {name for name in names if shard.fullmatch(name)}
    return wanted


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it downloads; the environment is read at every call."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    if os.environ.get("HF_HOME"):
        return Path(os.environ["HF_HOME"]).expanduser() / "hub"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "huggingface" / "hub"


def cached_snapshot(hub_id: HubId) -> Path | None:
    """A revision's folder in the cache: models--org--name/snapshots/<commit>, the commit being in refs/<revision>."""
    folder = hub_cache() / f"models--{hub_id.repo.replace('/', '--')}"
    ref = folder / "refs" / hub_id.revision
    commit = ref.read_text(encoding="utf-8", errors="replace").strip() if ref.is_file() else hub_id.revision
    if not re.fullmatch(r"[\w-][\w.-]*", commit):
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def _env_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


# ---- names that are almost right ----


def _not_found(ref: str, message: str | None = None, hint: str | None = None) -> ModelNotFoundError:
    """The error for a name that leads nowhere, with the nearest names that lead somewhere."""
    if message is None:
        message = f"no model {shown(ref)}: not a shipped model, a folder, or a Hub id org/name"
    near = nearest(ref)
    if near:
        message += f"; nearest: {', '.join(near)}"
    if hint is None:
        hint = f"shipped with calotype: {', '.join(shipped()) or 'none'}; or give a folder or a Hub id"
    return ModelNotFoundError(message, hint)


def nearest(ref: str) -> list[str]:
    """Up to three names of models, out of those shipped, cached and lying beside, that resemble `ref`."""
    cached = [folder.name.removeprefix("models--").replace("--", "/") for folder in _listing(hub_cache(), "models--*")]
    names = [*shipped(), *cached]
    if "\0" not in ref and len(ref) <= 4096:
        names += [str(entry) for entry in _listing(Path(os.path.expanduser(ref)).parent, "*") if entry.is_dir()]
    by_lower = {name.lower(): name for name in names}
    return [by_lower[name] for name in difflib.get_close_matches(ref.lower(), by_lower, n=3, cutoff=0.6)]


def _listing(folder: Path, pattern: str) -> list[Path]:
    """The first entries of a folder; a folder that cannot be listed has none."""
    try:
        return sorted(folder.glob(pattern))[:1000]
    except OSError:
        return []
