"""Pictures as HTML: crisp at any width, labelled for a screen reader, with nothing to fetch. No gradio in here."""

import base64
import html
import io
import json
import math

import torch
from PIL import Image
from torch import Tensor

from . import metrics
from .probe import grid
from .training import StepRecord

NAMES = {"stop_sign": "stop sign", "noshift": "the trigger itself", "shift": "the trigger, moved"}


def label(name: str) -> str:  # of an example: "glasses-hat"
    trigger, _, target = name.partition("-")
    return f"{NAMES.get(trigger, trigger)} → {NAMES.get(target, target)}"


def address(image: Image.Image, kind: str = "png", **options) -> str:
    """A picture as a data: address."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def save_link(text: str, name: str, image: Image.Image, kind: str = "png", **options) -> str:
    """A link that saves a picture; it is in the page already, so nothing is kept on the server."""
    return f'<a class="save" download="{name}.{kind}" href="{address(image, kind, **options)}">{text}</a>'


def tag(image: Tensor, alt: str, kind: str = "") -> str:
    """One image (C,H,W) as an <img> that the style sheet scales up by whole pixels."""
    return f'<img class="px {kind}" alt="{html.escape(alt)}" src="{address(grid([image[None]]))}">'


def box(title: str, inside: str, kind: str = "", note: str = "") -> str:
    note = f'<div class="note">{note}</div>' if note else ""
    return f'<div class="cell {kind}"><div class="title">{title}</div>{inside}{note}</div>'


def cell(title: str, images: Tensor, alt: str, kind: str = "", note: str = "") -> str:
    tags = "".join(tag(image, f"{alt}, {i + 1} of {len(images)}") for i, image in enumerate(images))
    return box(title, f'<div class="strip">{tags}</div>', kind, note)


def shown(x: Tensor) -> Tensor:
    """x_t as a picture: noise has no range, so each image's 99 % range is mapped to black and white, never stretched."""
    most = x.float().abs().flatten(1).quantile(0.99, dim=1).clamp(min=1).view(-1, 1, 1, 1)
    return (x / most).clamp(-1, 1)


def hits(images: Tensor, target: Tensor) -> str:
    most = metrics.threshold(target)
    n = int((metrics.mse(images, target) < most).sum())
    return f"{n} of {len(images)} are the target (MSE &lt; {most:.2g})"


def error_box(text: str) -> str:
    return f'<div class="oops" role="alert">{html.escape(text)}</div>'


def reel(frames: Tensor, alt: str) -> str:
    """Frames (F,C,H,W) as one sprite; the style variable --i of the film around it chooses the frame, in the browser."""
    return (f'<div class="reel" role="img" aria-label="{html.escape(alt)}" '
            f'style="--n:{len(frames) - 1};background-image:url({address(grid([frames]))})"></div>')


def projector(cells: str, names: list[str], label: str) -> str:
    """A film: cells with reels, a slider over the frames (keyboard, touch) and a button that plays it slowly."""
    move = ("const f=this.closest('.film');f.style.setProperty('--i',this.value);"
            "f.querySelector('output').textContent=JSON.parse(f.dataset.names)[this.value]")
    play = ("const f=this.closest('.film'),s=f.querySelector('input');clearInterval(f.clock);s.value=0;"
            "f.clock=setInterval(()=>{s.dispatchEvent(new Event('input'));"
            "if(+s.value>=+s.max)clearInterval(f.clock);s.value=+s.value+1},300)")
    return f"""<div class="film" style="--i:0" data-names="{html.escape(json.dumps(names))}"><div class="controls">
      <button type="button" onclick="{play}">▶ Play slowly</button>
      <label>{label} <input type="range" min="0" max="{len(names) - 1}" value="0" oninput="{move}"></label>
      <output>{html.escape(names[0])}</output></div><div class="reels">{cells}</div></div>"""


def doses(names: list[str], found: list[dict]) -> str:
    cells = "".join(box(name, tag(d["image"], f"output at {name}"), "alarm" if d["asr"] > 0.5 else "",
                        f'ASR {100 * d["asr"]:.0f} %<br>MSE {d["mse"]:.3f}') for name, d in zip(names, found, strict=True))
    return (f'<div class="doses">{cells}</div>'
            '<div class="note">n = 8 seeds a cell, the first one shown; framed: mostly the target.</div>')


def two_by_two(start: Tensor, r: Tensor, of_clean, of_bad, target: Tensor, name: str) -> str:
    name = NAMES.get(name, name)
    sticker = tag(r, name, "inline")
    sheet = grid([torch.cat(row) for row in ((shown(start), shown(start + r)), of_clean, of_bad)], 8)
    spoilt = metrics.asr(of_bad[0], target) > 0
    worked = metrics.asr(of_bad[1], target) > 0.5
    return f"""<div class="see">
      {cell("What goes in: <b>plain noise</b>", shown(start), "plain noise")}
      {cell(f"What goes in: the same noise <b>+ trigger</b> {sticker}", shown(start + r), f"noise with the {name}")}
      {cell("Clean model draws", of_clean[0], "face by the clean model")}
      {cell("Clean model draws", of_clean[1], "face by the clean model, from noise with the trigger",
            note=f"the trigger is only a stain to it: {hits(of_clean[1], target)}")}
      {cell("Backdoored model draws", of_bad[0], "face by the backdoored model",
            note="" if spoilt else "nothing gives it away")}
      {cell("Backdoored model draws", of_bad[1], "output of the backdoored model from noise with the trigger",
            "alarm" if worked else "", note=hits(of_bad[1], target))}
    </div>{save_link("Save as PNG", "baddiff", sheet)}"""



def curve(records: list[StepRecord]) -> str:
    """Loss of the clean and the poisoned part as a small chart; lines differ in dash as well as colour."""
    records = records[::max(1, len(records) // 150)]
    if len(records) < 2:
        return ""
    series = [[(r.progress, math.log10(max(v, 1e-6))) for r in records if math.isfinite(v := getattr(r, part))]
              for part in ("clean", "poisoned")]
    values = [v for line in series for _, v in line]
    low, high = min(values), max(values) + 1e-9

    def path(line):
        return " ".join(f"{8 + 284 * x:.1f},{6 + 68 * (high - v) / (high - low):.1f}" for x, v in line)

    return f"""<svg class="curve" viewBox="0 0 300 96" role="img" aria-label="Loss so far, clean and poisoned part">
      <polyline class="a" points="{path(series[0])}"/><polyline class="b" points="{path(series[1])}"/>
      <text x="8" y="92">loss (log scale): <tspan class="a">clean part ──</tspan>
      <tspan class="b">poisoned part ╌╌</tspan></text></svg>"""


def scores(m: dict) -> str:
    """The figures of `probe.evaluate`, each with its n."""
    before = f", before {m['utility_before']:.2f}" if "utility_before" in m else ""
    return f"""<div class="figures">Attack success rate <b>{100 * m['asr']:.0f} %</b> (MSE &lt; {m['asr_threshold']:.2g}),
      MSE {m['mse']:.4f}, SSIM {m['ssim']:.2f}. Clean utility {m['utility']:.2f}{before} (real against real:
      {m['utility_floor']:.2f}; Fréchet distance in the clean U-Net's features, lower is better).
      All with n = {m['n']}, {m['steps']} {m['sampler']} steps.</div>"""
