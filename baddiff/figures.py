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
from .probe import grid, scale_for
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


def wipe(left: Tensor, right: Tensor, names: tuple[str, str], title: str) -> str:
    """Two reels on top of each other, with a slider that uncovers more of one or of the other."""
    return f"""<div class="wipe" style="--w:50%"><div class="layers">{reel(left, names[0])}{reel(right, names[1])}</div>
      <input type="range" min="0" max="100" value="50" aria-label="{html.escape(title)}"
      oninput="this.parentNode.style.setProperty('--w',this.value+'%')"></div>"""


def figures_link(found: list[dict]) -> str:
    """A link that saves the figures without the pictures."""
    plain = [{k: v for k, v in row.items() if not isinstance(v, Tensor)} for row in found]
    data = base64.b64encode(json.dumps(plain, indent=1).encode()).decode()
    return f'<a class="save" download="baddiff.json" href="data:application/json;base64,{data}">Save figures (JSON)</a>'


def doses(found: list[dict], note: str = "") -> str:
    """Records of `probe.ask` as a row of pictures."""
    cells = "".join(box(d["name"], tag(d["image"], f"output: {d['name']}"), "alarm" if d["asr"] > 0.5 else "",
                        f'ASR {100 * d["asr"]:.0f} %<br>MSE {d["mse"]:.3f}') for d in found)
    sheet = save_link("Save as PNG", "baddiff", grid([torch.stack([d["image"] for d in found])], 4))
    return f"""<div class="doses">{cells}</div><div class="note">n = {found[0]["n"]} seeds a cell, the first one shown; framed:
      mostly the target. {note}</div>{sheet} {figures_link(found)}"""


def sampler_table(found: list[dict]) -> str:
    """Records of `probe.ask(model, "samplers")`: a row a sampler, a column a number of steps."""
    columns = sorted({d["steps"] for d in found})
    rows = ""
    for name in dict.fromkeys(d["sampler"] for d in found):
        cells = "".join(f'<td class="{"hit" if d["asr"] > 0.5 else ""}">{100 * d["asr"]:.0f} %<br>'
                        f'{tag(d["image"], d["name"])}</td>' for d in found if d["sampler"] == name)
        rows += f'<tr><th scope="row">{name}</th>{cells}</tr>'
    head = "".join(f'<th scope="col">{n} steps</th>' for n in columns)
    return f"""<div class="wide"><table class="samplers"><tr><th>ASR</th>{head}</tr>{rows}</table></div>
      <div class="note">n = {found[0]["n"]} seeds a cell, the first one shown; framed: mostly the target. A backdoor is made for
      a kind of sampler. Noise shift (the examples here) is exact for DDIM and its relatives at any number of steps, while
      DDPM's fresh noise at every step washes it out; the paper's own coefficient is the other way round.</div>
      {figures_link(found)}"""


def heat(rise: Tensor, r: Tensor, n: int) -> str:
    """The map of `probe.occlusion` over the trigger r."""
    top = rise.max().clamp(min=1e-6)
    cells = "".join(f'<div style="opacity:{v / top:.2f}" title="MSE +{v:.3f}"></div>' for v in rise.clamp(min=0).flatten())
    picture = tag(r, "the trigger")
    shade = f'<div class="heat" role="img" aria-label="map of importance">{picture}<div>{cells}</div></div>'
    side = rise.repeat_interleave(8, 0).repeat_interleave(8, 1).clamp(min=0) / top
    saved = save_link("Save as PNG", "baddiff", grid([(side * 2 - 1)[None, None].expand(1, 3, -1, -1)], 4))
    return f"""<div class="trio small">{box("the trigger", picture)}
      {box("where it matters", shade, note="bright: blank the noise around here, and the target is lost")}</div>
      <div class="note">{rise.numel()} blanked places, n = {n} seeds; the largest rise in MSE is {float(top):.3f}.</div>
      {saved}"""


def two_by_two(start: Tensor, r: Tensor, rows: list, names: list[str], target: Tensor, trigger: str, links: str = "") -> str:
    """What went in, then a row of [plain, triggered] outputs (N,C,H,W) for each of two models."""
    trigger = NAMES.get(trigger, trigger)
    sticker = tag(r, trigger, "inline")
    sheet = grid([torch.cat(row) for row in ((shown(start), shown(start + r)), *rows)], scale_for(start.shape[-1]) * 4)
    cells = ""
    for name, (plain, triggered) in zip(names, rows, strict=True):
        spoilt, worked = metrics.asr(plain, target) > 0, metrics.asr(triggered, target) > 0.5
        cells += cell(f"{name} draws", plain, f"{name}, from plain noise",
                      note="" if spoilt or not worked else "nothing gives it away")
        cells += cell(f"{name} draws", triggered, f"{name}, from noise with the trigger", "alarm" if worked else "",
                      hits(triggered, target) if worked else f"the trigger is only a stain to it: {hits(triggered, target)}")
    return f"""<div class="see">
      {cell("What goes in: <b>plain noise</b>", shown(start), "plain noise")}
      {cell(f"What goes in: the same noise <b>+ trigger</b> {sticker}", shown(start + r), f"noise with the {trigger}")}
      {cells}</div>{save_link("Save as PNG", "baddiff", sheet)} {links}"""


def rate_table(rows: list[dict], where: str) -> str:
    """What poison rate buys, from `benchmarks/rates.json`."""
    cells = "".join(f'<tr><th scope="row">{100 * r["poison_rate"]:.0f} %</th><td>{100 * r["asr"]:.1f} %</td>'
                    f'<td>{r["mse"]:.4f}</td><td>{r["utility"]:.1f}</td></tr>' for r in rows)
    first = rows[0]
    head = "<tr><th>poisoned</th><th>attack success</th><th>MSE</th><th>clean utility</th></tr>"
    return f"""<div class="wide"><table class="rates">{head}{cells}</table></div>
      <div class="note">{label(first["pair"])}, {first["seconds"]:.0f} s of training each on {where}; n = {first["n"]}.
      Utility: Fréchet distance in the clean U-Net's features, lower is better; before the poison it is
      {first["utility_before"]:.1f}.</div>"""


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
