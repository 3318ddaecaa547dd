"""A data SPEC -> a source of images: one file a kind."""

from __future__ import annotations

from pathlib import Path

from stillproof.core.plugins import build, call_with_options, table
from stillproof.core.sources.folder import ImageFolder
from stillproof.core.sources.hub import HubDataset, is_saved_dataset
from stillproof.core.sources.npz import NpzFile
from stillproof.core.sources.parquet import ParquetDirectory
from stillproof.core.sources.source import DataSource, Facts, Opened, Source, Split
from stillproof.core.sources.user_code import UserCode
from stillproof.core.spec import Spec, local_path
from stillproof.errors import InputError

__all__ = ["DataSource", "Facts", "Opened", "Source", "Split", "open_source"]

FORMS = (
    "A data SPEC is: digits, a directory (parquet files, a folder of pictures a class, or what datasets.save_to_disk "
    "wrote), a file.npz, hf:org/name, or package.module:factory."
)


def open_source(text: str) -> Source:
    """The source that a data SPEC names. Raises InputError where there is none."""
    spec = Spec.parse(text)
    if spec.name in table("source"):
        return _source(build("source", spec))
    if spec.scheme == "hf":
        return _source(call_with_options(HubDataset, spec, name=spec.name.removeprefix("hf:"), local=False))
    path = local_path(spec.name)
    if path.is_dir():
        return _source(_directory(path, spec))
    if path.suffix == ".npz":
        if not path.is_file():
            raise InputError(f"there is no file {spec.name}.", "Check --data.")
        return _source(call_with_options(NpzFile, spec, path=path))
    if spec.runs_code:
        return UserCode(spec)
    raise InputError(f"no data at {spec.name!r}.", FORMS)


def _directory(path: Path, spec: Spec) -> object:
    if is_saved_dataset(path):
        return call_with_options(HubDataset, spec, name=str(path), local=True)
    if any(path.glob("*.parquet")) or any(path.glob("data/*.parquet")):
        return call_with_options(ParquetDirectory, spec, path=path)
    return call_with_options(ImageFolder, spec, path=path)


def _source(found: object) -> Source:
    if not isinstance(found, Source):
        raise InputError(f"{type(found).__name__} is no data source.", "It must extend stillproof.Source.")
    return found
