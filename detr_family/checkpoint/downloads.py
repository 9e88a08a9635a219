"""Weights that are elsewhere: https addresses, the Hugging Face Hub, torchvision's, by Detectron2's path manager.

- `https://...`: iopath's downloads and cache (FVCORE_CACHE, else ~/.torch/iopath_cache), with a progress bar. One that
  ends too early leaves nothing behind, and the next try starts anew. `#sha256=...` after the address, all of the
  digest or its first digits, is compared; so are the digits in the names of files whose publishers put them there.
- `hf://owner/model`, `hf://owner/model@revision/file`: huggingface_hub's downloads, cache and checksums.
- `torchvision://resnet50`: the ImageNet weights of a torchvision model.

What cannot be fetched is one error that says where to put the file instead.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from typing import Any
from urllib.error import URLError
from urllib.parse import urldefrag, urlparse

from detectron2.utils.file_io import PathHandler, PathManager
from iopath.common.file_io import HTTPURLHandler, get_cache_dir
from torchvision.models import get_model_weights

ZOO = "zoo://"  # what `detr_family.model_zoo` answers for
# Publishers whose file names end in the first digits of the sha256, before the suffix.
HASHED_NAMES = ("https://dl.fbaipublicfiles.com/detr/", "https://download.pytorch.org/models/")


def is_address(path: str) -> bool:
    """Whether a path begins as an address does, and not as a file's."""
    return re.match(r"[a-z][a-z0-9+.-]*://", path) is not None


def checksum_of(address: str) -> str:
    """First digits of the sha256 that the file at an address must have; "" where none are known.

    Raises:
        ValueError: what follows "#" is no checksum.
    """
    url, fragment = urldefrag(address)
    if fragment:
        found = re.fullmatch(r"sha256=([0-9a-f]{8,64})", fragment)
        if not found:
            raise ValueError(f"{address}: '#{fragment}' is no checksum: #sha256= and 8 to 64 digits are needed")
        return found[1]
    named = re.search(r"-([0-9a-f]{8,64})\.\w+$", url)
    return named[1] if named and url.startswith(HASHED_NAMES) else ""


def sha256_of(path: str) -> str:
    """Of a file, in lower-case digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class DownloadHandler(HTTPURLHandler):
    """iopath's handler of https, with checksums and errors that say what to do."""

    def _get_local_path(self, path: str, force: bool = False, cache_dir: str | None = None, **kwargs: Any) -> str:
        checksum, url = checksum_of(path), urldefrag(path)[0]
        known = self.cache_map.get(url)
        try:
            local: str = super()._get_local_path(url, force=force, cache_dir=cache_dir, **kwargs)
        except OSError as error:
            reason = error.reason if type(error) is URLError else error
            place = os.path.join(get_cache_dir(cache_dir), urlparse(url).path.lstrip("/"))
            raise FileNotFoundError(
                f"{url} cannot be fetched ({reason}): download it on another machine and put it at {place}, or name "
                "your copy in place of the address"
            ) from error
        if checksum and local != known:  # compared once in a process
            found = sha256_of(local)
            if not found.startswith(checksum):
                os.remove(local)
                del self.cache_map[url]
                raise ValueError(
                    f"{url} is damaged or not the file that was published: its sha256 begins with "
                    f"{found[: len(checksum)]}, not with {checksum}. The file was removed; try again"
                )
        return local


class HubHandler(PathHandler):
    """`hf://owner/model[@revision][/file]`: a file of a model on the Hugging Face Hub.

    Without a file: model.safetensors, or where there is none pytorch_model.bin. The model's config.json, which names
    classes and settings, is fetched along where there is one: it comes to lie beside the weights.
    """

    PREFIX = "hf://"
    SETTINGS = "config.json"
    FILES = ("model.safetensors", "pytorch_model.bin")

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.+))?", path[len(self.PREFIX) :])
        if not found:
            raise ValueError(f"{path} is no address on the Hub: hf://owner/model or hf://owner/model/file is needed")
        try:
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
        except ImportError as error:
            raise FileNotFoundError(
                f"{path} needs huggingface_hub, which is not installed: pip install 'detr_family[hub]'"
            ) from error
        model, revision, file = found.groups()
        endpoint = os.environ.get("HF_ENDPOINT") or None
        missing: Exception | None = None
        for name in [file] if file else self.FILES:
            try:
                local: str = hf_hub_download(model, name, revision=revision, endpoint=endpoint, force_download=force)
                with contextlib.suppress(EntryNotFoundError, LocalEntryNotFoundError):  # or no network
                    hf_hub_download(model, self.SETTINGS, revision=revision, endpoint=endpoint, force_download=force)
                return local
            except LocalEntryNotFoundError as error:
                raise self._unreachable(path, error) from error
            except EntryNotFoundError as error:
                missing = error
            except (OSError, ValueError) as error:
                raise self._unreachable(path, error) from error
        raise FileNotFoundError(
            f"{model} on the Hub has no {file or ' and no '.join(self.FILES)}: name a file, hf://{model}/FILE"
        ) from missing

    @staticmethod
    def _unreachable(path: str, error: Exception) -> FileNotFoundError:
        reason = str(error.__cause__ or error).split("\n")[0]
        return FileNotFoundError(
            f"{path} cannot be fetched ({reason}): download its file on another machine and name your copy in place of "
            "the address"
        )

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        return open(self._get_local_path(path), mode)


class TorchvisionHandler(PathHandler):
    """`torchvision://resnet50`: the ImageNet weights (IMAGENET1K_V1, the papers') of a torchvision model."""

    PREFIX = "torchvision://"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        try:
            weights = get_model_weights(path[len(self.PREFIX) :])["IMAGENET1K_V1"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path}: torchvision has no ImageNet weights (IMAGENET1K_V1) of that name") from error
        local: str = PathManager.get_local_path(weights.url, force=force, **kwargs)
        return local

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        return PathManager.open(self._get_local_path(path), mode, **kwargs)


for handler in (DownloadHandler(), HubHandler(), TorchvisionHandler()):
    PathManager.register_handler(handler, allow_override=True)
