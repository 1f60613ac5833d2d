"""Input pictures of a request: from forms, data URIs and allowed hosts into the job's own folder.

What a file is called, and what it says it is, counts for nothing: it is what Pillow finds in its bytes.
"""

from __future__ import annotations

import asyncio
import io
import ipaddress
import socket
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import httpx
from PIL import Image, UnidentifiedImageError
from starlette.datastructures import UploadFile

from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.pictures import BROKEN, decode_data_uri
from sgl_diffusion.server.bodies import MIB
from sgl_diffusion.server.errors import ApiError

SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
MAX_PICTURES = 16  # of one request, as OpenAI has it
FETCH_SECONDS = 20.0


class Uploads:
    """Checks and stores input pictures.

    Args:
        max_mib: of one picture.
        max_pixels: of one picture; seen before it is decoded.
        hosts: from which pictures may be fetched.
    """

    def __init__(self, max_mib: int, max_pixels: int, hosts: Sequence[str]) -> None:
        self.max_bytes, self.max_pixels = max_mib * MIB, max_pixels
        self.hosts = {host.lower() for host in hosts}

    async def store(self, given: Sequence[UploadFile | str], folder: Path, param: str) -> list[str]:
        """Stores pictures as 0.png, 1.jpg ... and returns their paths.

        Args:
            given: files of a form, data URIs, URLs.
            param: the field they came in, for messages.
        Raises:
            ApiError: 400, one is not a picture, too large, or not to be fetched. Nothing is left of the others.
        """
        if len(given) > MAX_PICTURES:
            raise ApiError(400, f"{param}: {len(given)} pictures, at most {MAX_PICTURES}", param=param)
        paths = []
        for index, source in enumerate(given):
            try:
                data = await source.read() if isinstance(source, UploadFile) else await self._fetch(source)
                paths.append(await asyncio.to_thread(self._store, data, folder, index))
            except (ValueError, UserError) as e:
                shown = f"{source[:60]}: " if isinstance(source, str) else ""
                raise ApiError(400, f"{param}: {shown}{e}", param=param, code="invalid_image") from None
        return paths

    def _store(self, data: bytes, folder: Path, index: int) -> str:
        """Raises ValueError: not a whole picture of a format and size that are taken."""
        if len(data) > self.max_bytes:
            raise ValueError(f"more than {self.max_bytes // MIB} MiB")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's on odd metadata and on sizes that are refused below
                picture = Image.open(io.BytesIO(data), formats=list(SUFFIXES))
                if picture.width * picture.height > self.max_pixels:
                    raise ValueError(f"{picture.width}x{picture.height} are more than {self.max_pixels} pixels")
                picture.load()
        except Image.DecompressionBombError as e:
            raise ValueError(f"too many pixels: {e}") from e
        except UnidentifiedImageError as e:
            raise ValueError(f"not a picture; expected {', '.join(SUFFIXES)}") from e
        except (*BROKEN, zlib.error, struct.error) as e:
            raise ValueError(f"not a readable picture: {' '.join(str(e).split())}") from e
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{index}{SUFFIXES[str(picture.format)]}"
        path.write_bytes(data)
        return str(path)

    # -- by reference ----------------------------------------------------------------

    async def _fetch(self, uri: str) -> bytes:
        """Raises ValueError: not a data URI or a URL on an allowed host, or nothing came from there."""
        if uri.startswith("data:"):
            return decode_data_uri(uri)
        url = urlsplit(uri)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError("expected a data URI or an http(s) URL; paths are of the client, not of the server")
        if url.hostname not in self.hosts:
            raise ValueError(f"the host {url.hostname} is not one that this server fetches pictures from")
        address = await _resolved(url)
        try:
            async with asyncio.timeout(FETCH_SECONDS):
                return await self._download(url, address)
        except (httpx.HTTPError, TimeoutError) as e:
            raise ValueError(f"could not be fetched: {str(e) or 'it took too long'}") from e

    async def _download(self, url: SplitResult, address: str) -> bytes:
        """From the address that was checked, whatever the name resolves to next time. Redirects are not followed."""
        host = f"[{address}]" if ":" in address else address
        port = f":{url.port}" if url.port else ""
        target = url._replace(netloc=host + port, fragment="").geturl()
        request = {"headers": {"host": f"{url.hostname}{port}"}, "extensions": {"sni_hostname": url.hostname}}
        data = bytearray()
        async with httpx.AsyncClient(trust_env=False) as client, client.stream("GET", target, **request) as answer:  # type: ignore[arg-type]
            if answer.status_code != httpx.codes.OK:
                raise ValueError(f"could not be fetched: status {answer.status_code}")
            async for chunk in answer.aiter_bytes():
                data += chunk
                if len(data) > self.max_bytes:
                    raise ValueError(f"more than {self.max_bytes // MIB} MiB")
        return bytes(data)


async def _resolved(url: SplitResult) -> str:
    """An address of the URL's host. One inside our own network only if the host was allowed as that very address.

    Raises:
        ValueError: no address, or one that a public name has no business to have.
    """
    host = str(url.hostname)
    try:
        port = url.port
        found = await asyncio.get_running_loop().getaddrinfo(host, port or 80, type=socket.SOCK_STREAM)
    except OSError as e:
        raise ValueError(f"the host {host} has no address") from e
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        if not ipaddress.ip_address(address).is_global and host not in (address, "localhost"):
            raise ValueError(f"the host {host} has an address inside a private network")
    return addresses[0]
