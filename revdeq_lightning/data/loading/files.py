"""Files in folders, and datasets of the Hugging Face Hub or a local copy."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def list_files(root: Path) -> list[str]:
    """Names of the files in a folder and its subfolders, relative and sorted, without hidden ones."""
    names = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        names += [Path(folder, name).relative_to(root).as_posix() for name in files if not name.startswith(".")]
    return sorted(names)


def content_key(root: Path, names: Iterable[str]) -> str:
    """SHA-256 of the names and contents of files."""
    digest = hashlib.sha256()
    for name in names:
        with (root / name).open("rb") as file:
            digest.update(os.fsencode(name) + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def hub_is_reachable() -> bool:
    """Check with one quick request: the client of the Hub retries for 23 s if there is no network."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # whatever the HTTP library raises, there was no response
        return False
    return True


def huggingface_key(path: str, name: str | None) -> str:
    """Identify a local copy by its content and a dataset of the Hub by its name, which needs no network later."""
    folder = Path(path)
    return f"{content_key(folder, list_files(folder)) if folder.is_dir() else f'hub:{path}'}:{name}"


def load_huggingface(path: str, name: str | None) -> dict[str, Any]:
    """Load the splits ("train" at least) of a Hugging Face dataset from the folder `path` if it exists, else the Hub.

    Raises:
        ConnectionError: If the Hub cannot be reached.
        ValueError: If there is no training split.
    """
    import datasets
    from huggingface_hub import constants

    folder = Path(path)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        loaded: Any = datasets.load_from_disk(path)
        loaded = loaded if isinstance(loaded, dict) else {"train": loaded}
    else:
        try:
            if not folder.is_dir() and not constants.HF_HUB_OFFLINE and not hub_is_reachable():
                raise ConnectionError("no answer")
            loaded = datasets.load_dataset(path, name)
        except ConnectionError as error:
            raise ConnectionError(
                f"cannot fetch the dataset {path} from the Hub ({error}): set path=FOLDER with its parquet files or "
                "its save_to_disk copy, set HF_HUB_OFFLINE=1 if it was downloaded before, or use the embedded data, "
                "which needs no network."
            ) from None
    if "train" not in loaded:
        raise ValueError(f'{path} has the splits {sorted(loaded)}, "train" is not among them.')
    return loaded  # type: ignore[no-any-return]
