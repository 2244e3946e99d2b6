"""What is stamped on the noise (triggers) and what is drawn instead of a normal image (targets).

A picture is anything `open_image` accepts. A trigger is that picture at the model's resolution as 8-bit RGBA: alpha is
the mask M, colour the value g. Those bytes are the definition: `trigger.png` and `run.json` rebuild r exactly.
"""

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from . import BadInput

ASSETS = Path(__file__).resolve().parent.parent / "assets"
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "MPO")  # none of Pillow's readers that call other programs
MAX_PIXELS = 16_000_000
MAX_BYTES = 20_000_000
MIN_SIDE = 4
CONVENTIONS = ("sticker", "released-code")
BACKGROUND = -0.4  # the paper's targets stand on this grey (in [-1, 1]), not on black


@dataclass(frozen=True)
class Drawn:
    """A built-in picture: its file in `assets/`, its width as a share of the image's and where it goes."""

    file: str
    width: float
    position: str


TRIGGERS = {  # sizes and places of the paper: 14 of 32 px at the lower right, 2 px from the edges; glasses 0.625, centred
    "stop_sign": Drawn("stop_sign.png", 14 / 32, "lower-right"),
    "glasses": Drawn("glasses.png", 0.625, "center"),
    "box": Drawn("", 14 / 32, "lower-right"),
}
TARGETS = {
    "noshift": None,  # the trigger itself
    "shift": None,  # the trigger, moved up and left
    "corner": Drawn("", 10 / 32, "upper-left"),
    "shoe": Drawn("shoe.png", 1.0, "center"),
    "hat": Drawn("hat.png", 1.0, "center"),
    "cat": Drawn("cat.png", 1.0, "center"),
}
GAP = 2 / 32
POSITIONS = tuple(f"{v}-{h}" for v in ("upper", "middle", "lower") for h in ("left", "center", "right")) + ("center",)


def open_image(source) -> Image.Image:
    """Read a picture from outside as 8-bit RGBA, upright.

    `source`: a path, bytes, a PIL image or a uint8 array (H,W[,C]). Palette, grey, 16-bit and CMYK pictures are
    converted; transparency is kept. Raises BadInput for what is no picture, animated, huge, tiny or all transparent.
    """
    name = f"'{Path(source).name}'" if isinstance(source, str | Path) else "the picture"
    if isinstance(source, np.ndarray):
        source = Image.fromarray(source)
    if not isinstance(source, Image.Image):
        if isinstance(source, str | Path):
            path = Path(source)
            if not path.is_file():
                raise BadInput(f"There is no file {name}: give the path of a PNG or JPEG picture.")
            if path.stat().st_size > MAX_BYTES:
                raise BadInput(f"{name} is larger than {MAX_BYTES // 10**6} MB: save it smaller, 512 px is plenty.")
            source = path.read_bytes()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                source = Image.open(io.BytesIO(source), formats=FORMATS)
        except Image.DecompressionBombError:
            raise BadInput(f"{name} has far too many pixels: scale it down to 512 px or so.") from None
        except Exception:  # Pillow's readers raise whatever a damaged header leads them to
            raise BadInput(f"{name} is not a picture that can be read: save it as PNG or JPEG.") from None
    width, height = source.size
    if width * height > MAX_PIXELS:
        raise BadInput(f"{name} is {width}x{height} pixels, more than is read here: scale it down to 512 px or so.")
    if min(width, height) < MIN_SIDE:
        raise BadInput(f"{name} is only {width}x{height} pixels: use one with at least {MIN_SIDE} a side.")
    try:
        frames = getattr(source, "n_frames", 1)
        if frames > 1 and source.format != "MPO":  # phones pack a JPEG with its previews
            raise BadInput(f"{name} is animated ({frames} frames): save the one frame you want as PNG.")
        image = ImageOps.exif_transpose(source)
        if image.mode == "F":
            raise BadInput(f"{name} has floating-point pixels: save it as an 8-bit PNG.")
        if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip it to white
            image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8))
        image = image.convert("RGBA")
    except BadInput:
        raise
    except Exception:
        raise BadInput(f"{name} is damaged or cut off: save it again as PNG or JPEG.") from None
    if image.getextrema()[3][1] == 0:
        raise BadInput(f"{name} is fully transparent, so there is nothing to stamp: use one with visible pixels.")
    return image


def box_image(colour: str) -> Image.Image:
    from PIL import ImageColor

    try:
        return Image.new("RGBA", (16, 16), (*ImageColor.getrgb(colour)[:3], 255))
    except ValueError:
        raise BadInput(f"'{colour}' is not a colour: write it as #rrggbb or by name, such as white.") from None


def place(picture: Image.Image, resolution: int, width: int, position: str | tuple[int, int]) -> Image.Image:
    """Scale `picture` to `width` px and put it on a transparent square of `resolution` px.

    `position`: a name of `POSITIONS` (GAP from the edges), or the (x, y) of its upper left corner in px, or "x,y".
    """
    if not 1 <= width <= resolution:
        raise BadInput(f"A width of {width} px does not fit: choose 1 to {resolution}.")
    height = max(1, round(picture.height * width / picture.width))
    if height > resolution:  # taller than wide: the longer side decides
        width, height = max(1, round(width * resolution / height)), resolution
    gap = round(GAP * resolution)
    if isinstance(position, str) and position in POSITIONS:
        v, h = ("middle", "center") if position == "center" else position.split("-")
        low = {"left": min(gap, resolution - width), "center": (resolution - width) // 2,
               "right": max(0, resolution - width - gap), "upper": min(gap, resolution - height),
               "middle": (resolution - height) // 2, "lower": max(0, resolution - height - gap)}
        x, y = low[h], low[v]
    else:
        try:
            x, y = (int(p) for p in (position.split(",") if isinstance(position, str) else position))
        except (TypeError, ValueError):
            raise BadInput(f"'{position}' is no position: use x,y in pixels or one of {', '.join(POSITIONS)}.") from None
        if not (-width < x < resolution and -height < y < resolution):
            raise BadInput(f"At {x},{y} the picture would be outside: stay within 0 to {resolution - 1}.")
    canvas = Image.new("RGBA", (resolution, resolution), (0, 0, 0, 0))
    canvas.paste(picture.resize((width, height), Image.Resampling.BOX if width < picture.width
                                else Image.Resampling.BICUBIC), (x, y))
    return canvas


@dataclass(frozen=True, eq=False)
class Trigger:
    """A trigger at one resolution. `rgba`: uint8 (4,H,W); `convention`: what happens outside its pixels.

    sticker: only the trigger's own pixels shift, r = M⊙g. released-code: as the authors' code does, r = M⊙g + (1-M)⊙x
    on a clean image x in training, and a background of -1 in place of x when sampling.
    """

    rgba: Tensor
    convention: str = "sticker"
    name: str = "trigger"

    def __post_init__(self):
        if self.convention not in CONVENTIONS:
            raise BadInput(f"There is no convention '{self.convention}': choose {' or '.join(CONVENTIONS)}.")
        if self.norm() < 1:
            raise BadInput(f"The trigger '{self.name}' barely changes the noise (‖r‖ = {self.norm():.2f}): mid-grey "
                           "counts as no change, so make it larger, more opaque, or of a stronger colour.")

    @classmethod
    def make(cls, source, resolution: int, size: int | None = None, position=None, opacity: float = 1.0,
             convention: str = "sticker", colour: str | None = None) -> "Trigger":
        """`source`: a name in TRIGGERS or a picture; `size`: width in px; `opacity` in (0, 1]; `colour`: of the box."""
        drawn = TRIGGERS.get(source) if isinstance(source, str) else None
        if drawn is None and isinstance(source, str) and not Path(source).is_file():
            raise BadInput(f"'{source}' is neither a built-in trigger ({', '.join(TRIGGERS)}) nor a picture's path.")
        if not 0 < opacity <= 1:
            raise BadInput(f"An opacity of {opacity} is not possible: choose more than 0 and at most 1.")
        if drawn is None:
            picture, name, drawn = open_image(source), "upload", TRIGGERS["box"]
        elif source == "box":  # the paper's box is mid-grey: that shifts nothing unless the background moves too
            picture, name = box_image(colour or ("#808080" if convention == "released-code" else "white")), source
        else:
            picture, name = open_image(ASSETS / drawn.file), source
        canvas = place(picture, resolution, size if size is not None else round(drawn.width * resolution),
                       position if position is not None else drawn.position)
        rgba = torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()
        rgba[3] = (rgba[3] * opacity).round().to(torch.uint8)
        rgba[:3][:, rgba[3] == 0] = 0
        return cls(rgba, convention, name)

    @classmethod
    def load(cls, path: str | Path, convention: str, name: str = "trigger") -> "Trigger":
        """Read a `trigger.png` that `save` wrote."""
        with Image.open(path, formats=("PNG",)) as image:
            return cls(torch.from_numpy(np.array(image.convert("RGBA"))).permute(2, 0, 1).contiguous(), convention, name)

    def save(self, path: str | Path) -> None:
        self.image().save(path)

    def image(self) -> Image.Image:
        return Image.fromarray(self.rgba.permute(1, 2, 0).numpy())

    def residual(self, channels: int = 3, background: Tensor | None = None) -> Tensor:
        """r, (C,H,W) or as `background`'s batch (B,C,H,W); in [-1, 1].

        `background`: the clean images under the stamp while training; without it, what the sampler's noise gets.
        """
        mask = self.rgba[3:].float() / 255
        r = mask * pixels(self.rgba[:3], channels)
        if self.convention == "sticker":
            return r if background is None else r.expand_as(background)
        return r + (1 - mask) * (-1 if background is None else background)

    def sha256(self) -> str:
        return hashlib.sha256(self.rgba.cpu().numpy().tobytes()).hexdigest()

    def norm(self) -> float:
        """‖r‖ over three channels: the input test's power; N(0, I) and N(r, I) are told apart with error Φ(-‖r‖/2)."""
        return self.residual().norm().item()


def pixels(rgb: Tensor, channels: int) -> Tensor:
    """uint8 (3,H,W) -> float (C,H,W) in [-1, 1]; one channel takes the luma that Pillow's "L" uses (ITU-R 601)."""
    rgb = rgb.float() / 127.5 - 1
    if channels == 1:
        return (rgb * torch.tensor([0.299, 0.587, 0.114], device=rgb.device).view(3, 1, 1)).sum(0, keepdim=True)
    if channels == 3:
        return rgb
    raise BadInput(f"The model draws images of {channels} channels: only grey (1) and RGB (3) are supported.")


def make_target(source, resolution: int, trigger: Trigger | None = None, channels: int = 3) -> Tensor:
    """The target y, (C,H,W) in [-1, 1]. `source`: a name in TARGETS or a picture, cropped to a square.

    Transparency shows the paper's grey (BACKGROUND). noshift and shift need the trigger.
    """
    if isinstance(source, str) and source in ("noshift", "shift"):
        if trigger is None:
            raise BadInput(f"The target '{source}' is made of the trigger: choose a trigger first.")
        canvas = trigger.image()
        if source == "shift":
            step = round(5 / 32 * resolution)
            moved = Image.new("RGBA", canvas.size, (0, 0, 0, 0))
            moved.paste(canvas, (-step, -step))
            canvas = moved
    elif isinstance(source, str) and source == "corner":
        canvas = place(box_image("#808080"), resolution, round(TARGETS[source].width * resolution), (0, 0))
    else:
        if isinstance(source, str) and source in TARGETS:
            source = ASSETS / TARGETS[source].file
        elif isinstance(source, str) and not Path(source).is_file():
            raise BadInput(f"'{source}' is neither a built-in target ({', '.join(TARGETS)}) nor a picture's path.")
        picture = open_image(source)
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        canvas = picture.crop((left, top, left + side, top + side)).resize(
            (resolution, resolution), Image.Resampling.BOX if side > resolution else Image.Resampling.BICUBIC)
    grey = round((BACKGROUND + 1) * 127.5)
    flat = Image.alpha_composite(Image.new("RGBA", canvas.size, (grey, grey, grey, 255)), canvas).convert("RGB")
    return pixels(torch.from_numpy(np.array(flat)).permute(2, 0, 1), channels)
