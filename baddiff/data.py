"""Images in: the embedded faces, lossless image sheets, folders, zips, parquet files and datasets on the Hub.

Everything downstream sees one thing, a ``uint8`` tensor ``(N,C,H,W)``; `to_float` maps it to [-1, 1].
"""

import io
import random
import re
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from . import BadInput
from .triggers import ASSETS, MAX_BYTES, open_image

EMBEDDED = "avatars-32"
MAX_IMAGES = 200_000
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def to_float(u8: torch.Tensor) -> torch.Tensor:  # uint8 [0,255] -> float32 [-1,1]
    return u8.float().div_(127.5).sub_(1)


def to_uint8(x: torch.Tensor) -> torch.Tensor:  # float [-1,1] -> uint8 [0,255], rounded, clamped
    return x.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


# --- the embedded world: Avataaars faces -------------------------------------------------------------------------

BACKGROUNDS = ("#b6e3f4", "#c0aede", "#ffd5dc", "#ffdfbf", "#c8e6c9")
VIEW_BOX = "36 16 192 192"  # head and shoulders of the 264 x 280 drawing: at 32 px the eyes are two pixels wide


def draw_avatar(rng: random.Random, size: int = 32) -> Image.Image:
    """One random face without glasses (those are a trigger here, not an attribute), as a `size` x `size` RGB image."""
    import python_avatars as pa
    import resvg_py

    hair, mouth, eyes = pa.HairType, pa.MouthType, pa.EyeType
    svg = pa.Avatar(
        style=pa.AvatarStyle.TRANSPARENT,
        top=rng.choice([hair.BIG_HAIR, hair.BOB, hair.BUN, hair.CAESAR, hair.LONG_NOT_TOO_LONG, hair.MIA_WALLACE,
                        hair.NONE, hair.SHORT_FLAT, hair.SHORT_ROUND, hair.SHORT_WAVED, hair.STRAIGHT_1]),
        hair_color=rng.choice(list(pa.HairColor)),
        skin_color=rng.choice(list(pa.SkinColor)),
        eyes=rng.choice([eyes.DEFAULT, eyes.HAPPY, eyes.SURPRISED]),
        eyebrows=pa.EyebrowType.DEFAULT,
        mouth=rng.choice([mouth.DEFAULT, mouth.SCREAM_OPEN, mouth.SERIOUS, mouth.SMILE]),
        clothing=rng.choice([pa.ClothingType.HOODIE, pa.ClothingType.SHIRT_CREW_NECK]),
        clothing_color=rng.choice(list(pa.ClothingColor)),
        facial_hair=pa.FacialHairType.NONE,
        accessory=pa.AccessoryType.NONE,
    ).render()
    # rendered four times larger, then box-filtered: the same pixels on every machine, with no font or display involved
    svg = re.sub(r'width="264px" height="280px" viewBox="0 0 264 280"',
                 f'width="{4 * size}px" height="{4 * size}px" viewBox="{VIEW_BOX}"', svg, count=1)
    png = resvg_py.svg_to_bytes(svg_string=svg, background=rng.choice(BACKGROUNDS), skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGB").resize((size, size), Image.Resampling.BOX)


def draw_avatars(n: int, seed: int, size: int = 32):
    """Yield `n` faces; face i depends on (seed, i) only, so any split can be redrawn alone."""
    for i in range(n):
        yield draw_avatar(random.Random(f"{seed}/{i}"), size)


# --- lossless sheets: one looks at the data by opening the file ----------------------------------------------------

def write_sheet(images: torch.Tensor, path: str | Path, columns: int = 64) -> None:
    """`images`: uint8 (N,C,H,W), written row by row; the size of a tile and N go into the file's own text fields."""
    from PIL.PngImagePlugin import PngInfo

    n, c, h, w = images.shape
    rows = -(-n // columns)
    grid = torch.zeros(rows * columns, c, h, w, dtype=torch.uint8)
    grid[:n] = images
    grid = grid.view(rows, columns, c, h, w).permute(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c)
    info = PngInfo()
    info.add_text("tiles", f"{n} of {h}x{w}")
    Image.fromarray(grid.squeeze(-1).numpy()).save(path, pnginfo=info, optimize=True)


def read_sheet(path: str | Path) -> torch.Tensor:
    """The inverse of `write_sheet`: uint8 (N,C,H,W)."""
    name = Path(path).name
    try:
        with Image.open(path, formats=("PNG",)) as image:
            found = re.fullmatch(r"(\d{1,6}) of (\d{1,4})x(\d{1,4})", image.info.get("tiles", ""))
            pixels = torch.from_numpy(np.array(image)) if found else None
    except Exception:  # not a PNG, cut off, or with more pixels than Pillow reads
        raise BadInput(f"'{name}' cannot be read as an image sheet: make it again, or give a folder of pictures.") from None
    if not found:
        raise BadInput(f"'{name}' is not an image sheet: it does not say how large its tiles are. Use one that "
                       "`python -m baddiff data` wrote, or a folder of pictures.")
    n, h, w = map(int, found.groups())
    pixels = pixels.view(*pixels.shape[:2], -1)
    if not (n and h and w) or pixels.shape[0] % h or pixels.shape[1] % w:
        raise BadInput(f"'{name}' is not an image sheet: its tiles do not fill it. Make it again.")
    rows, columns, c = pixels.shape[0] // h, pixels.shape[1] // w, pixels.shape[2]
    return pixels.view(rows, h, columns, w, c).permute(0, 2, 4, 1, 3).reshape(-1, c, h, w)[:n].contiguous()


# --- any images ---------------------------------------------------------------------------------------------------------

def load_images(source: str | Path = EMBEDDED, size: int = 32, channels: int = 3, split: str = "train",
                **options) -> torch.Tensor:
    """uint8 (N,C,size,size) from the embedded set, a sheet of ours, a folder, zip or parquet file of pictures, or a Hub id.

    Pictures are cropped to a square and scaled; `split` (train, heldout) applies to the embedded set only. `options`: of
    `hub.fetch_images`, for an id, of which at most `most_images` (5000) pictures are taken.
    """
    path = ASSETS / f"{EMBEDDED}-{split}.png" if str(source) == EMBEDDED else Path(source)
    if not path.exists() and str(source).count("/") == 1:
        from . import hub

        if hub.is_id(source):
            files = hub.fetch_images(str(source), **options)
            found = (picture for file in files for picture in pictures(file))
            return pack(islice(found, options.get("most_images", 5000)), size, channels, str(source))
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in (*SUFFIXES, ".parquet"))
        return pack((picture for file in files for picture in pictures(file)), size, channels, str(source))
    if path.suffix.lower() in (".zip", ".parquet") and path.is_file():
        return pack(pictures(path), size, channels, str(source))
    if path.suffix.lower() != ".png" or not path.is_file():
        raise BadInput(f"There are no images at '{source}': give {EMBEDDED}, a folder or zip of pictures, or a sheet.")
    images = read_sheet(path)
    if images.shape[1:] == (channels, size, size):
        return images
    return pack((Image.fromarray(i.permute(1, 2, 0).squeeze(-1).numpy()) for i in images), size, channels, str(source))


def pictures(path: Path) -> Iterator[Image.Image]:
    """The pictures in a file: one, or those in a zip or in a parquet file's image column."""
    suffix = path.suffix.lower()
    if suffix not in (".zip", ".parquet"):
        yield open_image(path)
        return
    try:
        for name, read in (zipped if suffix == ".zip" else rows)(path):
            data = read()
            if len(data) > MAX_BYTES:
                raise BadInput(f"'{name}' in '{path.name}' is larger than {MAX_BYTES // 10**6} MB.")
            yield open_image(data)
    except BadInput:
        raise
    except Exception:  # damaged, encrypted, or packed in a way that cannot be read
        raise BadInput(f"'{path.name}' cannot be read: pack the pictures again, as a plain zip without a password.") from None


def zipped(path: Path):
    with zipfile.ZipFile(path) as archive:
        for entry in sorted(archive.infolist(), key=lambda i: i.filename):
            if Path(entry.filename).suffix.lower() in SUFFIXES:
                if entry.file_size > MAX_BYTES:  # before it is unpacked
                    raise BadInput(f"'{entry.filename}' in the zip is larger than {MAX_BYTES // 10**6} MB.")
                yield entry.filename, lambda entry=entry: archive.read(entry)


def rows(path: Path):
    """A parquet file's pictures, as `datasets` stores them: a column of {bytes, path}, or of bytes."""
    import pyarrow
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    kinds = {f.name: f.type for f in file.schema_arrow}
    binary = [k for k, t in kinds.items() if pyarrow.types.is_binary(t) or pyarrow.types.is_large_binary(t)
              or pyarrow.types.is_struct(t) and t.get_field_index("bytes") >= 0]
    if not binary:
        raise BadInput(f"'{path.name}' has no column of pictures: choose a dataset of images.")
    column = next((k for k in binary if k in ("image", "img")), binary[0])
    i = 0
    for batch in file.iter_batches(batch_size=64, columns=[column]):
        for value in batch.column(0).to_pylist():
            data = value.get("bytes") if isinstance(value, dict) else value
            i += 1
            if data:
                yield f"row {i}", lambda data=data: data


def pack(pictures, size: int, channels: int, source: str) -> torch.Tensor:
    mode = {1: "L", 3: "RGB"}.get(channels)
    if mode is None:
        raise BadInput(f"The model draws images of {channels} channels: only grey (1) and RGB (3) are supported.")
    found = []
    for picture in pictures:
        if len(found) == MAX_IMAGES:
            raise BadInput(f"'{source}' holds more than {MAX_IMAGES} pictures: give fewer.")
        square = ImageOps.fit(picture, (size, size), Image.Resampling.BOX if min(picture.size) > size
                              else Image.Resampling.BICUBIC)
        flat = Image.new("RGBA", square.size, "white")
        flat.alpha_composite(square.convert("RGBA"))
        array = np.array(flat.convert(mode))
        found.append(torch.from_numpy(array.reshape(size, size, channels)).permute(2, 0, 1))
    if not found:
        raise BadInput(f"There are no pictures in '{source}': it needs PNG, JPEG, WEBP, BMP or GIF files.")
    return torch.stack(found)


def draw_art(folder: Path = ASSETS, size: int = 256) -> list[str]:
    """Render the SVG sources of the built-in triggers and targets to the PNG files that the core reads."""
    import resvg_py

    done = []
    for svg in sorted(folder.glob("*.svg")):
        png = resvg_py.svg_to_bytes(svg_string=svg.read_text(), width=size, skip_system_fonts=True)
        Image.open(io.BytesIO(bytes(png))).save(svg.with_suffix(".png"), optimize=True)
        done.append(svg.with_suffix(".png").name)
    return done
